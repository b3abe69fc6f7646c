"""Any network cut in two behind a named layer: its features, and a new head like its classifier."""

import contextlib
import copy
import dataclasses
import functools
import itertools
import math
import operator
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from picnn_fast import checks

_WINDOW = ("kernel_size", "stride", "padding")
# Functions and methods of tensors that do what a layer does; their arguments after the input.
_LAYERS: dict[Any, tuple[type[nn.Module], tuple[str, ...]]] = {
    F.relu: (nn.ReLU, ("inplace",)),
    torch.relu: (nn.ReLU, ()),
    "relu": (nn.ReLU, ()),
    F.dropout: (nn.Dropout, ("p", "training", "inplace")),
    F.dropout2d: (nn.Dropout2d, ("p", "training", "inplace")),
    F.max_pool2d: (nn.MaxPool2d, (*_WINDOW, "dilation", "ceil_mode", "return_indices")),
    F.avg_pool2d: (nn.AvgPool2d, (*_WINDOW, "ceil_mode", "count_include_pad")),
    F.adaptive_avg_pool2d: (nn.AdaptiveAvgPool2d, ("output_size",)),
    F.adaptive_max_pool2d: (nn.AdaptiveMaxPool2d, ("output_size", "return_indices")),
    torch.flatten: (nn.Flatten, ("start_dim", "end_dim")),
    "flatten": (nn.Flatten, ("start_dim", "end_dim")),
}
_PAIR = "or a pair (features, head) of modules as backbone"


