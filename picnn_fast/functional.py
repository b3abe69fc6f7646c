"""Differentiable functions on tensors: the operators of picnn_fast as plain PyTorch calls."""

import math

import torch
from torch import Tensor

from picnn_fast.ops import checks
from picnn_fast.ops import masking as _masking

__all__ = ["bernoulli_mask", "class_gate", "gumbel_mask"]


def bernoulli_mask(
    features: Tensor,
    logits: Tensor,
    correspondence: Tensor,
    *,
    seed: int | Tensor | None = None,
    rank: int | None = None,
    channel_dim: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mask feature maps by the filters drawn for a pseudo-label (PICNN, eq. 4-10).

    A pseudo-label is drawn for each sample from softmax(logits); filter i of that sample is kept
    with probability ``correspondence[pseudo_label, i]``. Gradients are straight-through: those of
    ``mask = ỹ @ correspondence`` with ỹ the one-hot pseudo-label carrying the gradient of
    softmax(logits). The same seed gives the same mask on every backend and device, bit for bit.

    Args:
        features: ``[B, N, *spatial]`` float32, float64, bfloat16 or float16. Contiguous and
            channels_last inputs are read in place and keep their layout.
        logits: ``[B, K]`` of the discrimination pathway, any of these dtypes (float16 and
            bfloat16 are widened to float32). A row with NaN or +inf draws the last class.
        correspondence: ``[K, N]`` probabilities in [0, 1], any of these dtypes.
        seed: 64-bit int, or int64 tensor of one element on the device of ``features``; None draws
            one from torch's generator, so ``torch.manual_seed`` reproduces the call.
        rank: separates the draws of processes that share a seed; None takes the rank in the
            default process group, 0 alone.
        channel_dim: the filter axis of ``features``, e.g. -1 for ``[B, T, N]`` tokens.

    Returns:
        masked, like ``features`` (exactly 0 where a filter is dropped, whatever its map holds);
        mask ``[B, N]`` of 0 and 1 in the dtype of ``features``; pseudo_label ``[B]`` int64, not
        differentiable.

    Raises:
        TypeError: unsupported dtype, or a seed or rank that is no int.
        ValueError: shapes or devices that disagree; probabilities outside [0, 1] or not finite.
            On a GPU, and under torch.compile, this last check runs on the device without a host
            sync and fails as a device-side assert (RuntimeError), as in ``torch.bernoulli``.

    Note:
        The gradient of the mask is the sum over positions of features times gradient, for dropped
        filters too (that is how they learn to come back), so a NaN in a dropped map makes the
        gradient of that one probability NaN.

    Example:
        >>> import torch
        >>> from picnn_fast.functional import bernoulli_mask
        >>> masked, mask, pseudo_label = bernoulli_mask(
        ...     torch.ones(2, 3, 4, 4), torch.tensor([[9., 0.], [0., 9.]]),
        ...     torch.tensor([[1., 0., 1.], [0., 1., 0.]]), seed=0)
        >>> pseudo_label.tolist(), mask.tolist()
        ([0, 1], [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    """
    return _masking.bernoulli_mask(
        features, logits, correspondence, seed=seed, rank=rank, channel_dim=channel_dim
    )


def class_gate(features: Tensor, gate: Tensor, labels: Tensor, *, channel_dim: int = 1) -> Tensor:
    """Scale feature maps by the gate row of each sample's label (Class-Specific Gate, section 3.1).

    Args:
        features: ``[B, N, *spatial]`` float32, float64, bfloat16 or float16.
        gate: ``[K, N]`` any of these dtypes; used in float32 (float64 for float64 features).
        labels: ``[B]`` integers in [0, K).
        channel_dim: the filter axis of ``features``.

    Returns:
        ``features * gate[labels]``, like ``features``; exactly 0 where the gate is 0.

    Raises:
        TypeError: unsupported dtype, labels that are not integers.
        ValueError: shapes or devices that disagree, labels out of range (on a GPU and under
            torch.compile a device-side assert, see ``bernoulli_mask``).

    Example:
        >>> import torch
        >>> from picnn_fast.functional import class_gate
        >>> gate, labels = torch.tensor([[.5, 0.]]), torch.tensor([0])
        >>> class_gate(torch.ones(1, 2, 1, 1), gate, labels).flatten()
        tensor([0.5000, 0.0000])
    """
    return _masking.class_gate(features, gate, labels, channel_dim=channel_dim)


def gumbel_mask(
    features: Tensor,
    logits: Tensor,
    correspondence: Tensor,
    *,
    temperature: float = 0.01,
    seed: int | Tensor | None = None,
    channel_dim: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gumbel-softmax in place of the Bernoulli draw: the ablation of PICNN, table 4.

    In plain PyTorch, but for the masking itself.

    One assignment of filters to classes is drawn per call, a Gumbel-softmax of ``correspondence``
    over the class axis with noise from torch's generator, and each sample is masked by the row of
    its pseudo-label. The pseudo-label is drawn, and differentiated, as in ``bernoulli_mask``.

    Args:
        temperature: of the Gumbel-softmax; > 0.
        features, logits, correspondence, seed, channel_dim: see ``bernoulli_mask``; ``seed`` rules
            the pseudo-label alone.

    Returns:
        masked, mask (in [0, 1], near 0 or 1 at low temperature) and pseudo_label, as
        ``bernoulli_mask``.

    Raises:
        TypeError, ValueError: a temperature that is not a positive number; and as
            ``bernoulli_mask``.

    Example:
        >>> import torch
        >>> from picnn_fast.functional import gumbel_mask
        >>> _, mask, _ = gumbel_mask(
        ...     torch.ones(1, 2, 3, 3), torch.tensor([[9., 0.]]), torch.eye(2), seed=0)
        >>> mask.round().tolist()
        [[1.0, 0.0]]
    """
    if isinstance(temperature, bool) or not isinstance(temperature, int | float):
        raise TypeError(f"temperature: got {type(temperature).__name__}, want a number")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: got {temperature}, want a number > 0")
    # The pseudo-label and the checks of bernoulli_mask, on maps of no size.
    maps = _masking.channels_second(features, channel_dim)
    _masking.check_table("correspondence", correspondence, maps.shape[1], features, channel_dim)
    empty = maps.new_empty((*maps.shape[:2], 0))
    _, _, pseudo_label = bernoulli_mask(empty, logits, correspondence, seed=seed)
    assignment = torch.nn.functional.gumbel_softmax(
        checks.accumulable(correspondence).clamp_min(torch.finfo(torch.float32).tiny).log(),
        tau=temperature,
        dim=0,
    )
    y1 = checks.accumulable(logits).softmax(-1)
    one_hot = torch.nn.functional.one_hot(pseudo_label, logits.shape[-1])
    with torch.autocast(features.device.type, enabled=False):
        mask = (one_hot + y1 - y1.detach()).to(assignment.dtype) @ assignment
    rows = torch.arange(len(mask), device=mask.device)
    masked = class_gate(features, mask, rows, channel_dim=channel_dim)
    return masked, mask.to(features.dtype), pseudo_label
