"""Decoded images kept in memory, once for all processes that read them."""

import math
import mmap
import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from picnn_fast import checks

SHARE = 0.25  # of the memory that is free
_WAIT = 5.0  # seconds for another process to take its place


class ImageMemory:
    """So many bytes, which processes that are forked from the one that made it share.

    The system's memory is taken image by image as they are kept. A copy for another process, such
    as one that is not forked, has none.

    Args:
        size: bytes, at most; none where the system does not grant them or cannot fork.

    Example:
        >>> import numpy as np
        >>> from picnn_fast.data.memory import ImageMemory
        >>> shelf = ImageMemory(100).shelf(10)
        >>> shelf.keep(3, np.ones((4, 4, 3), np.uint8)), shelf.keep(4, np.ones((5, 5, 3), np.uint8))
        (True, False)
        >>> shelf.get(3).shape, shelf.get(4)
        ((4, 4, 3), None)
    """

    def __init__(self, size: int) -> None:
        self.size = 0
        if size > 0 and "fork" in multiprocessing.get_all_start_methods():
            try:
                # No file in /dev/shm, which is small in containers.
                self.pixels = np.frombuffer(mmap.mmap(-1, size), np.uint8)
            except (OSError, ValueError, OverflowError):
                return
            self.size = size
            self._taken = np.frombuffer(mmap.mmap(-1, 8), np.int64)
            self._lock = multiprocessing.get_context("fork").Lock()

    @property
    def taken(self) -> int:
        """Bytes that images take."""
        return int(self._taken[0]) if self.size else 0

    def shelf(self, count: int) -> "Shelf":
        """A place for the images of one set."""
        return Shelf(self, count)

    def take(self, size: int) -> int | None:
        """The beginning of so many bytes, or None where there are too few."""
        if self.taken + size > self.size or not self.acquire():
            return None
        try:
            start = self.taken
            if start + size > self.size:
                return None
            self._taken[0] = start + size
            return start
        finally:
            self.release()

    def acquire(self) -> bool:
        """Whether no other process takes or notes something now, nor was killed when it did."""
        return self._lock.acquire(timeout=_WAIT)

    def release(self) -> None:
        self._lock.release()

    def __reduce__(self) -> Any:
        return ImageMemory, (0,)


class Shelf:
    """The images of one set that are kept, by their index.

    Args:
        memory: where they are.
        count: of the set.
    """

    def __init__(self, memory: ImageMemory, count: int) -> None:
        self.memory, self.count = memory, count
        if memory.size:
            # Of each image where it ends, its height and its width; an end of 0: it is not there.
            places = np.frombuffer(mmap.mmap(-1, max(count, 1) * 3 * 8), np.int64)
            self._places = places.reshape(-1, 3)

    def get(self, index: int) -> NDArray[np.uint8] | None:
        """``[H, W, 3]``, or None where it is not kept; not to be written to."""
        if not self.memory.size:
            return None
        end, height, width = self._places[index].tolist()
        if 0 in (end, height, width):
            return None
        return self.memory.pixels[end - height * width * 3 : end].reshape(height, width, 3)

    def keep(self, index: int, image: NDArray[np.uint8]) -> bool:
        """Whether there was room for ``[H, W, 3]``."""
        start = self.memory.take(image.size) if self.memory.size else None
        if start is None:
            return False
        self.memory.pixels[start : start + image.size] = image.ravel()
        self._places[index, 1:] = image.shape[:2]
        # The lock also orders what other processors see: the image is there before its place is.
        if not self.memory.acquire():
            return False
        self._places[index, 0] = start + image.size
        self.memory.release()
        return True

    def __reduce__(self) -> Any:
        return Shelf, (self.memory, self.count)


def free_memory() -> int:
    """Bytes that this process may still take, as far as the system tells; else 0."""
    free = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    except OSError:
        names = getattr(os, "sysconf_names", {})
        if "SC_PHYS_PAGES" in names:
            free.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            group = Path("/sys/fs/cgroup")
            most, now = ((group / name).read_text(encoding="ascii") for name in (limit, used))
            free.append(int(most) - int(now))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return max(min(free, default=0), 0)


def bound(cache: float | None) -> float | None:
    """
    Raises:
        TypeError, ValueError: no number of gigabytes.
    """
    return None if cache is None else checks.non_negative("cache", cache)


def image_memory(gigabytes: float | None, processes: int) -> ImageMemory:
    """Memory for one of so many processes that read the same images on a machine.

    Args:
        gigabytes: for all of them; None: a quarter of what is free.
        processes: each of which has its own.
    """
    size = free_memory() * SHARE if gigabytes is None else gigabytes * 1e9
    return ImageMemory(math.floor(size / processes))
