"""The weights of the filters: those of the convolution that makes a network's maps."""

import torch
from torch import Tensor, nn

from picnn_fast.models.base import InterpretableNetwork
from picnn_fast.ops.layout import whole

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def filter_weights(network: InterpretableNetwork, images: Tensor) -> Tensor:
    """Weights of each filter of the target layer: a row of the convolution that makes the maps.

    It is the convolution or linear layer that runs last on the way to the maps, whatever comes
    behind it: batch norm, an activation, a mask layer or, in a residual network, a sum.

    Args:
        network: in eval mode, for it runs once.
        images: ``[B, C, H, W]`` as the network takes them; one of zeros will do.

    Returns:
        ``[N, D]``, D weights a filter, without its bias; in the layer's dtype, without gradient.

    Raises:
        ValueError: that layer has another number of filters than the maps, as in a DenseNet, or
            groups, whose filters do not look at the same channels; or there is none.

    Example:
        >>> import torch
        >>> from picnn_fast import make_interpretable
        >>> from picnn_fast.models import filter_weights
        >>> network = make_interpretable("small-cnn", "picnn", num_classes=4, num_filters=20).eval()
        >>> filter_weights(network, torch.zeros(1, 3, 32, 32)).shape[0]
        20
    """
    ran: list[nn.Module] = []
    layers = [x for x in network.features.modules() if isinstance(x, (*_CONVOLUTIONS, nn.Linear))]
    hooks = [x.register_forward_hook(lambda layer, *_: ran.append(layer)) for x in layers]
    try:
        with torch.no_grad():
            network.filter_maps(images)
    finally:
        for hook in hooks:
            hook.remove()
    if not ran:
        raise ValueError("features: no convolution or linear layer makes the maps")
    last = ran[-1]
    assert isinstance(last.weight, Tensor)
    weight = whole(last.weight.detach())
    if len(weight) != network.num_filters:
        raise ValueError(
            f"features: the last convolution has {len(weight)} filters, want {network.num_filters},"
            " as the maps"
        )
    if isinstance(last, _CONVOLUTIONS) and last.groups > 1:
        raise ValueError(
            f"features: the last convolution has {last.groups} groups, want 1: filters that look at"
            " the same channels"
        )
    return weight.flatten(1)