@dataclasses.dataclass(frozen=True)
class Split:
    """A network cut behind a layer.

    Attributes:
        features: images to the maps of that layer.
        classifier: what follows, as layers one after the other, or, where it branches, as a graph.
        layer: where it was cut.
        image_size: pixels (H, W) that it can take.
        num_features: channels that the features yield, where the network tells.
    """

    features: nn.Module
    classifier: list[nn.Module] | fx.GraphModule
    layer: str
    image_size: tuple[int, int] = (224, 224)
    num_features: int | None = None

    def channel_dim(self, shape: Sequence[int] | None = None) -> int:
        """The filter axis of the maps: the last of tokens ``[B, T, N]`` and ``[B, h, w, N]``.

        Args:
            shape: of maps, where some have been made.
        """
        shape = (self._shape or ()) if shape is None else shape
        last = len(shape) == 4 and shape[1] != self.num_features == shape[3]
        return -1 if len(shape) == 3 or last else 1

    def channels(self, channel_dim: int | None = None) -> int | None:
        """The channels that the features yield, or None where only running them can tell.

        Args:
            channel_dim: the filter axis of the maps, where it is not ``channel_dim()``.

        Raises:
            ValueError: no axis of theirs.
        """
        shape = self._shape
        if shape is None:
            return None
        if channel_dim is None:
            channel_dim = self.channel_dim()
        if channel_dim not in range(-len(shape), len(shape)):
            raise ValueError(
                f"channel_dim: got {channel_dim!r}, want an axis of maps of {len(shape)} axes"
            )
        return shape[channel_dim]

    @functools.cached_property
    def _shape(self) -> tuple[int, ...] | None:
        """Of the maps of two images."""
        convolutions = (m for m in self.features.modules() if isinstance(m, nn.Conv2d))
        image_channels = next((convolution.in_channels for convolution in convolutions), 3)
        return _output_shape(self.features, (image_channels, *self.image_size))

    def own_head(self) -> nn.Module:
        """The classifier as it is: the network's own layers, and behind the features its logits."""
        if isinstance(self.classifier, fx.GraphModule):
            return self.classifier
        return nn.Sequential(*self.classifier)

    def replaced(self) -> list[nn.Linear]:
        """The layers in whose place ``head`` puts new ones."""
        if isinstance(self.classifier, fx.GraphModule):
            calls = (n for n in self.classifier.graph.nodes if n.op == "call_module")
            layers = [self.classifier.get_submodule(str(node.target)) for node in calls]
            return [layer for layer in layers if isinstance(layer, nn.Linear)][-1:]
        return [layer for layer in self.classifier if isinstance(layer, nn.Linear)]

    def head(self, channels: int, num_filters: int, num_classes: int) -> nn.Module:
        """The classifier made anew for N filters and K classes.

        Of layers one after the other it makes an ``nn.Sequential`` whose linear layers are all new
        (one is appended where there is none), and with another number of filters those layer norms
        that come before, of a graph one whose last linear layer is new. The other layers are the
        network's own.

        Args:
            channels: that the features yield.
            num_filters: N, channels of the maps that the head takes.
            num_classes: K.

        Raises:
            ValueError: a classifier that cannot be made for so many filters or classes.
        """
        if isinstance(self.classifier, fx.GraphModule):
            return self._graph_head(self.classifier, channels, num_filters, num_classes)
        linear = self.replaced()
        behind = self.classifier.index(linear[0]) if linear else len(self.classifier)
        before = self.classifier[:behind]
        if num_filters != channels:
            before = [_norm_of(layer, channels, num_filters) for layer in before]
        width = _flat_width(before, num_filters)
        if width is None and self.channel_dim() != 1:
            if num_filters != channels:
                raise self._other_filters(channels, num_filters)
            width = linear[0].in_features if linear else channels
        elif width is None:
            if _flat_width(self.classifier[:behind], channels) is not None:
                raise self._other_filters(channels, num_filters)
            # It depends on the size of the images, which the old classifier was made for.
            positions, left_over = divmod(linear[0].in_features if linear else 0, channels)
            pooled = any(isinstance(layer, nn.AvgPool2d | nn.MaxPool2d) for layer in before)
            if positions < (1 if pooled else 2) or left_over:
                raise ValueError(
                    f"backbone: got maps of layer {self.layer!r} that nothing pools to one size"
                    " before a linear layer, want pooling there, such as nn.AdaptiveAvgPool2d(1);"
                    f" {_PAIR}"
                )
            width = positions * num_filters
        sizes = [width, *(layer.out_features for layer in linear[:-1]), num_classes]
        biases = [layer.bias is not None for layer in linear] or [True]
        new = [
            nn.Linear(*size, bias=bias)
            for size, bias in zip(itertools.pairwise(sizes), biases, strict=True)
        ]
        made = iter(new)
        layers = [*before, *self.classifier[behind:]]
        return nn.Sequential(*(next(made) if m in linear else m for m in layers), *made)

    def _graph_head(
        self, graph: fx.GraphModule, channels: int, num_filters: int, num_classes: int
    ) -> nn.Module:
        if num_filters != channels:
            raise self._other_filters(channels, num_filters)
        if not self.replaced():
            raise ValueError(
                f"backbone: got no nn.Linear behind layer {self.layer!r}, want a classifier to make"
                f" anew; {_PAIR}"
            )
        (old,) = self.replaced()
        head = fx.GraphModule(graph, graph.graph)
        (name,) = (name for name, layer in head.named_modules() if layer is old)
        head.set_submodule(name, nn.Linear(old.in_features, num_classes, bias=old.bias is not None))
        return head

    def _other_filters(self, channels: int, num_filters: int) -> ValueError:
        return ValueError(
            f"num_filters: got {num_filters}, want {channels}: what follows layer {self.layer!r}"
            f" takes no other number of channels; {_PAIR}"
        )


