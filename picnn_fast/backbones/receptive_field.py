"""Receptive fields: the pixels that each position of a network's feature maps depends on."""

import math
import operator
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from picnn_fast import checks

# Width at half maximum of a normal distribution, in standard deviations.
_HALF_MAXIMUM = 2 * math.sqrt(2 * math.log(2))

# Layers after which a position shows the pixels it showed before; what normalisation layers
# measure over a whole image or batch is taken as constant.
_POINTWISE_LAYERS = (
    nn.AlphaDropout,
    nn.BatchNorm2d,
    nn.CELU,
    nn.ChannelShuffle,
    nn.CrossMapLRN2d,
    nn.Dropout,
    nn.Dropout2d,
    nn.ELU,
    nn.FeatureAlphaDropout,
    nn.GELU,
    nn.GroupNorm,
    nn.Hardshrink,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.Identity,
    nn.InstanceNorm2d,
    nn.LayerNorm,
    nn.LeakyReLU,
    nn.LocalResponseNorm,
    nn.LogSigmoid,
    nn.Mish,
    nn.PReLU,
    nn.RReLU,
    nn.ReLU,
    nn.SELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Softmax2d,
    nn.Softplus,
    nn.Softshrink,
    nn.Softsign,
    nn.SyncBatchNorm,
    nn.Tanh,
    nn.Tanhshrink,
    nn.Threshold,
)
_WINDOW_LAYERS = (
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.AvgPool2d,
    nn.Conv2d,
    nn.MaxPool2d,
    nn.ZeroPad2d,
)
# The same as functions of torch, torch.nn.functional and operator, and as methods of tensors.
# fmt: off
_POINTWISE = frozenset((
    "abs", "add", "alpha_dropout", "batch_norm", "celu", "clamp", "clamp_max", "clamp_min",
    "clone", "contiguous", "detach", "div", "dropout", "dropout2d", "elu", "exp",
    "feature_alpha_dropout", "float", "gelu", "group_norm", "hardshrink", "hardsigmoid",
    "hardswish", "hardtanh", "iadd", "imul", "instance_norm", "isub", "itruediv", "layer_norm",
    "leaky_relu", "local_response_norm", "logsigmoid", "maximum", "minimum", "mish", "mul",
    "neg", "pow", "prelu", "relu", "relu6", "rrelu", "selu", "sigmoid", "silu", "softplus",
    "softshrink", "softsign", "sqrt", "square", "sub", "tanh", "tanhshrink", "threshold",
    "truediv",
))
# fmt: on
_POINTWISE_FUNCTIONS = frozenset(
    getattr(module, name + suffix)
    for module in (torch, F, operator)
    for name in _POINTWISE
    for suffix in ("", "_")
    if hasattr(module, name + suffix)
)
_JOINS = (torch.cat, torch.concat, torch.concatenate)
_WINDOW_FUNCTIONS: dict[Any, tuple[str, ...]] = {
    F.conv2d: ("input", "weight", "bias", "stride", "padding", "dilation"),
    F.max_pool2d: ("input", "kernel_size", "stride", "padding", "dilation"),
    torch.max_pool2d: ("input", "kernel_size", "stride", "padding", "dilation"),
    F.avg_pool2d: ("input", "kernel_size", "stride", "padding"),
    F.adaptive_avg_pool2d: ("input", "output_size"),
    F.adaptive_max_pool2d: ("input", "output_size"),
}


