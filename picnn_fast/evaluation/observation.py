"""A batch of images as the figures see it: what several of them need is computed once."""

from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from picnn_fast.data.loading import derive_seed
from picnn_fast.data.parts import PartSample
from picnn_fast.functional import draw_labels
from picnn_fast.models.base import InterpretableNetwork
from picnn_fast.models.gradients import class_activation

# Numbers that keep apart what is drawn for one batch.
_PSEUDO_LABEL, _PSEUDO_LABEL_MASK, _LABEL_MASK = range(3)


class Performed(NamedTuple):
    """Of a performer: maps of its target layer and top convolution, and logits ``[B, K]``."""

    target: Tensor
    top: Tensor | None
    logits: Tensor


class Observation:
    """Images of one batch, and what a network makes of them.

    Every draw follows from ``seed``, whichever process makes it, and none from torch's generator,
    which is left as it was.

    Args:
        network: in eval mode.
        images: ``[B, C, H, W]`` as the network takes them.
        labels: ``[B]`` integers in [0, K).
        seed: of the masks drawn; each batch wants one of its own.
        draws: S, masks drawn for each image.
        parts: the same images with their annotations, where the data has them.
    """

    def __init__(
        self,
        network: InterpretableNetwork,
        images: Tensor,
        labels: Tensor,
        *,
        seed: int,
        draws: int = 1,
        parts: PartSample | None = None,
    ) -> None:
        self.network, self.images, self.labels = network, images, labels
        self.seed, self.draws, self.parts = seed, draws, parts

    def select(self, rows: Tensor) -> "Observation":
        """Some images of the batch, with draws of their own.

        Args:
            rows: ``[B]`` bool, or ``[b]`` indices.
        """
        rows = rows.to(self.labels.device)
        fields: Any = self.parts  # collated, each has a row an image
        parts = None if fields is None else PartSample(*(field[rows] for field in fields))
        some = Observation(
            self.network,
            self.images[rows],
            self.labels[rows],
            seed=self.seed,
            draws=self.draws,
            parts=parts,
        )
        if "_encoded" in self.__dict__:  # what was computed is not computed again
            maps, bypass = self._encoded
            some.__dict__["_encoded"] = maps[rows], None if bypass is None else bypass[rows]
        return some

    @cached_property
    def _encoded(self) -> tuple[Tensor, Tensor | None]:
        return self.network.encode(self.images)

    @property
    def maps(self) -> Tensor:
        """Of the target layer, ``[B, N, h, w]`` or as the network's ``channel_dim`` says."""
        return self._encoded[0]

    @property
    def bypass(self) -> Tensor | None:
        """What reaches the head past the filters, see ``InterpretableNetwork.encode``."""
        return self._encoded[1]

    @cached_property
    def pooled(self) -> Tensor:
        """Spatial means of the maps, ``[B, N]``."""
        return pool(self.maps, self.network.channel_dim)

    @cached_property
    def logits(self) -> Tensor:
        """``[B, K]`` of all filters: the pathway of ACC1."""
        return self.network.head_logits(self.maps, bypass=self.bypass)

    @cached_property
    def class_activation(self) -> Tensor:
        """The class activation map of each image's label, ``[B, h, w]`` of either sign."""
        maps, bypass = self._encoded
        return class_activation(self.network, maps, self.labels[:, None], bypass)[:, 0]

    @cached_property
    def performed(self) -> Performed:
        """What the network that this one explains makes of the images."""
        performer = self.network.performer()
        if performer is None:
            raise ValueError(f"{type(self.network).__name__} explains no other network")
        target = performer.target(self.images)
        top = None if performer.top is None else performer.top(target)
        # The rest may write in place.
        return Performed(target, top, performer.rest((target if top is None else top).clone()))

    @cached_property
    def pseudo_label_masks(self) -> Tensor:
        """``[S, B, N]`` drawn for pseudo-labels, themselves drawn from the softmax of ``logits``
        (PICNN, eq. 7 to 10)."""
        each = []
        for draw in range(self.draws):
            seed = derive_seed(self.seed, _PSEUDO_LABEL, draw)
            label = draw_labels(self.logits, seed=seed, rank=0)
            seed = derive_seed(self.seed, _PSEUDO_LABEL_MASK, draw)
            each.append(self.network.class_mask(label, seed=seed, rank=0))
        return stacked(each)

    @cached_property
    def label_masks(self) -> Tensor:
        """``[S, B, N]`` drawn for the true labels."""
        seeds = [derive_seed(self.seed, _LABEL_MASK, draw) for draw in range(self.draws)]
        return stacked([self.network.class_mask(self.labels, seed=seed, rank=0) for seed in seeds])

    @cached_property
    def masked_logits(self) -> Tensor:
        """``[S, B, K]`` by the filters drawn for the pseudo-label: the pathway of ACC2."""
        masks = self.pseudo_label_masks
        return stacked([self.network.head_logits(self.maps, mask) for mask in masks])

    @cached_property
    def complement_logits(self) -> Tensor:
        """``[S, B, K]`` without the filters drawn for the true label: the pathway of ACC3."""
        masks = 1 - self.label_masks
        return stacked([self.network.head_logits(self.maps, mask) for mask in masks])


def stacked(each: list[Tensor]) -> Tensor:
    """``torch.stack``, of a single one, the usual number of draws, without a copy."""
    return each[0][None] if len(each) == 1 else torch.stack(each)


def pool(maps: Tensor, channel_dim: int) -> Tensor:
    """Global average pooling to ``[B, N]``, wherever the filter axis is.

    In float32 at least: means rounded to a half type would tie.
    """
    dtype = torch.promote_types(maps.dtype, torch.float32)
    return maps.movedim(channel_dim, 1).flatten(2).mean(-1, dtype=dtype)