def split(network: nn.Module, layer: str) -> Split:
    """Cut a network behind a layer, along a trace by ``torch.fx``.

    Entered are the modules that hold the layer and, behind it, those that hold linear layers; any
    other is taken as it is, whatever its forward does. Features become, in order of preference:
    the one module that they are, an ``nn.Sequential`` of the children of one module under their
    own names, an ``fx.GraphModule``. All use the network's own layers, not copies. Where a forward
    that is entered asks for ``self.training``, it stays as it is in the network's present mode.

    Args:
        network: images ``[B, C, H, W]`` to logits.
        layer: a name of ``network.named_modules()``, as "layer4" or "features.29"; numbers in an
            ``nn.Sequential`` may count from its end, "features.-2". Of a module that runs several
            times the last run counts. Else the name that ``torch.fx`` gives to a function which
            the network's own forward calls, as "relu".

    Raises:
        TypeError: a layer that is no name.
        ValueError: no such layer, or one that others bypass; a network that cannot be traced.
    """
    path = _resolved(network, layer)
    kind = type(network).__name__
    try:
        graph = fx.GraphModule(network, _Tracer(network, path).trace(network)).graph
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"backbone: got a {kind} that torch.fx cannot trace ({reason}), want one without"
            " control flow on values; one with forward_features and forward_head, with layer left"
            f" out; {_PAIR}"
        ) from error
    _write_views_as_flatten(graph)
    graph.eliminate_dead_code()
    *nodes, output = graph.nodes
    steps = [node for node in nodes if node.op != "placeholder"]
    runs = [node for node in steps if node.op == "call_module" and node.target == path]
    runs = runs or [node for node in steps if node.op != "call_module" and node.name == path]
    if not runs:
        names = [name for name, _ in network.named_modules() if name]
        raise ValueError(
            f"layer: got {layer!r},{checks.did_you_mean(layer, names)} want a module that the"
            f" forward of {kind} runs, named as in its named_modules()"
        )
    cut = runs[-1]
    after = {cut}
    for node in nodes:
        if not after.isdisjoint(node.all_input_nodes):
            after.add(node)
    # Beside what the cut needs, checks of the images, which yield nothing.
    before = {cut, *(node for node in steps if not node.users and node not in after)}
    for node in reversed(nodes):
        if not before.isdisjoint(node.users):
            before.add(node)
    behind = [node for node in steps if node not in before]
    for node in (*behind, output):
        if any(other is not cut for other in node.all_input_nodes if other not in behind):
            raise ValueError(
                f"layer: got {layer!r}, which {node.name!r} gets round; want a layer of {kind}"
                " that everything passes through"
            )
    if not isinstance(output.args[0], fx.Node):
        raise ValueError(
            f"backbone: got a {kind} whose forward yields a {type(output.args[0]).__name__}, want"
            f" one that yields logits; {_PAIR}"
        )
    chain = _chain([cut, *behind], network)
    return Split(
        _features([node for node in nodes if node in before], network),
        [layer for layers in chain for layer in layers]
        if chain is not None
        else _graph_module(behind, cut, network),
        layer,
        _image_size(network),
    )


def last_maps(network: nn.Module, images: Tensor) -> str:
    """The layer behind which ``split`` finds a network's last convolutional maps.

    From the last convolution that yields maps of several positions it goes on, by what everything
    passes through, as long as maps stay as large: to its activation, or the block that it ends.

    Args:
        network: images to logits, in eval mode.
        images: ``[B, C, H, W]`` as it takes them.

    Raises:
        ValueError: no convolution, or one that others bypass; see ``split``.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from picnn_fast.backbones import last_maps
        >>> layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        >>> last_maps(nn.Sequential(*layers, nn.Linear(8, 5)), torch.randn(1, 3, 16, 16))
        '1'
    """
    ran = _ran(network, images)
    convolutions = [i for i, (_, module, _) in enumerate(ran) if isinstance(module, nn.Conv2d)]
    spread = [i for i in convolutions if math.prod(ran[i][2][2:]) > 1]
    if not convolutions:
        raise ValueError(
            f"layer: got None with a {type(network).__name__} that runs no nn.Conv2d, want the name"
            " of the layer whose maps are meant"
        )
    last = (spread or convolutions)[-1]
    size = ran[last][2][2:]
    found, error = None, None
    for name, _, shape in ran[last:]:
        try:
            split(network, name)
        except ValueError as refused:
            error = error or refused
            continue
        if len(shape) != 4 or shape[2:] != size:
            break
        found = name
    if found is None:
        raise ValueError(
            "layer: got None, want the name of the layer whose maps are meant: none is found behind"
            f" the last convolution of {type(network).__name__} ({error})"
        )
    return found


