"""PICNN: a pathway that makes each filter of the target layer stand for a class."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from picnn_fast import checks
from picnn_fast.functional import bernoulli_mask, gumbel_mask
from picnn_fast.layers import with_target_layer
from picnn_fast.losses import check_output, cross_entropy
from picnn_fast.models.base import InterpretableNetwork
from picnn_fast.models.correspondence import Correspondence
from picnn_fast.ops.layout import whole


class PICNNOutput(NamedTuple):
    """What a forward pass yields. A named tuple, so that torch.compile, DDP and pytrees see inside.

    Attributes:
        logits: ``[B, K]`` of the discrimination pathway.
        masked_logits: ``[B, K]`` of the interpretation pathway.
        mask: ``[B, N]`` that masked the filters; carries the gradient to P and to the logits.
        pseudo_label: ``[B]`` int64 drawn from softmax(logits).
        maps: of the target layer, as ``filter_maps`` yields them.
    """

    logits: Tensor
    masked_logits: Tensor
    mask: Tensor
    pseudo_label: Tensor
    maps: Tensor


class PICNN(InterpretableNetwork):
    """A network whose filters are grouped into class-specific clusters as it trains.

    Beside the usual pathway, a second one classifies by the filters drawn for a pseudo-label:
    pseudo-label from softmax(logits), each filter kept with probability P[pseudo-label, filter].
    The correspondence matrix P = softmax(W) learns along by straight-through gradients.

    Args:
        features, head, num_classes, num_filters, channel_dim: see ``InterpretableNetwork``.
        in_channels: channels of ``features``: a new target layer is put after them, a convolution
            to ``num_filters`` channels. None inserts nothing.
        insert_kernel: side of that convolution's windows: 3, or 1, with a ninth of the weights.
        inserted_activation: behind the inserted convolution: "relu", or "none", as in the published
            code, where maps have both signs.
        normalization: of the correspondence matrix P, from free weights W: "class_softmax": over
            the classes, so that each filter's column sums to 1; "sigmoid": independent
            probabilities.
        initial: W of the correspondence matrix: "uniform" in [0, 1); "published": the softmax over
            the classes of such numbers, as in the authors' code, which makes P flatter.
        correspondence_lr: learning rate of the correspondence matrix; None follows the network's,
            as published. At 100 times the network's (tuned on the digits) P soon is near 0 and 1;
            on photographs the pattern of the mask alone then names the class.
        correspondence_weight_decay: of the correspondence matrix; None follows the optimiser's, as
            published.
        mask_at: where filters are masked: "maps", or "late", behind the pooling that the head
            starts with, where it is the same and takes less; "auto": late where possible.
        sampling: how masks are drawn: "bernoulli", or "gumbel": Gumbel-softmax at temperature 0.01,
            the paper's ablation (table 4), with normalization "class_softmax" alone. Masks of a
            given class are Bernoulli draws either way: a filter's chance in one row is the same.
        interpretation_loss_on: "correct": the interpretation pathway's cross entropy is the mean
            over the samples whose pseudo-label is the label (0 where there is none), as in the
            published code; "all": over all samples, as in the paper's text.
        interpretation_weight: of the interpretation pathway's loss, λ of eq. 3.

    Raises:
        TypeError, ValueError: see ``InterpretableNetwork``.

    Source:
        Guo, Yang, Yin, Chen, Ye, "PICNN: A Pathway towards Interpretable Convolutional Neural
        Networks", AAAI 2024, eq. 1-10. Masks come from torch's generator: ``torch.manual_seed``
        reproduces a run; distributed ranks make their Bernoulli draws apart even when they are
        seeded alike.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from picnn_fast.models import PICNN
        >>> _ = torch.manual_seed(0)
        >>> features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 4))
        >>> model = PICNN(features, head, num_classes=4, num_filters=20, in_channels=8)
        >>> optimizer = torch.optim.Adam(model.parameter_groups(lr=1e-3))
        >>> images, labels = torch.randn(2, 3, 16, 16), torch.tensor([0, 3])
        >>> output = model(images)
        >>> model.loss(output, labels).backward()
        >>> optimizer.step()
        >>> output.logits.shape, output.mask.shape, model.ownership().shape
        (torch.Size([2, 4]), torch.Size([2, 20]), torch.Size([4, 20]))
        >>> model.discriminator()(images).shape
        torch.Size([2, 4])
    """

    ownership_meaning: ClassVar[str] = (
        "correspondence matrix, learned: the probability that a filter is kept for a class"
    )

    def __init__(
        self,
        features: nn.Module,
        head: nn.Module,
        num_classes: int,
        num_filters: int,
        *,
        in_channels: int | None = None,
        insert_kernel: int = 3,
        inserted_activation: Literal["relu", "none"] = "relu",
        sampling: Literal["bernoulli", "gumbel"] = "bernoulli",
        normalization: Literal["class_softmax", "sigmoid"] = "class_softmax",
        initial: Literal["uniform", "published"] = "uniform",
        interpretation_loss_on: Literal["correct", "all"] = "correct",
        interpretation_weight: float = 2.0,
        correspondence_lr: float | None = None,
        correspondence_weight_decay: float | None = None,
        mask_at: Literal["auto", "maps", "late"] = "auto",
        channel_dim: int = 1,
    ) -> None:
        features = with_target_layer(
            features,
            in_channels,
            num_filters,
            activation=inserted_activation,
            channel_dim=channel_dim,
            kernel=insert_kernel,
        )
        super().__init__(
            features, head, num_classes, num_filters, mask_at=mask_at, channel_dim=channel_dim
        )
        self.correspondence = Correspondence(
            num_classes, num_filters, normalization=normalization, initial=initial
        )
        if correspondence_lr is not None:
            checks.positive("correspondence_lr", correspondence_lr)
        if correspondence_weight_decay is not None:
            checks.non_negative("correspondence_weight_decay", correspondence_weight_decay)
        self.correspondence_lr = correspondence_lr
        self.correspondence_weight_decay = correspondence_weight_decay
        self.sampling = checks.one_of("sampling", sampling, ("bernoulli", "gumbel"))
        if sampling == "gumbel" and normalization != "class_softmax":
            raise ValueError(
                f"normalization: got {normalization!r} with sampling='gumbel', want"
                " 'class_softmax': Gumbel-softmax draws one class for each filter"
            )
        self.interpretation_loss_on = checks.one_of(
            "interpretation_loss_on", interpretation_loss_on, ("correct", "all")
        )
        self.interpretation_weight = checks.non_negative(
            "interpretation_weight", interpretation_weight
        )

    def forward(self, images: Tensor, labels: Tensor | None = None) -> PICNNOutput:
        """Both pathways, in training and in evaluation alike (``discriminator()`` runs one alone).

        The labels are not used: the pseudo-label keeps them from leaking (paper, figure 4).
        """
        maps = self.filter_maps(images)
        shared, layers = self.masked_head.share(self.head, maps)
        logits = self.masked_head.classify(layers, shared)
        sample = bernoulli_mask if self.sampling == "bernoulli" else gumbel_mask
        # A softmax or a sigmoid yields probabilities: nothing to validate.
        masked, mask, pseudo_label = sample(
            shared, logits, self.correspondence(), channel_dim=self.channel_dim, validate=False
        )
        masked_logits = self.masked_head.classify(layers, masked)
        return PICNNOutput(logits, masked_logits, mask, pseudo_label, maps)

    def loss_terms(self, output: PICNNOutput, labels: Tensor) -> dict[str, Tensor]:
        """``discrimination`` (eq. 1) and ``interpretation`` (eq. 2, times λ); they sum to eq. 3."""
        check_output(output, PICNNOutput, labels, self.num_classes)
        discrimination = cross_entropy(output.logits, labels).mean()
        interpretation = cross_entropy(output.masked_logits, labels)
        if self.interpretation_loss_on == "correct":
            # Weights, not indexing: no host sync, no shape that depends on data, and every
            # parameter keeps a (zero) gradient where no pseudo-label is right.
            correct = output.pseudo_label == labels
            total = torch.where(correct, interpretation, 0.0).sum()
            interpretation = total / correct.sum().clamp_min(1)
        else:
            interpretation = interpretation.mean()
        return {
            "discrimination": discrimination,
            "interpretation": self.interpretation_weight * interpretation,
        }

    def ownership(self) -> Tensor:
        """P ``[K, N]``: the probability that a filter belongs to a class."""
        probabilities: Tensor = self.correspondence()
        return whole(probabilities.detach())

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """The network, and W apart, named "correspondence".

        Args:
            lr: of the network, and of W where ``correspondence_lr`` is None.
        """
        return self.correspondence.parameter_groups(
            super().parameter_groups(lr), self.correspondence_lr, self.correspondence_weight_decay
        )

    def options(self) -> Mapping[str, object]:
        return {
            "masks_late": self.masked_head.late,
            "channel_dim": self.channel_dim,
            "sampling": self.sampling,
            "interpretation_loss_on": self.interpretation_loss_on,
            "interpretation_weight": self.interpretation_weight,
        }
