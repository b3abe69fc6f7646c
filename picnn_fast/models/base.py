"""What every interpretable network offers: ``features``, ``head`` and one protocol."""

import abc
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from picnn_fast.functional import bernoulli_mask, class_gate
from picnn_fast.ops import checks

# Per-channel reductions that carry a non-negative scale of a channel through: pool(z * H) =
# z * pool(H) for z >= 0. Averages are linear; a maximum only moves with the scale (padding is
# -inf, never the maximum). Value: the spatial axes they reduce.
_POOLING: dict[type[nn.Module], int] = {
    nn.AdaptiveAvgPool1d: 1,
    nn.AdaptiveAvgPool2d: 2,
    nn.AdaptiveAvgPool3d: 3,
    nn.AdaptiveMaxPool1d: 1,
    nn.AdaptiveMaxPool2d: 2,
    nn.AdaptiveMaxPool3d: 3,
    nn.AvgPool1d: 1,
    nn.AvgPool2d: 2,
    nn.AvgPool3d: 3,
    nn.MaxPool1d: 1,
    nn.MaxPool2d: 2,
    nn.MaxPool3d: 3,
}


class PathwayOutput(NamedTuple):
    """What a forward pass yields. A named tuple, so that torch.compile, DDP and pytrees see inside.

    Attributes:
        logits: ``[B, K]`` of the discrimination pathway.
        masked_logits: ``[B, K]`` of the interpretation pathway, None where the method has none.
        mask: ``[B, N]`` that masked the filters, None where the method has none.
        pseudo_label: ``[B]`` int64 drawn from softmax(logits), None where the method draws none.
        maps: of the target layer, as ``filter_maps`` yields them.
        activations: maps of the layers that have a filter loss, before their mask layer, one after
            the other; empty where the method has none.
    """

    logits: Tensor
    masked_logits: Tensor | None = None
    mask: Tensor | None = None
    pseudo_label: Tensor | None = None
    maps: Tensor | None = None
    activations: tuple[Tensor, ...] = ()


def _layers(module: nn.Module) -> list[nn.Module]:
    """The layers of (nested) plain ``nn.Sequential``; a subclass may run them otherwise."""
    if type(module) is not nn.Sequential:
        return [module]
    return [layer for child in module for layer in _layers(child)]


def split_pooling(head: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """The per-channel spatial pooling a head starts with, and the layers after it.

    Returns:
        Two lists of layers to run one after the other; the first is empty where the head does not
        start with pooling that commutes with a mask per channel.
    """
    layers = _layers(head)
    last = 0
    for position, layer in enumerate(layers, start=1):
        if type(layer) in _POOLING and not getattr(layer, "return_indices", False):
            last = position
        elif type(layer) is not nn.Identity:
            break
    return layers[:last], layers[last:]


def _module(name: str, value: object) -> None:
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name}: got {type(value).__name__}, want a torch.nn.Module")


