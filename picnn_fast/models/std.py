"""STD: the ordinary network that interpretable ones are compared with."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

from torch import Tensor, nn

from picnn_fast.layers import with_target_layer
from picnn_fast.losses import check_output, cross_entropy
from picnn_fast.models.base import InterpretableNetwork
from picnn_fast.models.correspondence import Correspondence


class STDOutput(NamedTuple):
    """What a forward pass yields: logits ``[B, K]`` and the target layer's maps."""

    logits: Tensor
    maps: Tensor


class STD(InterpretableNetwork):
    """The same network trained by cross entropy alone; its correspondence matrix stays random.

    P is drawn as PICNN's is at the start and never trained, so that ``class_mask`` and
    ``head_logits`` measure ACC2 and ACC3 of an ordinary network, as in the papers' STD rows.

    Args:
        features, head, num_classes, num_filters, channel_dim: see ``InterpretableNetwork``.
        in_channels: channels of ``features``: a new target layer is put after them, a convolution
            to ``num_filters`` channels. None inserts nothing.
        insert_kernel: side of that convolution's windows: 3, or 1, with a ninth of the weights.
        inserted_activation: behind the inserted convolution: "relu", or "none", as in PICNN's
            published code.
        normalization: of the random correspondence matrix P: "class_softmax": over the classes, so
            that each filter's column sums to 1; "sigmoid": independent probabilities.
        initial: "uniform": P is made of numbers uniform in [0, 1); "published": of their softmax,
            as in PICNN's published code, which makes it flatter.
        mask_at: where filters are masked to measure them: "maps", or "late", behind the pooling
            that the head starts with, where it is the same and takes less; "auto": late where
            possible.

    Raises:
        TypeError, ValueError: see ``InterpretableNetwork``.

    Source:
        The baseline of Guo et al., "PICNN", AAAI 2024, section "Comparison with Existing Methods".

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from picnn_fast.models import STD
        >>> features = nn.Sequential(nn.Conv2d(3, 20, 3), nn.ReLU())
        >>> head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 4))
        >>> model = STD(features, head, num_classes=4, num_filters=20)
        >>> images, labels = torch.randn(2, 3, 16, 16), torch.tensor([0, 3])
        >>> model.loss(model(images), labels).backward()
        >>> complement = 1 - model.class_mask(labels, seed=0)
        >>> model.head_logits(model.filter_maps(images), complement).shape
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
        insert_kernel: int = 3,
        inserted_activation: Literal["relu", "none"] = "relu",
        normalization: Literal["class_softmax", "sigmoid"] = "class_softmax",
        initial: Literal["uniform", "published"] = "uniform",
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
            num_classes,
            num_filters,
            normalization=normalization,
            initial=initial,
            trained=False,
        )

    def forward(self, images: Tensor, labels: Tensor | None = None) -> STDOutput:
        """Logits and maps; the labels are not used."""
        maps = self.filter_maps(images)
        return STDOutput(self.head_logits(maps), maps)

    def loss_terms(self, output: STDOutput, labels: Tensor) -> dict[str, Tensor]:
        """``discrimination`` alone: the mean cross entropy of the logits."""
        check_output(output, STDOutput, labels, self.num_classes)
        return {"discrimination": cross_entropy(output.logits, labels).mean()}

    def ownership(self) -> Tensor:
        """P ``[K, N]``, random."""
        probabilities: Tensor = self.correspondence()
        return probabilities

    def options(self) -> Mapping[str, object]:
        return {"masks_late": self.masked_head.late, "channel_dim": self.channel_dim}
