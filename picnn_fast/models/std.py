"""STD: the ordinary network that interpretable ones are compared with."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from picnn_fast import checks
from picnn_fast.backbones import cut_trained
from picnn_fast.layers import with_target_layer
from picnn_fast.losses import check_output, cross_entropy
from picnn_fast.models.base import InterpretableNetwork
from picnn_fast.models.correspondence import Correspondence

# Of the greatest logit: what cutting a network may change by rounding alone.
_ROUNDING = 1e-3


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

    Attributes:
        layer: of ``as_std``: the layer whose maps are measured; else None.

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

    ownership_meaning: ClassVar[str] = (
        "correspondence matrix, random and not trained: what a method has to beat"
    )
    layer: str | None = None

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


def as_std(
    network: Any, images: Tensor, *, num_classes: int | None = None, layer: str | None = None
) -> STD:
    """A plain classifier, trained anywhere, to be measured as it is.

    Nothing of it is made anew: its layers are used in place and its logits stay what they are. As
    of any STD the correspondence matrix is random, drawn from torch's generator, so that ACC2 and
    ACC3 are those of filters dropped at random.

    Args:
        network: images to logits, a module that ``torch.fx`` can trace down to ``layer``, or that
            has ``forward_features`` and ``forward_head``, as timm's; or a pair ``(features,
            head)`` of modules: images to maps, maps to logits. It is left in eval mode, in which
            alone it is to be used.
        images: ``[B, C, H, W]`` as the network takes them, to try it on.
        num_classes: K, where it has to be that; None: as many as the logits have.
        layer: name of the module whose maps are measured, as "layer4", see
            ``picnn_fast.backbones.split``. None: between the halves of timm's networks, where
            torchvision's of known families are cut, else the last convolutional maps
            (``picnn_fast.backbones.last_maps``).

    Returns:
        An STD of N filters, the channels of those maps, on the device of the network.

    Raises:
        TypeError: no module, or one that yields no maps.
        ValueError: no such layer, one that others bypass, a network that cannot be traced, another
            number of classes, or logits that the cut would change.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from picnn_fast.models import as_std
        >>> layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        >>> network = nn.Sequential(*layers, nn.Linear(8, 5))
        >>> model = as_std(network, torch.randn(1, 3, 16, 16))
        >>> model.num_filters, model.num_classes
        (8, 5)
    """
    pair = isinstance(network, tuple | list) and len(network) == 2
    named = dict(zip(("features", "head"), network, strict=True)) if pair else {"network": network}
    for name, module in named.items():
        checks.module(name, module)
        module.eval()
    if pair:
        checks.left_out("a pair (features, head)", layer=(layer, None))
    whole = nn.Sequential(*network) if pair else network
    with torch.no_grad():
        logits = whole(images)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"network: yielded {got}, want logits [B, K]")
    classes = logits.shape[1]
    if num_classes not in (None, classes):
        raise ValueError(f"num_classes: got {num_classes}, want {classes}, those of the network")
    parts = None if pair else cut_trained(network, images, layer)
    features, head = network if parts is None else (parts.features, parts.own_head())
    with torch.no_grad():
        maps = features(images)
    checks.tensor("features", maps)
    channel_dim = 1 if parts is None else parts.channel_dim(maps.shape)
    model = STD(features, head, classes, maps.shape[channel_dim], channel_dim=channel_dim)
    model = model.to(images.device).eval()
    with torch.no_grad():
        change = (model.head_logits(maps) - logits).abs().max()
    if change > _ROUNDING * logits.abs().max():
        raise ValueError(
            f"network: cut in two it yields logits that differ by {change.item():.2g}, want one"
            " that computes the same whenever it is run, or a pair (features, head) of modules"
        )
    model.layer = None if parts is None else parts.layer
    return model
