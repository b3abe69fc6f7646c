"""Images in tar files, as WebDataset has them."""

import glob
import io
import itertools
import os
import re
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import fsspec
import numpy as np
from numpy.typing import NDArray

from picnn_fast._extras import extra
from picnn_fast._files import replacing
from picnn_fast.data.files import DamagedFileError, lines, open_image, reading
from picnn_fast.data.images import Augmentation, ImageDataModule, Pictures
from picnn_fast.data.loading import IMAGENET_MEAN, IMAGENET_STD, EpochOrder, derive_seed, readers

with extra("train"):
    from filelock import FileLock
    from PIL import Image
    from torchvision.datasets.folder import IMG_EXTENSIONS

_WINDOW = 16  # shards whose images are shuffled with one another
_MOST_OPEN = 64  # files, of each process
_BLOCK = 512  # bytes of a tar file's header

Integers = NDArray[np.int64]


class ShardIndex(NamedTuple):
    """What is in some shards.

    Attributes:
        names: of the shards, paths or URLs.
        bytes: of each, by which one that has changed is told.
        places: shard, first byte and number of bytes of each image, ``[n, 3]``.
        labels: of each image, ``[n]``.
    """

    names: list[str]
    bytes: list[int]
    places: Integers
    labels: Integers


class Shards:
    """Tar files, read at any place; those at a URL once they were fetched.

    Args:
        names: paths or URLs.
        keep: folder that those at a URL are fetched to, whole.
    """

    def __init__(self, names: Sequence[str], keep: Path | None) -> None:
        self.names, self.keep = list(names), keep
        self._files: dict[str, int] = {}

    def path(self, name: str) -> Path:
        """Of a shard on this machine, fetched by whichever process needs it first."""
        if not _is_url(name):
            return Path(name)
        assert self.keep is not None
        path = self.keep / name.rpartition("/")[2]
        if path.exists():
            return path
        self.keep.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            if not path.exists():
                with (
                    reading(name, "a shard"),
                    fsspec.open(name, "rb") as source,
                    replacing(path) as target,
                ):
                    shutil.copyfileobj(source, target, 1 << 20)
        return path

    def read(self, name: str, start: int, count: int) -> bytes:
        """So many bytes of a shard."""
        if name not in self._files:
            while len(self._files) >= _MOST_OPEN:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[name] = os.open(self.path(name), os.O_RDONLY)
        return os.pread(self._files[name], count, start)

    def __del__(self) -> None:
        for file in self._files.values():
            os.close(file)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}


class ShardPictures(Pictures):
    """Images in shards."""

    def __init__(self, shards: Shards, index: ShardIndex, chosen: Integers | None = None) -> None:
        self.shards, self.index = shards, index
        self.images = np.arange(len(index.labels)) if chosen is None else chosen
        self.labels = index.labels[self.images].tolist()

    def open(self, index: int, least: int) -> Image.Image:
        shard, start, count = self.index.places[self.images[index]].tolist()
        name = self.index.names[shard]
        try:
            content = self.shards.read(name, start, count)
            return open_image(io.BytesIO(content), least)
        except (ImportError, MemoryError, DamagedFileError):
            raise
        except Exception as error:
            head = self.shards.read(name, start - _BLOCK, 100)
            member = head.split(b"\0")[0].decode(errors="replace")
            raise DamagedFileError(
                f"{member} in {name} cannot be read as an image ({error})"
            ) from error

    def chosen(self, indices: Sequence[int]) -> "ShardPictures":
        return ShardPictures(self.shards, self.index, self.images[list(indices)])


