"""Handwritten digits that come with scikit-learn: no download."""

from typing import Any

import torch
from torch.utils.data import TensorDataset

from picnn_fast import checks
from picnn_fast._extras import extra
from picnn_fast.data.loading import SeededDataModule, readers, shift
from picnn_fast.data.preprocessing import Preprocessing

IMAGE_SIZE = 8
_SPLIT_SEED = 0


class DigitsDataModule(SeededDataModule):
    """Handwritten digits, 1797 grey ones of 8x8 in 10 classes: 1437 to train on, 360 to test on.

    The split is stratified and always the same; images are ``[1, 8, 8]`` float32 in [0, 1], labels
    int64.

    Args:
        batch_size: images a step (a process, when there are several).
        seed: of the order of the images, and of the shifts.
        max_shift: training images move by up to this many pixels along each axis, filled with 0.
        augment: False leaves training images where they are, whatever max_shift.
        validation: share of the training images held out to validate on.
        validation_seed: of the choice of the images held out.
        num_workers: processes that read images; None: 0, fastest for images in memory.

    Raises:
        ValueError: an argument is out of range.

    Source:
        UCI "Optical Recognition of Handwritten Digits", as ``sklearn.datasets.load_digits``.

    Example:
        >>> from picnn_fast.data import DigitsDataModule
        >>> data = DigitsDataModule(batch_size=64)
        >>> images, labels = next(iter(data.train_dataloader()))
        >>> images.shape, labels.shape
        (torch.Size([64, 1, 8, 8]), torch.Size([64]))
    """

    num_classes = 10
    in_channels = 1
    preprocessing = Preprocessing(IMAGE_SIZE, channels=1)

    def __init__(
        self,
        batch_size: int = 64,
        *,
        seed: int = 0,
        max_shift: int = 1,
        augment: bool = True,
        validation: float = 0.1,
        validation_seed: int = 0,
        num_workers: int | None = None,
    ) -> None:
        workers = readers(num_workers, in_memory=True)
        super().__init__(batch_size, workers, seed, validation, validation_seed)
        if not 0 <= max_shift < IMAGE_SIZE:
            raise ValueError(f"max_shift: got {max_shift}, want 0 to {IMAGE_SIZE - 1} pixels")
        self.max_shift = max_shift if checks.boolean("augment", augment) else 0
        self.class_names = [str(digit) for digit in range(10)]
        with extra("train"):
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        pixels, labels = load_digits(return_X_y=True)
        images = torch.from_numpy(pixels).float().view(-1, 1, IMAGE_SIZE, IMAGE_SIZE) / 16
        targets = torch.from_numpy(labels).long()
        train, test = train_test_split(
            range(len(targets)), test_size=0.2, stratify=labels, random_state=_SPLIT_SEED
        )
        self.test_set = TensorDataset(images[test], targets[test])
        kept, out = self.hold_out(targets[train].tolist())
        images, targets = images[train], targets[train]
        self.train_set = TensorDataset(images[kept], targets[kept])
        if out:
            self.validation_set = TensorDataset(images[out], targets[out])

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Random shifts, in training only; drawn from torch's generator."""
        if self.max_shift == 0 or self.trainer is None or not self.trainer.training:
            return batch
        images, labels = batch
        return shift(images, self.max_shift), labels