def _ran(network: nn.Module, images: Tensor) -> list[tuple[str, nn.Module | None, tuple[int, ...]]]:
    """What a network runs on images, in order, by the names that ``split`` takes.

    Returns:
        Names of modules and of functions, the module or None, and the shape of the tensor it
        yields; what yields something else is left out.
    """
    ran: list[tuple[str, nn.Module | None, tuple[int, ...]]] = []

    def note(name: str, module: nn.Module | None, output: object) -> None:
        if isinstance(output, Tensor):
            ran.append((name, module, tuple(output.shape)))

    class Noting(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            output = super().run_node(n)
            if n.op in ("call_function", "call_method"):
                note(n.name, None, output)
            return output

    run: Any = network
    # A network that no trace can follow everywhere may still be cut behind a module.
    with contextlib.suppress(Exception):
        run = Noting(fx.GraphModule(network, _Tracer(network, None).trace(network))).run
    hooks = [
        module.register_forward_hook(
            lambda module, args, output, name=name: note(name, module, output)
        )
        for name, module in network.named_modules()
        if name
    ]
    try:
        with torch.no_grad():
            run(images)
    finally:
        for hook in hooks:
            hook.remove()
    return ran


def split_halves(network: nn.Module) -> Split:
    """Cut a network between its ``forward_features`` and ``forward_head``, which timm's have.

    ``torch.fx`` need not be able to trace the first. Its ``num_features`` tells its channels, where
    it has that.

    Raises:
        ValueError: a ``forward_head`` that cannot be traced.
    """
    parts = split(_Halves(network), "features")
    classifier = parts.classifier
    head = nn.ModuleList(classifier) if isinstance(classifier, list) else classifier
    taken = set(head.parameters())
    # Without the parameters of the head: features whose parameters get no gradient stop DDP.
    network = copy.copy(network)
    network._modules = {
        name: child
        for name, child in network.named_children()
        if taken.isdisjoint(child.parameters())
    }
    channels = getattr(network, "num_features", None)
    return Split(_Features(network), classifier, "forward_features", _image_size(network), channels)


def _image_size(network: Any) -> tuple[int, int]:
    """Pixels (H, W) of images that torchvision's and timm's networks can take."""
    size = getattr(network, "image_size", None)
    size = size or getattr(getattr(network, "patch_embed", None), "img_size", None)
    size = size or (getattr(network, "pretrained_cfg", None) or {}).get("input_size", (224,))
    height, width = (size, size) if isinstance(size, int) else (size[-2:] * 2)[:2]
    return height, width


class _Features(nn.Module):
    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.network.forward_features(images)
        return maps


class _Halves(nn.Module):
    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self.features = _Features(network)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network.forward_head(self.features(images))
        return logits


class _Tracer(fx.Tracer):
    def __init__(self, network: nn.Module, layer: str | None) -> None:
        super().__init__()
        self.layer = layer
        self.behind = layer not in dict(network.named_modules())

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, nn.Linear):
            return True
        if module_qualified_name == self.layer:
            self.behind = True
            return True
        if self.layer is not None and self.layer.startswith(f"{module_qualified_name}."):
            return False
        holds_linear = any(isinstance(part, nn.Linear) for part in m.modules())
        if self.behind and holds_linear:
            return super().is_leaf_module(m, module_qualified_name)
        return True


def _resolved(network: nn.Module, layer: object) -> str:
    """The layer's name, numbers from the end counted from the start."""
    if not isinstance(layer, str):
        raise TypeError(f"layer: got {type(layer).__name__}, want the name of a module")
    modules = dict(network.named_modules())
    path = ""
    for name in layer.split("."):
        holder = modules.get(path)
        if name.startswith("-") and name[1:].isdigit() and isinstance(holder, nn.Sequential):
            name = dict(enumerate(dict(holder.named_children()), -len(holder))).get(int(name), name)
        path = f"{path}.{name}".removeprefix(".")
    return path


def _write_views_as_flatten(graph: fx.Graph) -> None:
    """``x.view(x.size(0), -1)`` is ``torch.flatten(x, 1)``, without a second path from x."""
    for node in graph.nodes:
        is_view = node.op == "call_method" and node.target in ("view", "reshape")
        if is_view and node.args[2:] == (-1,) and isinstance(node.args[1], fx.Node):
            with graph.inserting_before(node):
                flat = graph.call_function(torch.flatten, (node.args[0], 1))
            node.replace_all_uses_with(flat)


def _features(nodes: list[fx.Node], network: nn.Module) -> nn.Module:
    """The steps up to the last of ``nodes``; see ``split`` for what they become."""
    chain = _chain(nodes, network)
    steps = nodes[1:]
    own = [str(node.target).rpartition(".") for node in steps if node.op == "call_module"]
    names = [
        str(node.target).rpartition(".")[2] if node.op == "call_module" else node.name
        for node in steps
    ]
    of_one_parent = len({parent for parent, _, _ in own}) == 1 and len(set(names)) == len(names)
    if chain is None or not of_one_parent or any(len(layers) > 1 for layers in chain):
        return _graph_module(nodes, None, network)
    layers = OrderedDict(zip(names, (layer for layers in chain for layer in layers), strict=True))
    return layers.popitem()[1] if len(layers) == 1 else nn.Sequential(layers)


