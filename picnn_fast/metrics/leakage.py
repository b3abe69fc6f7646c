"""Mask leakage: what the pattern of a mask alone tells of the class."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from picnn_fast.metrics.pathway import MeanOverDraws
from picnn_fast.ops import checks


class MaskLeakage(Metric):
    """Accuracy when the maps of another image carry the mask drawn for this image's label.

    A mask that tells nothing by itself gives chance: the share of pairs of images that are of one
    class, whose maps name the class themselves. 1 says that the pattern of the mask names the
    class, whatever the maps hold; ACC2 is then no accuracy of the maps.

    The other image is drawn from as many as the first batch held, each image seen so far as likely
    as any other, so that images sorted by class are paired across classes too. Pairs of one class
    and pairs of two are counted apart and weighed by how many of each the whole set holds.

    Args:
        num_classes: K.
        draws: S, masks drawn for each image.
        seed: of the pairs.
        **kwargs: of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> from picnn_fast.metrics import MaskLeakage
        >>> metric = MaskLeakage(num_classes=2)
        >>> labels = torch.tensor([0, 1, 0, 1])
        >>> masks = torch.eye(2)[labels][None]  # one filter a class
        >>> metric.update(torch.ones(4, 2), labels, masks, lambda maps, mask: maps * mask)
        >>> metric.compute().mean.item()
        1.0
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    correct: Tensor
    pairs: Tensor
    images: Tensor

    def __init__(self, num_classes: int, draws: int = 1, *, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_classes = checks.integer("num_classes", num_classes, 1)
        self.draws = checks.integer("draws", draws, 1)
        self.seed = checks.integer("seed", seed, 0)
        # Of pairs of two classes, then of pairs of one.
        counts = {"correct": (draws, 2), "pairs": (2,), "images": (num_classes,)}
        for name, shape in counts.items():
            zeros = torch.zeros(shape, dtype=torch.int64)
            self.add_state(name, zeros, dist_reduce_fx="sum")
        self._forget()

    def _forget(self) -> None:
        self._kept: tuple[Tensor, Tensor] | None = None
        self._seen = 0
        self._generator = torch.Generator().manual_seed(self.seed)

    def reset(self) -> None:
        super().reset()
        self._forget()

    def update(
        self,
        maps: Tensor,
        labels: Tensor,
        masks: Tensor,
        classify: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        """Add a batch.

        Args:
            maps: ``[B, …]`` of each image.
            labels: ``[B]`` integers in [0, K).
            masks: ``[S, B, N]`` of each draw, for each image's label, or pseudo-label.
            classify: maps and a mask ``[B, N]`` to logits ``[B, K]``.

        Raises:
            TypeError: not tensors, or of the wrong dtype.
            ValueError: of another shape, or labels out of range.
        """
        checks.tensor("maps", maps)
        checks.labels("labels", labels, len(maps), self.num_classes)
        checks.floating("masks", masks)
        if masks.ndim != 3 or tuple(masks.shape[:2]) != (self.draws, len(maps)):
            raise ValueError(
                f"masks: got shape {tuple(masks.shape)}, want [{self.draws}, {len(maps)}, filters]:"
                " draws and the batch of maps"
            )
        if len(maps) == 0:
            return
        self.images += labels.bincount(minlength=self.num_classes).to(self.images.device)
        if self._kept is None:
            if len(maps) > 1:
                shift = self._draw(1, len(maps))
                self._count(maps.roll(shift, 0), labels.roll(shift), labels, masks, classify)
            self._kept = maps.clone(), labels.clone()
        else:
            other = torch.randint(len(self._kept[0]), (len(maps),), generator=self._generator)
            other = other.to(maps.device)
            self._count(self._kept[0][other], self._kept[1][other], labels, masks, classify)
            for at in range(len(maps)):
                place = self._draw(0, self._seen + at + 1)
                if place < len(self._kept[0]):
                    self._kept[0][place], self._kept[1][place] = maps[at], labels[at]
        self._seen += len(maps)

    def _draw(self, low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=self._generator))

    def _count(
        self,
        maps: Tensor,
        labels_of_maps: Tensor,
        labels: Tensor,
        masks: Tensor,
        classify: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        same = labels_of_maps == labels
        kinds = torch.stack([~same, same])
        self.pairs += kinds.sum(1).to(self.pairs.device)
        for draw, mask in enumerate(masks):
            right = classify(maps, mask).argmax(-1) == labels
            self.correct[draw] += (right & kinds).sum(1).to(self.correct.device)

    def compute(self) -> MeanOverDraws:
        """Scalars; a mean in [0, 1], NaN where no two images of different classes were paired."""
        shares = self.images.double() / self.images.sum()
        one_class = shares.square().sum()
        apart, together = (self.correct.double() / self.pairs).unbind(1)
        # So few pairs of one class that none was drawn weigh next to nothing.
        together = torch.where(self.pairs[1] == 0, apart, together)
        return MeanOverDraws.of((1 - one_class) * apart + one_class * together)
