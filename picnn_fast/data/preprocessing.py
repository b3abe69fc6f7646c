"""What is done to an image before a network takes it, which a checkpoint takes along."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from picnn_fast._extras import extra
from picnn_fast.data.files import open_image, reading

with extra("train"):
    from PIL import Image
    from torchvision.transforms.v2 import functional as F


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How images of any size become what a network is tested on.

    Args:
        image_size: side of the square, pixels.
        resize: pixels of the shorter side, of which the central square is cut out; None: the whole
            image is stretched to the square.
        channels: 3, or 1: grey.
        mean, std: images are normalised by, a number a channel, on a scale of [0, 1]; None: they
            are not.

    Example:
        >>> import torch
        >>> from picnn_fast.data import Preprocessing
        >>> way = Preprocessing(224, 256, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
        >>> way.normalise(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)).unique()
        tensor([2.])
    """

    image_size: int
    resize: int | None = None
    channels: int = 3
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None

    def __post_init__(self) -> None:
        for name in ("mean", "std"):  # as those that are read from a file
            values = getattr(self, name)
            object.__setattr__(self, name, None if values is None else tuple(map(float, values)))

    def prepare(self, image: Image.Image) -> Image.Image:
        """The square of an RGB image."""
        prepared: Image.Image
        square = [self.image_size, self.image_size]
        if self.resize is None:
            prepared = F.resize(image, square, antialias=True)
        else:
            prepared = F.center_crop(F.resize(image, [self.resize], antialias=True), square)
        return prepared if self.channels == 3 else prepared.convert("L")

    def normalise(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Images ``[..., C, H, W]``, bytes or in [0, 1], as a network takes them.

        Args:
            images: of any layout, which is kept.
            dtype: of what bytes become; numbers in [0, 1] keep theirs.
        """
        bytes_given = not images.is_floating_point()
        images = as_numbers(images, dtype)
        if self.mean is None or self.std is None:
            return images
        mean, std = (images.new_tensor(values) for values in (self.mean, self.std))
        pixels = images.movedim(-3, -1)
        if bytes_given and pixels.is_contiguous():
            # Row by row, for three channels at a time are too few to vectorise.
            width = pixels.shape[-2]
            pixels.flatten(-2).sub_(mean.repeat(width)).div_(std.repeat(width))
            return images
        return (images - mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))

    def read(self, path: str | Path) -> tuple[Tensor, Tensor]:
        """An image file as networks take it, and as it is shown, in [0, 1].

        Both are ``[C, image_size, image_size]`` float32.

        Raises:
            FileNotFoundError: no such file.
            DamagedFileError: it is no image.
        """
        shown = as_numbers(F.pil_to_tensor(self.prepare(read_file(path, self.least))))
        return self.normalise(shown), shown

    @property
    def least(self) -> int:
        """Pixels of a file's shorter side that more would hardly make a difference to."""
        return 2 * (self.resize or self.image_size)

    def as_dict(self) -> dict[str, Any]:
        """What ``Preprocessing(**…)`` takes, of what JSON knows."""
        values = dataclasses.asdict(self)
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def read_file(path: str | Path, least: int | None = None) -> Image.Image:
    """An image file in RGB, see ``open_image``.

    Raises:
        FileNotFoundError: no such file.
        DamagedFileError: it is no image.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"image: {path} is missing, or no file")
    with reading(path, "an image"):
        return open_image(path, least)


def as_numbers(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Bytes as numbers in [0, 1]; what are numbers already is left as it is."""
    # As torchvision does it, to the last bit.
    return images if images.is_floating_point() else images.to(dtype).mul_(1 / 255)