class InterpretableNetwork(nn.Module, abc.ABC):
    """A classifier cut in two at its target layer, with a filter-class correspondence matrix.

    Shapes: B batch, K classes, N filters (channels of the target layer).

    Args:
        features: images to the maps of the target layer after its activation, ``[B, N, h, w]``;
            or the maps that the inserted convolution takes, where ``in_channels`` is given.
        head: the maps to logits ``[B, K]``.
        num_classes: K.
        num_filters: N; what ``features`` yield, unless a convolution is inserted.
        in_channels: channels of ``features``: a new target layer is put after them, a 3x3
            convolution (padding 1, with bias, no batch norm) to ``num_filters`` channels and a
            ReLU. None inserts nothing.
        normalization: "class_softmax": P = softmax of W over the classes, each filter's column
            sums to 1; "sigmoid": P = sigmoid(W), independent probabilities.
        mask_at: where the maps are masked. "maps": on the target layer's maps. "late": after the
            pooling ``head`` starts with, which it passes unchanged, at 1/(h·w) of the work; needs
            ``head`` to be an ``nn.Sequential`` (nested ones included) that starts with average or
            max pooling. "auto": late where possible. See Note.
        channel_dim: the filter axis of the maps, e.g. -1 for the tokens ``[B, T, N]`` of a ViT.

    Attributes:
        features, head: the two parts; ``head(features(images))`` are the logits.
        num_classes, num_filters: K and N.
        correspondence_weight: W ``[K, N]``, uniform in [0, 1) at the start, as in the published
            code; None where the method assigns filters otherwise.
        epoch: of the training, from 1; the training loop sets it, for methods whose loss has a
            schedule.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an argument out of range; at the first forward, maps or logits whose sizes
            disagree with ``num_filters`` or ``num_classes``.

    Note:
        Late masking gives the same logits always, and the same gradients behind average pooling.
        Behind max pooling the gradient of a *dropped* filter's probability is max(H), the
        derivative of max(z·H) = z·max(H) at z = 0 from above; masking the maps yields a tie of
        zeros there, of which autograd takes an arbitrary position.

        While ``masks_late``, hooks on ``head`` itself do not run, hooks on its layers do.
    """

    epoch: int = 1
    correspondence_weight: Tensor | None

    def __init__(
        self,
        features: nn.Module,
        head: nn.Module,
        num_classes: int,
        num_filters: int,
        *,
        in_channels: int | None = None,
        normalization: str = "class_softmax",
        mask_at: str = "auto",
        channel_dim: int = 1,
    ) -> None:
        super().__init__()
        _module("features", features)
        _module("head", head)
        self.num_classes = checks.integer("num_classes", num_classes, 1)
        self.num_filters = checks.integer("num_filters", num_filters, 1)
        self.normalization = checks.one_of(
            "normalization", normalization, ("class_softmax", "sigmoid")
        )
        self.mask_at = checks.one_of("mask_at", mask_at, ("auto", "maps", "late"))
        if isinstance(channel_dim, bool) or not isinstance(channel_dim, int):
            raise TypeError(f"channel_dim: got {type(channel_dim).__name__}, want an int")
        if channel_dim == 0:
            raise ValueError("channel_dim: got 0, the batch axis; want the filter axis of the maps")
        self.channel_dim = channel_dim
        if in_channels is not None:
            checks.integer("in_channels", in_channels, 1)
            if channel_dim != 1:
                raise ValueError(
                    f"in_channels: got {in_channels} with channel_dim={channel_dim}, want None:"
                    " the inserted convolution takes maps [B, N, h, w]"
                )
            conv = nn.Conv2d(in_channels, num_filters, kernel_size=3, padding=1)
            features = nn.Sequential(features, conv, nn.ReLU())
        self.features = features
        self.head = head
        if mask_at == "late" and not self.masks_late:
            start = next((type(layer).__name__ for layer in _layers(head)), "nothing")
            raise ValueError(
                f"mask_at: got 'late' with a head that starts with {start} and"
                f" channel_dim={channel_dim}, want a head that is an nn.Sequential starting with"
                " average or max pooling, and channel_dim=1; or mask_at='auto'"
            )
        self._make_correspondence()

    def _make_correspondence(self) -> None:
        """Make W."""
        self.correspondence_weight = nn.Parameter(torch.rand(self.num_classes, self.num_filters))

    @abc.abstractmethod
    def forward(self, images: Tensor, labels: Tensor | None = None) -> PathwayOutput:
        """Both pathways, where the method has two.

        Args:
            images: ``[B, C, H, W]``, whatever ``features`` take.
            labels: ``[B]`` integers, for methods that select filters by the true label.
        """

    @abc.abstractmethod
    def loss_terms(self, output: PathwayOutput, labels: Tensor) -> dict[str, Tensor]:
        """The terms of the loss by name, scalars, each weighted as it enters the sum.

        Args:
            output: of ``forward``.
            labels: ``[B]`` integers in [0, K).

        Raises:
            TypeError: labels that are not integers.
            ValueError: labels of another shape or out of range.
        """

    def loss(self, output: PathwayOutput, labels: Tensor) -> Tensor:
        """The sum of ``loss_terms``: a scalar, float32 or wider."""
        return torch.stack(list(self.loss_terms(output, labels).values())).sum()

    @property
    def correspondence(self) -> Tensor:
        """P ``[K, N]``: the probability that a filter belongs to a class; float32 or wider."""
        assert self.correspondence_weight is not None
        weight = checks.accumulable(self.correspondence_weight)
        return weight.softmax(0) if self.normalization == "class_softmax" else weight.sigmoid()

    @property
    def masks_late(self) -> bool:
        """Whether masks are applied after the pooling that ``head`` starts with."""
        return (
            self.mask_at != "maps"
            and self.channel_dim == 1
            and len(split_pooling(self.head)[0]) > 0
        )

    def filter_maps(self, images: Tensor) -> Tensor:
        """The target layer's maps after its activation: ``[B, N, h, w]``, or as ``channel_dim``."""
        maps: Tensor = self.features(images)
        self._check_maps(maps)
        return maps

    def class_mask(self, labels: Tensor, *, seed: int | Tensor | None = None) -> Tensor:
        """Draw a Bernoulli mask for the rows of P that belong to ``labels`` (PICNN eq. 7).

        ``1 - class_mask(labels)`` is the complement that ACC3 is measured with.

        Args:
            labels: ``[B]`` integers in [0, K), on the model's device.
            seed: as in ``functional.bernoulli_mask``: None draws one from torch's generator. A
                seed fixes the draws by position in the batch: give each batch its own.

        Returns:
            ``[B, N]`` of 0 and 1, float32 or wider, without gradient.

        Raises:
            TypeError, ValueError: labels that are no class indices; see ``functional.class_gate``.
        """
        probabilities = self.correspondence.detach()
        checks.tensor("labels", labels)
        checks.labels("labels", labels, labels.numel(), self.num_classes)
        checks.same_device("labels", labels, "the model", probabilities)
        # All of softmax's weight on the label: the pseudo-label drawn is the label itself.
        logits = probabilities.new_full((len(labels), self.num_classes), -math.inf)
        logits = logits.scatter(1, labels.to(torch.int64)[:, None], 0.0)
        maps = probabilities.new_zeros(len(labels), self.num_filters)
        return bernoulli_mask(maps, logits, probabilities, seed=seed)[1]

    def head_logits(self, maps: Tensor, mask: Tensor | None = None) -> Tensor:
        """The head's logits ``[B, K]`` on the maps, each channel scaled by its mask.

        Args:
            maps: of ``filter_maps``.
            mask: ``[B, N]`` in [0, 1], any dtype, differentiable; None keeps every filter.
        """
        self._check_maps(maps)
        if mask is None:
            return self._check_logits(self.head(maps), maps)
        checks.tensor("mask", mask)
        if tuple(mask.shape) != (len(maps), self.num_filters):
            raise ValueError(
                f"mask: got shape {tuple(mask.shape)}, want"
                f" {(len(maps), self.num_filters)}: the batch of maps and num_filters"
            )
        if len(maps) == 0:  # class_gate wants at least one row
            return self._check_logits(self.head(maps), maps)
        shared, layers = self._shared_maps(maps)
        rows = torch.arange(len(maps), device=maps.device)
        gate = mask if mask.is_floating_point() else mask.to(maps.dtype)
        return self._classify(layers, class_gate(shared, gate, rows, channel_dim=self.channel_dim))

    def discriminator(self) -> nn.Sequential:
        """The plain network to deploy, images to logits, without the interpretation pathway.

        It holds the same modules, not copies, under the same names ``features`` and ``head``:
        its state dict loads into the same network built anywhere, without picnn_fast (but for the
        mask layers of an ICNN, which belong to the network). Deepcopy it
        to keep training the original.
        """
        network = nn.Sequential()
        network.add_module("features", self.features)
        network.add_module("head", self.head)
        return network

    def parameter_groups(self, lr: float, correspondence_lr: float) -> list[dict[str, Any]]:
        """Optimiser groups: the network, and W apart with its own rate and no weight decay.

        Args:
            lr: of the network, >= 0; e.g. 1e-3 with Adam.
            correspondence_lr: of W, >= 0; about 100 times ``lr``, else P stays flat for thousands
                of steps. Ignored where W is not trained.
        """
        lr = checks.non_negative("lr", lr)
        correspondence_lr = checks.non_negative("correspondence_lr", correspondence_lr)
        network = [p for p in self.parameters() if p is not self.correspondence_weight]
        groups: list[dict[str, Any]] = [{"params": network, "lr": lr, "name": "network"}]
        if isinstance(self.correspondence_weight, nn.Parameter):
            groups.append(
                {
                    "params": [self.correspondence_weight],
                    "lr": correspondence_lr,
                    "weight_decay": 0.0,
                    "name": "correspondence",
                }
            )
        return groups

    def extra_repr(self) -> str:
        options: Mapping[str, object] = {
            "num_classes": self.num_classes,
            "num_filters": self.num_filters,
            "normalization": self.normalization,
            "masks_late": self.masks_late,
            "channel_dim": self.channel_dim,
        }
        return ", ".join(f"{name}={value!r}" for name, value in options.items())

    def _shared_maps(self, maps: Tensor) -> tuple[Tensor, list[nn.Module]]:
        """What both pathways share: the maps up to where they are masked; and the head's rest."""
        if not self.masks_late:
            return maps, [self.head]
        pooling, rest = split_pooling(self.head)
        for layer in pooling:
            spatial = _POOLING.get(type(layer))
            if spatial is not None and maps.ndim != spatial + 2:
                raise ValueError(
                    f"head: got {type(layer).__name__} for maps of shape {tuple(maps.shape)},"
                    f" want maps [B, N] and {spatial} spatial axes"
                )
            maps = layer(maps)
        return maps, rest

    def _classify(self, layers: list[nn.Module], maps: Tensor, *, keep: bool = False) -> Tensor:
        """Logits by the rest of the head. ``keep``: the maps are needed again afterwards."""
        x = maps
        if keep and any(getattr(m, "inplace", False) for layer in layers for m in layer.modules()):
            x = maps.clone()
        # Some write in place without saying so: versions tell, where there are any.
        shared = keep and x is maps and not torch.compiler.is_compiling()
        version = maps._version if shared and not maps.is_inference() else None
        for layer in layers:
            x = layer(x)
        if version is not None and maps._version != version:
            raise ValueError(
                "head: modifies its input in place, which both pathways share; want layers that"
                " do not, or that say so by an attribute inplace=True"
            )
        return self._check_logits(x, maps)

    def _check_maps(self, maps: Tensor) -> None:
        if not isinstance(maps, Tensor):
            raise TypeError(f"features: yielded {type(maps).__name__}, want a tensor of maps")
        dim = self.channel_dim
        if not -maps.ndim < dim < maps.ndim:
            raise ValueError(
                f"channel_dim: got {dim}, want a filter axis of maps {tuple(maps.shape)}"
            )
        if maps.shape[dim] != self.num_filters:
            raise ValueError(
                f"num_filters: got {self.num_filters}, but features yield {maps.shape[dim]}"
                f" channels (maps {tuple(maps.shape)}, channel_dim={dim}); want"
                f" num_filters={maps.shape[dim]}, or in_channels={maps.shape[dim]} to insert a"
                " convolution to num_filters channels"
            )

    def _check_logits(self, logits: Tensor, maps: Tensor) -> Tensor:
        wanted = (len(maps), self.num_classes)
        if not isinstance(logits, Tensor) or tuple(logits.shape) != wanted:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"head: yielded {got} for maps {tuple(maps.shape)}, want logits {wanted}:"
                " the batch and num_classes"
            )
        return logits


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Per-sample cross entropy ``[B]`` in float32 or wider, whatever autocast makes the logits."""
    return nn.functional.cross_entropy(
        checks.accumulable(logits), labels.to(torch.int64), reduction="none"
    )
