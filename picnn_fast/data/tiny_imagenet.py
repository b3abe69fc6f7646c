"""Tiny-ImageNet."""

from pathlib import Path

from picnn_fast.data.files import lines, need, reading
from picnn_fast.data.image_folder import labelled_files
from picnn_fast.data.imagenet import distinct
from picnn_fast.data.images import Augmentation, ImageDataModule, PictureFiles
from picnn_fast.data.loading import IMAGENET_MEAN, IMAGENET_STD, readers

_DOWNLOAD = (
    "tiny-imagenet-200 (http://cs231n.stanford.edu/tiny-imagenet-200.zip, unpacked: wnids.txt,"
    " words.txt, train/<wnid>/images/<image>.JPEG, val/val_annotations.txt and"
    " val/images/<image>.JPEG)"
)


def tiny_imagenet(
    root: str | Path,
    *,
    image_size: int = 64,
    batch_size: int = 64,
    seed: int = 0,
    augment: bool = True,
    validation: float = 0.1,
    validation_seed: int = 0,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
    cache: float | None = None,
    num_workers: int | None = None,
) -> ImageDataModule:
    """Tiny-ImageNet: images of 64 pixels in 200 classes, 100,000 to train on and 10,000 to test on.

    The test images are those of ``val``: the labels of its test are not published. Training images
    are cropped at random out of a border of zeros, an eighth of their side, and flipped.

    Args:
        root: folder ``tiny-imagenet-200``.
        image_size: side of the square images, pixels; those of the set have 64.
        batch_size: images a step (a process, when there are several).
        seed: of the order of the images and of the augmentation.
        augment: False shows training images as in testing.
        validation: share of the training images held out to validate on; 0: no validation.
        validation_seed: of the choice of the images held out.
        mean: subtracted from each colour, on a scale of [0, 1]; ImageNet's by default.
        std: each colour is divided by, on a scale of [0, 1]; ImageNet's by default.
        cache: gigabytes of memory for decoded images, as of ``ImageFolderDataModule``.
        num_workers: processes that read images; None: up to 8, one a processor.

    Raises:
        FileNotFoundError: a file is missing; says what to get.
        ValueError: a file is damaged, or an argument out of range.

    Source:
        Le and Yang, "Tiny ImageNet Visual Recognition Challenge", 2015.
    """
    root = Path(root).expanduser()
    need(root / "wnids.txt", _DOWNLOAD)
    with reading(root / "wnids.txt", "a WordNet name a line"):
        wnids = sorted(line.strip() for line in lines(root / "wnids.txt"))
    with reading(root / "words.txt", "lines of a WordNet name and words", _DOWNLOAD):
        words = dict(line.split("\t", 1) for line in lines(root / "words.txt"))
    annotations = root / "val" / "val_annotations.txt"
    with reading(annotations, "lines of an image and a WordNet name", _DOWNLOAD):
        rows = [line.split("\t")[:2] for line in lines(annotations)]
        test = [(str(root / "val" / "images" / n), wnids.index(wnid)) for n, wnid in sorted(rows)]
    need(root / "train", _DOWNLOAD)
    train = labelled_files(root / "train", wnids)
    augmentation = Augmentation.of_small(image_size, augment=augment, mean=mean, std=std)
    data = ImageDataModule(
        augmentation, batch_size, readers(num_workers), seed, validation, validation_seed, cache
    )
    names = distinct([words.get(wnid, wnid) for wnid in wnids], wnids)
    data.use(names, PictureFiles(train), PictureFiles(test))
    return data