class ShardOrder(EpochOrder):
    """Images of an epoch, shard by shard, so that a rank reads through few files at a time.

    Shards are shuffled, and so are the images of 16 of them together. Each rank takes as long a
    piece of that order as the others, so that it reads shards that they do not, but for those at
    the ends of its piece.

    Args:
        images: the training images.
        shards: which shard each is in.
        options: see ``DistributedSampler``.
    """

    def __init__(self, images: Any, shards: Integers, **options: Any) -> None:
        super().__init__(images, **options)
        self.shards = shards

    def indices(self) -> Iterator[int]:
        random = np.random.default_rng(derive_seed(self.seed, self.epoch))
        place = random.permutation(int(self.shards.max()) + 1)[self.shards]
        order = np.lexsort((random.random(len(self.shards)), place // _WINDOW))
        # As many for each rank: some of the first again.
        order = np.resize(order, self.total_size)
        piece = order[self.rank * self.num_samples : (self.rank + 1) * self.num_samples]
        return iter(piece.tolist())


class ShardsDataModule(ImageDataModule):
    """RGB images in tar files, ``root/train-*.tar`` and ``root/test-*.tar``, as of WebDataset.

    A shard is a tar file that is not compressed. It holds each image beside its label, an integer
    from 0 on in ASCII, under one name up to the first dot: ``0001.jpg`` and ``0001.cls``; other
    files are left out. Images are those of ``ImageFolderDataModule``, and so are the options.

    Training images are shuffled shard by shard, and 16 shards with one another; each process of a
    run reads its own piece of that order, as long as that of the others, and every image once an
    epoch. Where they do not divide by the processes, as many as are wanted are read twice, which is
    told. Shards at a URL are fetched, whole, by whichever process of a machine needs them first,
    and stay there. What is in the shards is looked for when the run begins, at some 6,000 images a
    second; ``index`` keeps it.

    Args:
        root: folder or URL that the shards are in; any that fsspec reads.
        batch_size: images a step (a process, when there are several).
        train: names of the shards to train on, with braces, as train-{000..146}.tar or
            part-{a,b}.tar; or, in a folder, with wildcards.
        test: names of the shards to test on.
        classes: text file of the classes' names, one a line, in the order of their labels; None:
            their labels.
        index: file that keeps what is in the shards; made where there is none, or where shards
            have changed. Processes on several machines can share it.
        keep: folder that shards at a URL are fetched to.
        image_size: side of the square, pixels.
        seed: of the order of the images and of the augmentation.
        resize: pixels of an image's shorter side, before a random crop in training and the central
            one in testing; None: image_size.
        test_crop: "center": the middle square of the resized image; "stretch": the whole image,
            resized to the square whatever its shape.
        augment: False shows training images as in testing, and leaves crop, padding, flip and
            color_jitter without effect.
        crop: of training images: "random-resized": 50 to 100 % of the area, resized to the square;
            "random": a square of image_size pixels of the resized image; "none": as in testing.
        padding: zero pixels put around the image before a random crop.
        flip: turn half of the training images left to right.
        color_jitter: of training images: greatest change of brightness, contrast, saturation and
            hue, as torchvision's ``ColorJitter`` takes them; None: no change.
        validation: share of the training images held out to validate on; 0: no validation.
        validation_seed: of the choice of the images held out.
        mean: subtracted from each colour, on a scale of [0, 1]; ImageNet's by default.
        std: each colour is divided by, on a scale of [0, 1]; ImageNet's by default.
        cache: gigabytes of memory for decoded images, as of ``ImageFolderDataModule``.
        num_workers: processes that read images; None: up to 8, one a processor.

    Raises:
        FileNotFoundError: there is no shard of such a name.
        ValueError: a shard is damaged, an image without a label, a label without a class, or an
            argument out of range.
        TypeError: a number of pixels is no int.

    Example:
        >>> from picnn_fast.data import ShardsDataModule
        >>> data = ShardsDataModule("shards", train="train-{00..63}.tar")  # doctest: +SKIP
    """

    def __init__(
        self,
        root: str | Path,
        batch_size: int = 64,
        *,
        train: str = "train-*.tar",
        test: str = "test-*.tar",
        classes: str | Path | None = None,
        index: str | Path | None = None,
        keep: str | Path | None = None,
        image_size: int = 224,
        seed: int = 0,
        resize: int | None = None,
        test_crop: Literal["center", "stretch"] = "center",
        augment: bool = True,
        crop: Literal["random-resized", "random", "none"] = "random-resized",
        padding: int = 0,
        flip: bool = True,
        color_jitter: tuple[float, float, float, float] | None = None,
        validation: float = 0.1,
        validation_seed: int = 0,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        cache: float | None = None,
        num_workers: int | None = None,
    ) -> None:
        augmentation = Augmentation(
            image_size=image_size,
            resize=resize,
            test_crop=test_crop,
            augment=augment,
            crop=crop,
            padding=padding,
            flip=flip,
            color_jitter=color_jitter,
            mean=mean,
            std=std,
        )
        workers = readers(num_workers)
        super().__init__(
            augmentation, batch_size, workers, seed, validation, validation_seed, cache
        )
        root = str(root) if _is_url(str(root)) else str(Path(root).expanduser())
        if _is_url(root) and keep is None:
            raise ValueError(
                f"keep: got None with shards at {root}, want a folder that they are fetched to"
            )
        kept = None if keep is None else Path(keep).expanduser()
        train_names, test_names = _named(root, "train", train), _named(root, "test", test)
        shards = Shards([*train_names, *test_names], kept)
        found = _look(shards, None if index is None else Path(index).expanduser())
        of_train = found.places[:, 0] < len(train_names)
        parts = [
            ShardPictures(shards, found, np.flatnonzero(chosen)) for chosen in (of_train, ~of_train)
        ]
        for split, part in zip(("train", "test"), parts, strict=True):
            if not part.labels:
                raise ValueError(f"{split}: the shards of {root} hold no image")
        count = int(found.labels.max()) + 1
        names = [str(label) for label in range(count)]
        if classes is not None:
            path = Path(classes).expanduser()
            with reading(path, "names of classes"):
                names = [line.strip() for line in lines(path)]
        if count > len(names):
            raise ValueError(
                f"classes: got {len(names)} names in {classes}, want at least {count}, for there is"
                f" a label {count - 1}"
            )
        self.use(names, *parts)

    def order(self, **options: Any) -> EpochOrder:
        pictures = self.train_set.pictures  # type: ignore[attr-defined]
        return ShardOrder(self.train_set, pictures.index.places[pictures.images, 0], **options)


def _is_url(name: str) -> bool:
    return "://" in name


def expand(pattern: str) -> list[str]:
    """All names that braces stand for, ``{008..010}`` a range and ``{a,b}`` a choice."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        return [pattern]
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if ends is None:
        values = found[1].split(",")
    else:
        width = len(ends[1])
        values = [f"{number:0{width}}" for number in range(int(ends[1]), int(ends[2]) + 1)]
    before, after = pattern[: found.start()], pattern[found.end() :]
    return list(
        itertools.chain.from_iterable(expand(f"{before}{value}{after}") for value in values)
    )


def _named(root: str, option: str, pattern: str) -> list[str]:
    """The shards that a pattern names, by their whole names.

    Raises:
        FileNotFoundError: none, or one that is not there.
        ValueError: wildcards at a URL.
    """
    names = expand(pattern)
    wild = glob.has_magic(pattern)
    if _is_url(root):
        if wild:
            raise ValueError(
                f"{option}: got {pattern!r} at a URL, want names with braces, as"
                f" {option}-{{000..146}}.tar"
            )
        return [f"{root.rstrip('/')}/{name}" for name in names]
    paths = [os.path.join(root, name) for name in names]
    if wild:
        paths = sorted(found for path in paths for found in glob.glob(path))
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing or not paths:
        what = missing[0] if missing else os.path.join(root, pattern)
        raise FileNotFoundError(
            f"{option}: {what} is missing; want tar files of images and labels, as 0001.jpg and"
            " 0001.cls, or other names by this option"
        )
    return paths


def _look(shards: Shards, index: Path | None) -> ShardIndex:
    """What is in the shards, from the index where that is of them; else it is written."""
    if index is None:
        return _indexed(shards)
    index.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(index.with_name(f".{index.name}.lock")):
        if index.exists():
            with reading(index, "an index of shards"), np.load(index) as content:
                kept = ShardIndex(
                    content["names"].tolist(),
                    content["bytes"].tolist(),
                    content["places"],
                    content["labels"],
                )
            if _is_of(kept, shards):
                return kept._replace(names=shards.names)
        found = _indexed(shards)
        with replacing(index) as file:
            np.savez(
                file,
                names=np.array([os.path.basename(name) for name in found.names]),
                bytes=np.array(found.bytes, np.int64),
                places=found.places,
                labels=found.labels,
            )
    return found


def _is_of(index: ShardIndex, shards: Shards) -> bool:
    """Whether an index has these names, and the sizes of those shards that are there."""
    if index.names != [os.path.basename(name) for name in shards.names]:
        return False
    return all(
        os.path.getsize(name) == size
        for name, size in zip(shards.names, index.bytes, strict=True)
        if not _is_url(name)
    )


def _indexed(shards: Shards) -> ShardIndex:
    places: list[Integers] = []
    labels: list[Integers] = []
    sizes = []
    for number, name in enumerate(shards.names):
        path = shards.path(name)
        sizes.append(os.path.getsize(path))
        with reading(name, "a tar file of images and labels"):
            found = _samples(path)
        rows = np.array([(number, *place) for *place, _ in found], np.int64).reshape(-1, 3)
        places.append(rows)
        labels.append(np.array([label for *_, label in found], np.int64))
    return ShardIndex(shards.names, sizes, np.concatenate(places), np.concatenate(labels))


def _samples(path: Path) -> list[tuple[int, int, int]]:
    """First byte, number of bytes and label of each image of a shard."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            folder, _, name = member.name.rpartition("/")
            key, _, kind = name.partition(".")
            key = f"{folder}/{key}"
            if not member.isreg() or not key.rpartition("/")[2]:
                continue
            if kind.lower() == "cls":
                content = archive.extractfile(member)
                assert content is not None
                labels[key] = int(content.read())
            elif f".{kind.lower()}" in IMG_EXTENSIONS:
                images[key] = (member.offset_data, member.size)
    unlabelled = images.keys() - labels.keys()
    if unlabelled:
        raise ValueError(f"the image {min(unlabelled).lstrip('/')} has no label .cls beside it")
    if min(labels.values(), default=0) < 0:
        raise ValueError(f"a label is {min(labels.values())}, want 0 or more")
    return [(*place, labels[key]) for key, place in images.items()]
