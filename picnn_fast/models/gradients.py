"""Gradients of logits and of filters, of which attributions are made."""

import torch
from torch import Tensor

from picnn_fast.models.base import InterpretableNetwork


def logit_gradients(
    network: InterpretableNetwork, maps: Tensor, targets: Tensor, bypass: Tensor | None = None
) -> Tensor:
    """Gradients of logits with respect to the maps that the head reads.

    The caller's gradient mode makes no difference, and gradients of parameters are left alone.

    Args:
        network: in eval mode, in which the logits of an image hang on that image alone.
        maps: ``[B, N, h, w]`` or as the network's ``channel_dim`` says, as of ``encode``.
        targets: ``[B, T]`` int64 in [0, K), of each image the classes whose logits count.
        bypass: what ``encode`` yields beside the maps.

    Returns:
        ``[B, T, …]``, the rest as of ``maps``.
    """
    with torch.inference_mode(False), torch.enable_grad():
        maps = maps.detach().clone().requires_grad_()
        past = None if bypass is None else bypass.detach().clone()
        chosen = network.head_logits(maps, bypass=past).gather(1, targets.clone())
        return torch.stack(_by_column(chosen, maps), 1)


def class_activation(
    network: InterpretableNetwork, maps: Tensor, targets: Tensor, bypass: Tensor | None = None
) -> Tensor:
    """Class activation maps: the filters' maps, weighted by what each adds to a logit.

    A filter's weight is the mean of the logit's gradient over the positions of its map, as in
    Grad-CAM, whose ReLU is left out. Behind global pooling, average or maximum, and one linear
    layer, that is the row of the classifier over h · w: the maps are those of CAM up to a factor.

    Args:
        network: in eval mode, with maps ``[B, N, h, w]``.
        maps, targets, bypass: as of ``logit_gradients``.

    Returns:
        ``[B, T, h, w]``, of either sign.

    Source:
        Zhou et al., "Learning Deep Features for Discriminative Localization", CVPR 2016, eq. 2;
        Selvaraju et al., "Grad-CAM", ICCV 2017, eq. 1-2 and section 3.1.

    Example:
        >>> import torch
        >>> from picnn_fast.explain import class_activation
        >>> from picnn_fast.models import make_interpretable
        >>> network = make_interpretable("small-resnet", num_classes=10).eval()
        >>> maps, bypass = network.encode(torch.rand(2, 1, 8, 8))
        >>> targets = torch.tensor([[3, 4, 5], [7, 8, 9]])  # three classes each
        >>> class_activation(network, maps, targets, bypass).shape == (2, 3, *maps.shape[2:])
        True
    """
    weights = logit_gradients(network, maps, targets, bypass).mean((3, 4))
    return torch.einsum("btn,bnhw->bthw", weights, maps.detach())


def filter_saliency(network: InterpretableNetwork, images: Tensor, filters: Tensor) -> Tensor:
    """How much each pixel moves a filter: the gradient of its mean activation, its norm by colours.

    The caller's gradient mode makes no difference, and gradients of parameters are left alone.

    Args:
        network: in eval mode.
        images: ``[B, C, H, W]`` as the network takes them.
        filters: ``[B, F]`` int64 in [0, N), of each image those that count. Each of the F takes a
            backward pass of the batch.

    Returns:
        ``[B, F, H, W]``, at least 0.

    Source:
        Liang et al., "Training Interpretable Convolutional Neural Networks by Differentiating
        Class-Specific Filters", ECCV 2020, section 5.1 (GradMap), after Simonyan et al., 2013.

    Example:
        >>> import torch
        >>> from picnn_fast.explain import filter_saliency
        >>> from picnn_fast.models import make_interpretable
        >>> network = make_interpretable("small-resnet", num_classes=10).eval()
        >>> filters = torch.tensor([[0, 5], [5, 9]])  # two each
        >>> filter_saliency(network, torch.rand(2, 1, 8, 8), filters).shape
        torch.Size([2, 2, 8, 8])
    """
    with torch.inference_mode(False), torch.enable_grad():
        images = images.detach().clone().requires_grad_()
        maps = network.encode(images)[0].movedim(network.channel_dim, 1)
        return _saliency(maps.flatten(2).mean(2).gather(1, filters.clone()), images)


def class_saliency(network: InterpretableNetwork, images: Tensor, labels: Tensor) -> Tensor:
    """How much each pixel moves the probability of a class: as ``filter_saliency`` of a filter.

    Args:
        network: in eval mode.
        images: ``[B, C, H, W]`` as the network takes them.
        labels: ``[B]`` int64 in [0, K).

    Returns:
        ``[B, H, W]``, at least 0.

    Example:
        >>> import torch
        >>> from picnn_fast.explain import class_saliency
        >>> from picnn_fast.models import make_interpretable
        >>> network = make_interpretable("small-resnet", num_classes=10).eval()
        >>> class_saliency(network, torch.rand(2, 1, 8, 8), torch.tensor([3, 7])).shape
        torch.Size([2, 8, 8])
    """
    with torch.inference_mode(False), torch.enable_grad():
        images = images.detach().clone().requires_grad_()
        maps, bypass = network.encode(images)
        scores = network.head_logits(maps, bypass=bypass).softmax(1)
        return _saliency(scores.gather(1, labels.clone()[:, None]), images)[:, 0]


def _by_column(values: Tensor, inputs: Tensor) -> list[Tensor]:
    """Of values ``[B, T]``, each of its own image, T gradients with respect to the inputs."""
    return [
        torch.autograd.grad(column.sum(), inputs, retain_graph=True)[0]
        for column in values.unbind(1)
    ]


def _saliency(values: Tensor, images: Tensor) -> Tensor:
    # A norm along an axis of few takes ten times as long.
    return torch.stack([x.square().sum(1).sqrt() for x in _by_column(values, images)], 1)
