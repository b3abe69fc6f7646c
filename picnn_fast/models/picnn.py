"""PICNN: a pathway that makes each filter of the target layer stand for a class."""

from typing import Any

import torch
from torch import Tensor, nn

from picnn_fast.functional import bernoulli_mask, gumbel_mask
from picnn_fast.models.base import InterpretableNetwork, PathwayOutput, cross_entropy
from picnn_fast.ops import checks


class PICNN(InterpretableNetwork):
    """A network whose filters are grouped into class-specific clusters as it trains.

    Beside the usual pathway, a second one classifies by the filters drawn for a pseudo-label:
    pseudo-label from softmax(logits), each filter kept with probability P[pseudo-label, filter].
    The correspondence matrix P = softmax(W) learns along by straight-through gradients.

    Args:
        features, head, num_classes, num_filters, in_channels, normalization, mask_at, channel_dim:
            see ``InterpretableNetwork``.
        sampling: "bernoulli", or "gumbel": Gumbel-softmax at temperature 0.01, the paper's
            ablation (table 4), for ``normalization="class_softmax"`` alone. ``class_mask`` is a
            Bernoulli draw either way: a filter's chance in one row is the same.
        interpretation_loss_on: "correct": the interpretation pathway's cross entropy is the mean
            over the samples whose pseudo-label is the label (0 where there is none), as in the
            published code; "all": over all samples, as in the paper's text.
        interpretation_weight: λ of eq. 3.

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
        >>> optimizer = torch.optim.Adam(model.parameter_groups(lr=1e-3, correspondence_lr=0.1))
        >>> images, labels = torch.randn(2, 3, 16, 16), torch.tensor([0, 3])
        >>> output = model(images)
        >>> model.loss(output, labels).backward()
        >>> optimizer.step()
        >>> output.logits.shape, output.mask.shape, model.masks_late
        (torch.Size([2, 4]), torch.Size([2, 20]), True)
        >>> model.discriminator()(images).shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        features: nn.Module,
        head: nn.Module,
        num_classes: int,
        num_filters: int,
        *,
        in_channels: int | None = None,
        sampling: str = "bernoulli",
        normalization: str = "class_softmax",
        interpretation_loss_on: str = "correct",
        interpretation_weight: float = 2.0,
        mask_at: str = "auto",
        channel_dim: int = 1,
    ) -> None:
        super().__init__(
            features,
            head,
            num_classes,
            num_filters,
            in_channels=in_channels,
            normalization=normalization,
            mask_at=mask_at,
            channel_dim=channel_dim,
        )
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

    def forward(self, images: Tensor, labels: Tensor | None = None) -> PathwayOutput:
        """Both pathways, in training and in evaluation alike (``discriminator()`` runs one alone).

        Args:
            images: ``[B, C, H, W]``, whatever ``features`` take.
            labels: not used; the pseudo-label keeps the label from leaking (paper, figure 4).

        Returns:
            All fields of ``PathwayOutput`` but ``activations``. ``mask`` carries the gradient to P
            and to the logits.
        """
        maps = self.filter_maps(images)
        shared, layers = self._shared_maps(maps)
        logits = self._classify(layers, shared, keep=True)
        sample = bernoulli_mask if self.sampling == "bernoulli" else gumbel_mask
        masked, mask, pseudo_label = sample(
            shared, logits, self.correspondence, channel_dim=self.channel_dim
        )
        return PathwayOutput(logits, self._classify(layers, masked), mask, pseudo_label, maps)

    def loss_terms(self, output: PathwayOutput, labels: Tensor) -> dict[str, Tensor]:
        """``discrimination`` (eq. 1) and ``interpretation`` (eq. 2, times λ); they sum to eq. 3.

        Args:
            output: of ``forward``.
            labels: ``[B]`` integers in [0, K).

        Raises:
            TypeError: labels that are not integers.
            ValueError: labels of another shape or out of range, or an output of another model.
        """
        logits, masked_logits, pseudo_label = (
            output.logits,
            output.masked_logits,
            output.pseudo_label,
        )
        if masked_logits is None or pseudo_label is None:
            raise ValueError(
                "output: got no masked_logits or pseudo_label, want the output of PICNN's forward"
            )
        checks.labels("labels", labels, len(logits), self.num_classes)
        discrimination = cross_entropy(logits, labels).mean()
        interpretation = cross_entropy(masked_logits, labels)
        if self.interpretation_loss_on == "correct":
            # Weights, not indexing: no host sync, no shape that depends on data, and every
            # parameter keeps a (zero) gradient where no pseudo-label is right.
            correct = pseudo_label == labels
            total = torch.where(correct, interpretation, 0.0).sum()
            interpretation = total / correct.sum().clamp_min(1)
        else:
            interpretation = interpretation.mean()
        return {
            "discrimination": discrimination,
            "interpretation": self.interpretation_weight * interpretation,
        }

    def extra_repr(self) -> str:
        options: dict[str, Any] = {
            "sampling": self.sampling,
            "interpretation_loss_on": self.interpretation_loss_on,
            "interpretation_weight": self.interpretation_weight,
        }
        own = ", ".join(f"{name}={value!r}" for name, value in options.items())
        return f"{super().extra_repr()}, {own}"