def _chain(nodes: list[fx.Node], network: nn.Module) -> list[list[nn.Module]] | None:
    """The layers that each node but the first does the work of, each on the node before alone."""
    chain = []
    for before, node in itertools.pairwise(nodes):
        layers = _as_layers(node, network) if node.all_input_nodes == [before] else None
        if layers is None:
            return None
        chain.append(layers)
    return chain


def _as_layers(node: fx.Node, network: nn.Module) -> list[nn.Module] | None:
    args, options = list(node.args[1:]), dict(node.kwargs)
    if node.op == "call_module":
        return None if args or options else [network.get_submodule(str(node.target))]
    if node.target in (torch.mean, "mean"):
        options = dict(zip(("dim", "keepdim"), args, strict=False)) | options
        if options.keys() <= {"dim", "keepdim"} and _spatial(options.get("dim")):
            flatten = [] if options.get("keepdim") else [nn.Flatten()]
            return [nn.AdaptiveAvgPool2d(1), *flatten]
    if node.target not in _LAYERS:
        return None
    kind, names = _LAYERS[node.target]
    options = dict(zip(names, args, strict=False)) | options
    if len(args) > len(names) or not options.keys() <= set(names):
        return None
    options.pop("training", None)  # a layer follows its own mode
    if kind is nn.Flatten and options.get("start_dim") != 1:
        return None
    return [kind(**options)]


def _spatial(dim: object) -> bool:
    return isinstance(dim, Sequence) and sorted(d % 4 for d in dim) == [2, 3]


def _graph_module(
    nodes: list[fx.Node], entry: fx.Node | None, network: nn.Module
) -> fx.GraphModule:
    """The steps of ``nodes``, the last of which is the output; ``entry`` is an input of theirs."""
    graph = fx.Graph()
    made = {} if entry is None else {entry: graph.placeholder("maps")}
    root: dict[str, Any] = {}
    for node in nodes:
        # Its argument ``training`` is a constant of the trace: it would not follow ``eval()``.
        follows = "training" not in getattr(
            getattr(node.target, "__code__", None), "co_varnames", ()
        )
        layers = None if follows else _as_layers(node, network)
        if layers is not None:
            (root[node.name],) = layers
            made[node] = graph.call_module(node.name, (made[node.all_input_nodes[0]],))
            continue
        if not follows:
            raise ValueError(
                f"backbone: got a {type(network).__name__} whose forward calls the function"
                f" {node.name!r}, want the layer in its place (such as nn.BatchNorm2d); {_PAIR}"
            )
        if node.op in ("call_module", "get_attr"):
            root[str(node.target)] = operator.attrgetter(str(node.target))(network)
        made[node] = graph.node_copy(node, made.__getitem__)
    graph.output(made[nodes[-1]])
    module = fx.GraphModule(root, graph)
    module.training = network.training
    return module


def _norm_of(layer: nn.Module, channels: int, num_filters: int) -> nn.Module:
    """A layer norm over the channels anew for so many filters, any other layer as it is."""
    if not isinstance(layer, nn.LayerNorm) or layer.normalized_shape != (channels,):
        return layer
    norm = copy.deepcopy(layer)
    norm.normalized_shape = (num_filters,)
    for name, parameter in layer.named_parameters():
        setattr(norm, name, nn.Parameter(parameter.new_empty(num_filters)))
    norm.reset_parameters()
    return norm


def _flat_width(layers: list[nn.Module], channels: int) -> int | None:
    """Values in the vectors that layers make of maps, or None where the maps' size matters."""
    module = nn.Sequential(*layers)
    # So far apart that a window makes maps of two sizes of them, whatever its stride.
    shapes = {_output_shape(module, (channels, side, side)) for side in (15, 64)}
    (shape, *others) = shapes
    return None if others or shape is None or len(shape) != 2 else shape[1]


def _output_shape(module: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """For two inputs of a shape, computed without values; None where that fails."""
    try:
        without_values = {
            name: torch.empty_like(value, device="meta")
            for tensors in (module.named_parameters(), module.named_buffers())
            for name, value in tensors
        }
        dtype = next((parameter.dtype for parameter in module.parameters()), torch.float32)
        # Two: batch norm in training wants more than one value a channel.
        given = torch.empty(2, *shape, dtype=dtype, device="meta")
        with torch.no_grad():
            output = torch.func.functional_call(module, without_values, (given,))
    except Exception:  # whatever a network's own forward raises
        return None
    return tuple(output.shape) if isinstance(output, Tensor) else None
