"""The images of a split in order, and those of files: as a network takes them, and as shown."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from picnn_fast import checks
from picnn_fast._extras import extra
from picnn_fast.data.loading import SeededDataModule
from picnn_fast.data.parts import PartDataModule, PartSample
from picnn_fast.data.preprocessing import as_numbers, read_file

with extra("train"):
    from PIL import Image
    from torchvision.transforms.v2.functional import pil_to_tensor

SPLITS = ("train", "test")


class Batches:
    """The images of a split, in order, none augmented, as networks trained on the data take them.

    Iterating yields images ``[B, C, H, W]`` and labels ``[B]``, on the CPU, and of a
    ``PartDataModule`` the masks of its parts too, ``[B, P, S, S]`` bool. Its length is in batches.

    Args:
        data: set up.
        split: "train", without the images held out to validate on, or "test".

    Attributes:
        num_images: of the split.
        part_names: P names; empty where the data has no part masks.

    Raises:
        ValueError: another split.

    Example:
        >>> from picnn_fast.data import Batches, DigitsDataModule
        >>> batches = Batches(DigitsDataModule(batch_size=100), "test")
        >>> len(batches), batches.num_images, [len(labels) for _, labels in batches]
        (4, 360, [100, 100, 100, 60])
    """

    def __init__(self, data: SeededDataModule, split: str = "test") -> None:
        checks.one_of("split", split, SPLITS)
        self.part_names: list[str] = []
        self._data = data
        self._loader: DataLoader[Any]
        if isinstance(data, PartDataModule):
            self.part_names = list(data.part_sets[split].part_names)
            self._loader = data.part_loader(split)
        else:
            self._loader = data.test_dataloader() if split == "test" else data.train_images()
        self.num_images: int = len(self._loader.dataset)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for batch in self._loader:
            pair, masks = batch, []
            if isinstance(batch, PartSample):
                fields: Any = batch
                pair = fields.image, fields.label
                masks = [fields.part_masks] if self.part_names else []
            yield *self._data.as_taken(*pair), *masks


def shown_image(data: SeededDataModule, split: str, index: int) -> Tensor:
    """An image of a split as it is shown: ``[C, H, W]`` float32, in [0, 1].

    Args:
        data: set up.
        split: "train" or "test".
        index: as in the order of ``Batches``.

    Raises:
        IndexError: there is no such image.
        TypeError: an index that is no int.
        ValueError: another split, or an index below 0.

    Example:
        >>> from picnn_fast.data import DigitsDataModule, shown_image
        >>> shown_image(DigitsDataModule(), "test", 0).shape
        torch.Size([1, 8, 8])
    """
    checks.one_of("split", split, SPLITS)
    checks.integer("index", index, 0)
    images = data.test_set
    if split == "train":
        images = data.train_set if data.plain_train_set is None else data.plain_train_set
    image: Tensor = images[index][0]  # normalised on its way to the network alone
    return image


def read_image(data: SeededDataModule, path: str | Path) -> tuple[Tensor, Tensor]:
    """An image file as a test image of some data.

    Args:
        data: as whose images it is resized and normalised; one that does not tell how
            (``preprocessing``) resizes it to the size of its test images, whatever its shape.
        path: of the file.

    Returns:
        The image as networks trained on the data take it, and as it is shown, in [0, 1]: both
        ``[C, H, W]`` float32.

    Raises:
        FileNotFoundError: no such file.
        DamagedFileError: it is no image.
    """
    if data.preprocessing is not None:
        return data.preprocessing.read(path)
    channels, height, width = data.test_set[0][0].shape
    image = read_file(path).resize((width, height), Image.Resampling.BILINEAR)
    shown = as_numbers(pil_to_tensor(image if channels == 3 else image.convert("L")))
    taken, _ = data.as_taken(shown[None], torch.zeros(1, dtype=torch.int64))
    return taken[0], shown