class ReceptiveField(NamedTuple):
    """Where the positions of feature maps look: a regular grid of equal boxes over the image.

    Pairs are (vertical, horizontal). In pixels the left edge of the image is at 0 and the centre
    of the pixel in column c at c + 0.5.

    Attributes:
        size: of a position's field, unclipped; it may exceed the image.
        stride: pixels from a field to the next.
        first_centre: (y, x) of the centre of the field of position (0, 0), unclipped.
        map_size: positions (h, w).
        image_size: pixels (H, W).
        spread: standard deviation, in pixels, of the weight that a field's pixels have when every
            weight of the network is the same; (0, 0) where it is not known. Of branches it is
            the largest.

    Example:
        >>> from picnn_fast.backbones import ReceptiveField
        >>> patches = ReceptiveField((16, 16), (16, 16), (8.0, 8.0), (14, 14), (224, 224))
        >>> patches.centres()[0, 13], patches.boxes()[0, 13]
        (tensor([216.,   8.]), tensor([208.,   0., 224.,  16.]))
    """

    size: tuple[int, int]
    stride: tuple[int, int]
    first_centre: tuple[float, float]
    map_size: tuple[int, int]
    image_size: tuple[int, int]
    spread: tuple[float, float] = (0.0, 0.0)

    def centres(self) -> Tensor:
        """(x, y) of every position's centre: ``[h, w, 2]`` float32 on the CPU."""
        y, x = (
            first + stride * torch.arange(positions, dtype=torch.float32)
            for first, stride, positions in zip(
                self.first_centre, self.stride, self.map_size, strict=True
            )
        )
        return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)

    def boxes(self) -> Tensor:
        """Edges x0, y0, x1, y1 of every field, clipped to the image: ``[h, w, 4]`` float32."""
        centres = self.centres()
        half = torch.tensor([self.size[1] / 2, self.size[0] / 2])
        edges = torch.tensor([self.image_size[1], self.image_size[0]], dtype=torch.float32)
        corners = [(centres + side * half).clamp_min(0).minimum(edges) for side in (-1, 1)]
        return torch.cat(corners, -1)

    def diameters(self) -> tuple[float, float]:
        """Height and width of the round field that stands for where a position looks.

        Most of a field's weight lies at its centre, about normally distributed in a deep network
        (Luo et al. 2016): this is its width at half maximum, 2.355 ``spread``, and never less than
        √2 strides, with which the fields of neighbours leave no gap.
        """
        height, width = (
            max(_HALF_MAXIMUM * spread, math.sqrt(2) * stride)
            for spread, stride in zip(self.spread, self.stride, strict=True)
        )
        return height, width

    def peaks(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """The highest activation of each map, and the centre of its field.

        Args:
            maps: ``[B, N, h, w]``, any floating dtype.

        Returns:
            activations ``[B, N]`` of the maps' dtype and (x, y) ``[B, N, 2]`` float32 in pixels, of
            the first position in row-major order where several are highest.

        Raises:
            TypeError: maps that are no floating tensor.
            ValueError: maps of another shape.
        """
        self.check_maps(maps)
        activations, positions = maps.detach().flatten(2).max(-1)
        centres = self.centres().flatten(0, 1).to(maps.device)
        return activations, centres[positions]

    def check_maps(self, maps: Tensor) -> None:
        """Refuse maps that are not ``[B, N, h, w]`` of this size."""
        checks.floating("maps", maps)
        if maps.ndim != 4 or tuple(maps.shape[2:]) != tuple(self.map_size):
            raise ValueError(
                f"maps: got shape {tuple(maps.shape)}, want [B, N, {self.map_size[0]},"
                f" {self.map_size[1]}], the map_size of the receptive field"
            )


def receptive_field(
    features: nn.Module, image_size: int | tuple[int, int], *, channels: int = 3
) -> ReceptiveField:
    """The receptive fields of a network's maps, read off its layers.

    The network is traced by ``torch.fx`` and its shapes are computed without running it. Known are
    convolutions, max and average pooling (adaptive where the sizes divide), zero padding, whatever
    works position by position (activations, dropout, normalisation, arithmetic), and sums and
    concatenations of branches, whose fields unite. A module of your own that works position by
    position, with a forward that ``torch.fx`` cannot trace, may carry an attribute
    ``elementwise = True``.

    Args:
        features: images ``[B, channels, H, W]`` to maps ``[B, N, h, w]``.
        image_size: side of the images, or (H, W).
        channels: of the images.

    Raises:
        TypeError: an argument or layer of another kind, named.
        ValueError: a network that cannot be traced, takes other images or whose fields form no
            regular grid.

    Source:
        Dumoulin and Visin, "A guide to convolution arithmetic for deep learning", 2016. Spread:
        Luo, Li, Urtasun, Zemel, "Understanding the Effective Receptive Field in Deep
        Convolutional Neural Networks", NeurIPS 2016, section 2.

    Example:
        >>> from torch import nn
        >>> from picnn_fast.backbones import receptive_field
        >>> features = nn.Sequential(nn.Conv2d(3, 8, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2))
        >>> field = receptive_field(features, 32)
        >>> field.size, field.stride, field.first_centre, field.map_size
        ((6, 6), (2, 2), (1.0, 1.0), (16, 16))
    """
    checks.module("features", features)
    height, width = _pair("image_size", image_size)
    checks.integer("channels", channels, 1)
    # Inside another module, so that a single layer is one too.
    network = nn.Sequential(OrderedDict(features=features))
    try:
        traced = fx.GraphModule(network, _Tracer().trace(network))
    except Exception as error:
        raise ValueError(
            f"features: got a {type(features).__name__} that torch.fx cannot trace ({error}), want"
            " one without control flow on values; a module that works position by position may"
            " say so by elementwise = True"
        ) from error
    propagation = _Propagation(traced)
    without_values = {
        name: torch.empty(
            value.shape,
            dtype=torch.float32 if value.is_floating_point() else value.dtype,
            device="meta",
        )
        for tensors in (propagation.named_parameters(), propagation.named_buffers())
        for name, value in tensors
    }
    # Two images: batch norm in training wants more than one value a channel.
    images = torch.empty(2, channels, height, width, device="meta")
    maps = torch.func.functional_call(propagation, without_values, (images,))
    field = propagation.interpreter.result
    if field is None:
        raise TypeError(
            f"features: yields {type(maps).__name__}, want one tensor of maps that depend on the"
            " images"
        )
    rows, columns = field
    return ReceptiveField(
        size=(rows.size, columns.size),
        stride=(rows.stride, columns.stride),
        first_centre=(rows.start + rows.size / 2, columns.start + columns.size / 2),
        map_size=(maps.shape[2], maps.shape[3]),
        image_size=(height, width),
        spread=(math.sqrt(rows.variance), math.sqrt(columns.variance)),
    )


class _Axis(NamedTuple):
    """Fields along one axis: that of position i begins at start + i·stride."""

    size: int = 1
    stride: int = 1
    start: int = 0
    variance: float = 0.0

    def through(self, kernel: int, stride: int, padding: int, dilation: int) -> "_Axis":
        """Those of a sliding window over these positions; the window weighs all of them alike."""
        return _Axis(
            self.size + dilation * (kernel - 1) * self.stride,
            self.stride * stride,
            self.start - padding * self.stride,
            self.variance + (kernel**2 - 1) / 12 * (dilation * self.stride) ** 2,
        )


_Field = tuple[_Axis, _Axis]


def _is_elementwise(module: nn.Module) -> bool:
    return isinstance(module, _POINTWISE_LAYERS) or getattr(module, "elementwise", False) is True


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _is_elementwise(m) or super().is_leaf_module(m, module_qualified_name)


class _Propagation(nn.Module):
    """A traced network that runs step by step, and keeps the field of every step.

    A module, so that ``torch.func.functional_call`` can put tensors without values in the place of
    the network's parameters.
    """

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__()
        self.traced = traced
        self.interpreter = _Interpreter(traced)

    def forward(self, images: Tensor) -> Any:
        return self.interpreter.run(images)


class _Interpreter(fx.Interpreter):
    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced)
        self.extra_traceback = False  # it would rewrite the messages of errors
        self.fields: dict[fx.Node, _Field] = {}
        self.result: _Field | None = None

    def run_node(self, n: fx.Node) -> Any:
        inputs = [node for node in n.all_input_nodes if node in self.fields]
        if n.op == "placeholder":
            self.fields[n] = (_Axis(), _Axis())
        elif n.op == "output":
            result = n.args[0]
            self.result = self.fields.get(result) if isinstance(result, fx.Node) else None
        if n.op in ("placeholder", "output") or not inputs:  # the rest does not see the image
            return super().run_node(n)
        windows = self._windows(n)
        try:
            value = super().run_node(n)
        except Exception as error:
            shapes = " and ".join(str(tuple(self.env[node].shape[1:])) for node in inputs)
            raise ValueError(
                f"features: {self._name(n)} cannot take {shapes} (channels, height, width):"
                f" {error}; want images of another image_size or channels"
            ) from error
        if not isinstance(value, Tensor) or value.ndim != 4:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"features: {self._name(n)} yields {got}, want maps [B, N, h, w]")
        if windows is None:
            self.fields[n] = self._united(n, inputs, value)
        else:
            rows, columns = self.fields[inputs[0]]
            self.fields[n] = (rows.through(*windows[0]), columns.through(*windows[1]))
        return value

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        if _is_elementwise(self.fetch_attr(target)):
            return next(iter((*args, *kwargs.values())))
        return super().call_module(target, args, kwargs)

    def _windows(self, n: fx.Node) -> list[tuple[int, int, int, int]] | None:
        """Kernel, stride, padding, dilation down and across; None where positions are kept."""
        if n.op == "call_module":
            layer = self.fetch_attr(str(n.target))
            if _is_elementwise(layer):
                return None
            if isinstance(layer, _WINDOW_LAYERS):
                names = ("kernel_size", "stride", "padding", "dilation", "output_size")
                options = {name: getattr(layer, name) for name in names if hasattr(layer, name)}
                if getattr(layer, "padding_mode", "zeros") != "zeros":
                    raise ValueError(
                        f"features: {self._name(n)} has padding_mode={layer.padding_mode!r}, want"
                        " 'zeros': other padding shows pixels beyond the field"
                    )
                return self._sizes(n, options)
        elif n.op == "call_function":
            if n.target in _WINDOW_FUNCTIONS:
                given: tuple[Any, ...] = n.args
                options = dict(zip(_WINDOW_FUNCTIONS[n.target], given, strict=False)) | n.kwargs
                if "weight" in options:
                    options["kernel_size"] = self.env[options["weight"]].shape[2:]
                    options.setdefault("stride", 1)
                return self._sizes(n, options)
            dim = n.kwargs.get("dim", n.args[1] if len(n.args) > 1 else 0)
            if n.target in _POINTWISE_FUNCTIONS or (n.target in _JOINS and dim in (1, -3)):
                return None
        elif str(n.target).removesuffix("_") in _POINTWISE:
            return None
        raise TypeError(
            f"features: got {self._name(n)}, want convolutions, pooling, what works position by"
            " position, and sums or concatenations of channels; a module that works position by"
            " position may say so by elementwise = True"
        )

    def _sizes(self, n: fx.Node, options: dict[str, Any]) -> list[tuple[int, int, int, int]]:
        shape = self.env[n.all_input_nodes[0]].shape[-2:]
        if "output_size" in options:
            wanted = _both(options["output_size"])
            sizes = [was if now is None else now for was, now in zip(shape, wanted, strict=True)]
            if any(was % now for was, now in zip(shape, sizes, strict=True)):
                raise ValueError(
                    f"features: {self._name(n)} takes maps {tuple(shape)} to {tuple(sizes)}, want"
                    " sizes that divide: its fields differ from position to position"
                )
            ratios = [was // now for was, now in zip(shape, sizes, strict=True)]
            return [(ratio, ratio, 0, 1) for ratio in ratios]
        padding = options.get("padding", 0)
        if "kernel_size" not in options:  # ZeroPad2d: left, right, top, bottom
            return [(1, 1, padding[2], 1), (1, 1, padding[0], 1)]
        kernels = _both(options["kernel_size"])
        strides = _both(options.get("stride") or kernels)
        dilations = _both(options.get("dilation", 1))
        if isinstance(padding, str):
            spans = [d * (k - 1) for k, d in zip(kernels, dilations, strict=True)]
            padding = [span // 2 if padding == "same" else 0 for span in spans]
        return list(zip(kernels, strides, _both(padding), dilations, strict=True))

    def _united(self, n: fx.Node, inputs: list[fx.Node], value: Tensor) -> _Field:
        shapes = {tuple(self.env[node].shape[-2:]) for node in inputs}
        if shapes != {tuple(value.shape[-2:])}:
            raise ValueError(
                f"features: {self._name(n)} takes maps of {sorted(shapes)} to"
                f" {tuple(value.shape[-2:])}, want one size"
            )
        rows, columns = zip(*(self.fields[node] for node in inputs), strict=True)
        return self._union(n, rows), self._union(n, columns)

    def _union(self, n: fx.Node, branches: Sequence[_Axis]) -> _Axis:
        strides = {branch.stride for branch in branches}
        if len(strides) > 1:
            raise ValueError(
                f"features: {self._name(n)} joins branches of strides {sorted(strides)} pixels,"
                " want one stride"
            )
        start = min(branch.start for branch in branches)
        end = max(branch.start + branch.size for branch in branches)
        return _Axis(end - start, strides.pop(), start, max(b.variance for b in branches))

    def _name(self, n: fx.Node) -> str:
        """A step as the user knows it: the layer's name and type, or the function in its layer."""
        stack = list(n.meta.get("nn_module_stack", {}).values())
        if n.op == "call_module":
            path, what = str(n.target), type(self.fetch_attr(str(n.target))).__name__
        else:
            path = str(stack[-1][0]) if stack else "features"
            what = f"{getattr(n.target, '__name__', n.target)}()"
        path = path.removeprefix("features").removeprefix(".")
        return f"layer {path!r} ({what})" if path else what


def _both(value: Any) -> tuple[Any, Any]:
    """One value for both axes, or one each."""
    if isinstance(value, Sequence):
        return (value[0], value[-1])
    return (value, value)


def _pair(name: str, value: object) -> tuple[int, int]:
    both = value if isinstance(value, tuple | list) else (value, value)
    if len(both) != 2:
        raise ValueError(f"{name}: got {value!r}, want an int or a pair (height, width)")
    height, width = (checks.integer(name, side, 1) for side in both)
    return height, width
