"""A head that runs on all filters or on some: masks move behind the pooling it starts with."""

import math
import warnings

import torch
from torch import Tensor, nn

from picnn_fast import checks
from picnn_fast.functional import mask_channels

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
# Layers that may hand on the memory they were given.
_PASSING = (
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)


def layers_of(module: nn.Module) -> list[nn.Module]:
    """The layers of (nested) plain ``nn.Sequential``; a subclass may run them otherwise."""
    if type(module) is not nn.Sequential:
        return [module]
    return [layer for child in module for layer in layers_of(child)]


def leading_pooling(head: nn.Module) -> int:
    """How many layers a head starts with that commute with a mask per channel; the last pools."""
    last = 0
    for position, layer in enumerate(layers_of(head), start=1):
        if type(layer) in _POOLING and not getattr(layer, "return_indices", False):
            last = position
        elif type(layer) is not nn.Identity:
            break
    return last


class MaskedHead:
    """Runs a head on feature maps whose filters may be masked.

    Not a module: the head stays the network's own, under its own name, and may be exchanged for
    one that pools alike.

    Args:
        head: maps to logits ``[B, K]``.
        num_classes, num_filters: K and N, the channels of the maps.
        mask_at: "maps": masks are applied to the maps. "late": after the pooling ``head`` starts
            with, which they pass unchanged, at 1/(h·w) of the work; needs ``head`` to be an
            ``nn.Sequential`` (nested ones included) that starts with average or max pooling.
            "auto": late where possible. See Note.
        channel_dim: the filter axis of the maps.

    Attributes:
        late: whether masks are applied after the pooling.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of range.

    Note:
        Late masking gives the same logits always, and the same gradients behind average pooling.
        Behind max pooling the gradient of a *dropped* filter's probability is max(H), the
        derivative of max(z·H) = z·max(H) at z = 0 from above; masking the maps yields a tie of
        zeros there, of which autograd takes an arbitrary position.

        Where masks are late, hooks on the head itself do not run, hooks on its layers do.
    """

    def __init__(
        self,
        head: nn.Module,
        num_classes: int,
        num_filters: int,
        *,
        mask_at: str = "auto",
        channel_dim: int = 1,
    ) -> None:
        self.num_classes = checks.integer("num_classes", num_classes, 1)
        self.num_filters = checks.integer("num_filters", num_filters, 1)
        checks.one_of("mask_at", mask_at, ("auto", "maps", "late"))
        if isinstance(channel_dim, bool) or not isinstance(channel_dim, int):
            raise TypeError(f"channel_dim: got {type(channel_dim).__name__}, want an int")
        if channel_dim == 0:
            raise ValueError("channel_dim: got 0, the batch axis; want the filter axis of the maps")
        self.channel_dim = channel_dim
        self._warned = False
        self._pooled = leading_pooling(head) if mask_at != "maps" and channel_dim == 1 else 0
        if mask_at == "late" and not self.late:
            start = next((type(layer).__name__ for layer in layers_of(head)), "nothing")
            raise ValueError(
                f"mask_at: got 'late' with a head that starts with {start} and"
                f" channel_dim={channel_dim}, want a head that is an nn.Sequential starting with"
                " average or max pooling, and channel_dim=1; or mask_at='auto'"
            )

    @property
    def late(self) -> bool:
        return self._pooled > 0

    def __call__(self, head: nn.Module, maps: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits ``[B, K]``; see ``InterpretableNetwork.head_logits``."""
        self.check_maps(maps)
        shared, layers = self.share(head, maps)
        return self.classify(layers, self.masked(shared, mask))

    def masked(self, maps: Tensor, mask: Tensor | None) -> Tensor:
        """The maps, or what pooling made of them, with each channel scaled by its mask."""
        if mask is None:
            return maps
        checks.tensor("mask", mask)
        if tuple(mask.shape) != (len(maps), self.num_filters):
            raise ValueError(
                f"mask: got shape {tuple(mask.shape)}, want"
                f" {(len(maps), self.num_filters)}: the batch of maps and num_filters"
            )
        scale = mask if mask.is_floating_point() else mask.to(maps.dtype)
        return mask_channels(maps, scale, channel_dim=self.channel_dim)

    def share(self, head: nn.Module, maps: Tensor) -> tuple[Tensor, list[nn.Module]]:
        """What all masks share: the maps up to where they are masked; and the head's rest."""
        if not self.late:
            return maps, [head]
        layers = layers_of(head)
        for layer in layers[: self._pooled]:
            spatial = _POOLING.get(type(layer))
            if spatial is None and type(layer) is not nn.Identity:
                raise ValueError(
                    f"head: got {type(layer).__name__} where it pooled when the network was made,"
                    " want a head that pools alike, or a new network around this one"
                )
            if spatial is not None and maps.ndim != spatial + 2:
                raise ValueError(
                    f"head: got {type(layer).__name__} for maps of shape {tuple(maps.shape)},"
                    f" want maps [B, N] and {spatial} spatial axes"
                )
            maps = layer(maps)
        return maps, layers[self._pooled :]

    def classify(self, layers: list[nn.Module], maps: Tensor) -> Tensor:
        """Logits ``[B, K]`` by the rest of the head; ``maps`` are not written to."""
        # Some write in place without saying so: versions tell, where there are any.
        watched = not torch.compiler.is_compiling() and not maps.is_inference()
        x = maps.clone() if _writes_to_input(layers, in_doubt=not watched) else maps
        version = maps._version if watched and x is maps else None
        for layer in layers:
            x = layer(x)
        if version is not None and maps._version != version:
            raise ValueError(
                "head: modifies its input in place, which others read too; want layers that"
                " do not, or that say so by an attribute inplace=True"
            )
        return self.checked_logits(x, maps)

    def checked_logits(self, logits: object, maps: Tensor) -> Tensor:
        """
        Raises:
            ValueError: what a head yielded of maps is no logits ``[B, K]``.
        """
        wanted = (len(maps), self.num_classes)
        if not isinstance(logits, Tensor) or tuple(logits.shape) != wanted:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"head: yielded {got} for maps {tuple(maps.shape)}, want logits {wanted}:"
                " the batch and num_classes"
            )
        return logits

    def check_maps(self, maps: Tensor) -> None:
        """
        Raises:
            TypeError, ValueError: no maps of ``num_filters`` channels.
        """
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
        if maps.ndim > 2 and not self._warned and not torch.compiler.is_compiling():
            positions = [size for i, size in enumerate(maps.shape) if i not in (0, dim % maps.ndim)]
            if math.prod(positions) == 1:
                self._warned = True
                warnings.warn(
                    f"features: yield maps {' x '.join(map(str, positions))}: with a single"
                    " position filters have no place in the image, and neither masks nor parts mean"
                    " anything; give larger images, or cut the backbone at an earlier layer",
                    stacklevel=2,
                )


def _writes_to_input(layers: list[nn.Module], in_doubt: bool) -> bool:
    """Whether a layer that says it works in place may be given the memory of the first one.

    Args:
        layers: of a head.
        in_doubt: what to say of layers other than PyTorch's, which may say nothing.
    """
    for module in layers:
        for layer in layers_of(module):
            if any(getattr(part, "inplace", False) for part in layer.modules()):
                return True
            of_torch = type(layer).__module__.startswith("torch.nn.")
            if of_torch and type(layer) not in _PASSING:
                return False  # it yields memory of its own
            if not of_torch and in_doubt:
                return True
    return False
