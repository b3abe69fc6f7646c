"""Files of data sets, read with care: one that cannot be read is named."""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO
from urllib.error import URLError

import numpy as np

from picnn_fast import checks
from picnn_fast._extras import extra

with extra("train"):
    from filelock import FileLock
    from PIL import Image, ImageOps


class DamagedFileError(ValueError, OSError):
    """A file of a data set that is there but cannot be read as what it should be."""


def need(path: Path, download: str) -> None:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; want {download}")


@contextmanager
def reading(path: Path | str, kind: str, download: str | None = None) -> Iterator[None]:
    """An error of a parser becomes a DamagedFileError, which names the file.

    Args:
        path: of the file.
        kind: what it should be.
        download: what to get where it is missing or damaged; None where there is no such thing.
    """
    if download is not None:
        need(Path(path), download)
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        advice = "" if download is None else f"; it may be damaged, want {download}"
        raise DamagedFileError(f"{path} cannot be read as {kind} ({error}){advice}") from error


@contextmanager
def fetching(root: Path, download: bool, want: str, *, there: bool = False) -> Iterator[None]:
    """Where torchvision fetches a data set, one process at a time.

    Args:
        root: to fetch it to.
        download: whether it may.
        want: what is wanted, and where it is to be had.
        there: whether nothing has to be fetched.

    Raises:
        TypeError: ``download`` is no bool.
        FileNotFoundError: it is not there, or not whole, or cannot be fetched.
    """
    lock: AbstractContextManager[Any] = nullcontext()
    if checks.boolean("download", download) and not there:
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / ".download.lock")
    try:
        with lock:
            if not (there or download or root.is_dir()):
                raise RuntimeError("missing")
            yield
    except (RuntimeError, URLError) as error:
        if download:
            text = f"root: {root} cannot be filled ({error}); want {want}"
        else:
            text = f"root: {root} is missing, or not whole; want {want}, or download true"
        raise FileNotFoundError(text) from error


def lines(path: Path) -> list[str]:
    """The lines of a table that hold something, whatever system wrote it."""
    return [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]


def open_image(file: str | Path | BinaryIO, least: int | None = None) -> Image.Image:
    """An image of three colours of 8 bits, upright as its EXIF tag says.

    Pillow's limit holds: above 179 million pixels an image is refused.

    Args:
        file: path, or the content.
        least: pixels that are enough of the shorter side. A JPEG of twice as many or more is
            decoded at a half, a quarter or an eighth of its size, which takes as much less time.

    Raises:
        ValueError: its numbers are of a type whose range tells nothing, such as float.
        Exception: of many kinds, by Pillow: it is no image, cut short, or too large.
    """
    with warnings.catch_warnings():
        # Half of the limit is a large photograph; the warning would not say which.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(file) as image:
            if least is not None and image.format == "JPEG":
                scale = max(min(image.size) / least, 1)
                image.draft(image.mode, (int(image.width / scale), int(image.height / scale)))
            ImageOps.exif_transpose(image, in_place=True)
            return rgb(image)


def rgb(image: Image.Image) -> Image.Image:
    """An image of three colours of 8 bits; 16 bits of grey are scaled to 8.

    Raises:
        ValueError: its numbers are of a type whose range tells nothing, such as float.
    """
    if image.mode == "RGB":
        image.load()
        return image
    # Of 16 bits too, as Pillow reads some formats.
    wide = image.mode == "I" and image.format in ("PNG", "PPM")
    if wide or image.mode.startswith("I;16"):
        return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("F", "I"):
        raise ValueError(f"its pixels are of Pillow's mode {image.mode!r}, of no known range")
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # else Pillow warns
    return image.convert("RGB")
