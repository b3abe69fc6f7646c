"""STD: the ordinary network that interpretable ones are compared with."""

import torch
from torch import Tensor

from picnn_fast.models.base import InterpretableNetwork, PathwayOutput, cross_entropy
from picnn_fast.ops import checks


class STD(InterpretableNetwork):
    """The same network trained by cross entropy alone; its correspondence matrix stays random.

    P is drawn as PICNN's is at the start and never trained (a buffer), so that ``class_mask`` and
    ``head_logits`` measure ACC2 and ACC3 of an ordinary network, as in the papers' STD rows.

    Args:
        features, head, num_classes, num_filters, in_channels, normalization, mask_at, channel_dim:
            see ``InterpretableNetwork``.

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

    def _make_correspondence(self) -> None:
        """Make W, a buffer."""
        weight = torch.rand(self.num_classes, self.num_filters)
        self.register_buffer("correspondence_weight", weight)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> PathwayOutput:
        """The logits and the maps; the other fields of ``PathwayOutput`` are empty.

        Args:
            images: ``[B, C, H, W]``, whatever ``features`` take.
            labels: not used.
        """
        maps = self.filter_maps(images)
        return PathwayOutput(self.head_logits(maps), maps=maps)

    def loss_terms(self, output: PathwayOutput, labels: Tensor) -> dict[str, Tensor]:
        """``discrimination`` alone: the mean cross entropy of the logits.

        Args:
            output: of ``forward``.
            labels: ``[B]`` integers in [0, K).

        Raises:
            TypeError: labels that are not integers.
            ValueError: labels of another shape or out of range.
        """
        checks.labels("labels", labels, len(output.logits), self.num_classes)
        return {"discrimination": cross_entropy(output.logits, labels).mean()}
