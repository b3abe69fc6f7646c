"""Operators of the masking family: masks of channels, drawn (PICNN) or by a gate's rows (CSG)."""

from typing import Any, Literal

import torch
from torch import Tensor

from picnn_fast import checks
from picnn_fast.ops.define import define
from picnn_fast.ops.layout import as_dtype, readable
from picnn_fast.reference import masking as reference


def bernoulli_mask(
    features: Tensor,
    logits: Tensor,
    correspondence: Tensor,
    *,
    seed: int | Tensor | None = None,
    rank: int | None = None,
    channel_dim: int = 1,
    validate: bool = True,
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
        validate: False leaves out the check that ``correspondence`` holds probabilities, where
            the caller made them such, as a softmax does.

    Returns:
        masked, like ``features`` (exactly 0 where a filter is dropped, whatever its map holds);
        mask ``[B, N]`` of 0 and 1 in the dtype of ``features``; pseudo_label ``[B]`` int64, not
        differentiable.

    Raises:
        TypeError: unsupported dtype, or a seed or rank that is no int.
        ValueError: shapes or devices that disagree; probabilities outside [0, 1] or not finite.
            On a GPU, and under torch.compile, the kernel makes this last check as it draws, without
            a host sync, and fails as a device-side assert (RuntimeError), as ``torch.bernoulli``.

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
    maps = _channels_second(features, channel_dim)
    _check_draws(maps, logits, correspondence, channel_dim)
    rank, seed = checks.rank(rank), checks.seed(seed, features.device)
    arguments = checks.accumulable(logits), checks.accumulable(correspondence), seed, rank
    try:
        masked, mask, pseudo_label = _bernoulli_mask_operator(readable(maps), *arguments, validate)
    except RuntimeError:
        if validate:
            checks.probabilities("correspondence", correspondence)
        raise
    if channel_dim != 1:
        masked = masked.movedim(1, channel_dim)
    return masked, as_dtype(mask, features.dtype), pseudo_label


def gumbel_mask(
    features: Tensor,
    logits: Tensor,
    correspondence: Tensor,
    *,
    temperature: float = 0.01,
    seed: int | Tensor | None = None,
    channel_dim: int = 1,
    validate: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gumbel-softmax in place of the Bernoulli draw: the ablation of PICNN, table 4.

    One assignment of filters to classes is drawn per call, a Gumbel-softmax of ``correspondence``
    over the class axis with noise from torch's generator, and each sample is masked by the row of
    its pseudo-label. The pseudo-label is drawn, and differentiated, as in ``bernoulli_mask``; in
    plain PyTorch, but for that draw and the masking itself.

    Args:
        temperature: of the Gumbel-softmax; > 0.
        features, logits, correspondence, seed, channel_dim, validate: see ``bernoulli_mask``;
            ``seed`` rules the pseudo-label alone.

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
    checks.positive("temperature", temperature)
    maps = _channels_second(features, channel_dim)
    _check_draws(maps, logits, correspondence, channel_dim)
    rank, seed = checks.rank(None), checks.seed(seed, features.device)
    if validate:
        checks.probabilities("correspondence", correspondence)
    logits, table = checks.accumulable(logits), checks.accumulable(correspondence)
    pseudo_label = _draw_labels_operator(logits.detach(), seed, rank)
    assignment = torch.nn.functional.gumbel_softmax(
        table.clamp_min(torch.finfo(torch.float32).tiny).log(), tau=temperature, dim=0
    )
    y1 = logits.softmax(-1)
    with torch.autocast(features.device.type, enabled=False):
        mask = (_one_hot(pseudo_label, y1) + y1 - y1.detach()).to(assignment.dtype) @ assignment
    masked = mask_channels(features, mask, channel_dim=channel_dim)
    return masked, as_dtype(mask, features.dtype), pseudo_label


def draw_mask(
    correspondence: Tensor,
    labels: Tensor,
    *,
    seed: int | Tensor | None = None,
    rank: int | None = None,
    validate: bool = True,
) -> Tensor:
    """Draw masks of channels for labels that are given (PICNN, eq. 7).

    Args:
        correspondence: ``[K, N]`` probabilities in [0, 1], float32, float64, bfloat16 or float16.
        labels: ``[B]`` integers in [0, K).
        seed, rank, validate: see ``bernoulli_mask``, whose mask this is where it draws these
            labels.

    Returns:
        ``[B, N]`` of 0 and 1 in the dtype of ``correspondence``, whose gradient is that of
        ``correspondence[labels]`` (straight-through).

    Raises:
        TypeError: unsupported dtype, labels that are not integers, a seed or rank that is no int.
        ValueError: shapes or devices that disagree; labels out of range, probabilities outside
            [0, 1] or not finite (on a GPU and under torch.compile a device-side assert, see
            ``bernoulli_mask``).

    Example:
        >>> import torch
        >>> from picnn_fast.functional import draw_mask
        >>> draw_mask(torch.tensor([[1., 0.], [0., 1.]]), torch.tensor([1, 0, 1]))
        tensor([[0., 1.],
                [1., 0.],
                [0., 1.]])
    """
    _check_table("correspondence", correspondence)
    checks.tensor("labels", labels)
    checks.labels("labels", labels, labels.numel(), correspondence.shape[0], by_kernel=True)
    checks.same_device("labels", labels, "correspondence", correspondence)
    rank, seed = checks.rank(rank), checks.seed(seed, correspondence.device)
    table = checks.accumulable(correspondence)
    try:
        mask: Tensor = _draw_filters_operator(
            table, seed, rank, as_dtype(labels, torch.int64), validate
        )
    except RuntimeError:
        checks.labels("labels", labels, labels.numel(), correspondence.shape[0])
        if validate:
            checks.probabilities("correspondence", correspondence)
        raise
    return as_dtype(mask, correspondence.dtype)


def draw_labels(
    logits: Tensor, *, seed: int | Tensor | None = None, rank: int | None = None
) -> Tensor:
    """Draw pseudo-labels from softmax(logits) (PICNN, eq. 9-10).

    Args:
        logits: ``[B, K]`` float32, float64, bfloat16 or float16. A row with NaN or +inf draws the
            last class.
        seed, rank: see ``bernoulli_mask``, whose pseudo-labels these are.

    Returns:
        ``[B]`` int64, not differentiable.

    Raises:
        TypeError: unsupported dtype, a seed or rank that is no int.
        ValueError: no logits ``[B, K]`` of at least one class, a seed or rank out of range.

    Example:
        >>> import torch
        >>> from picnn_fast.functional import draw_labels
        >>> draw_labels(torch.tensor([[9., 0.], [0., 9.]]), seed=0)
        tensor([0, 1])
    """
    checks.floating("logits", logits)
    if logits.ndim != 2 or logits.shape[1] < 1:
        raise ValueError(
            f"logits: got shape {tuple(logits.shape)}, want [samples, classes], at least one class"
        )
    rank, seed = checks.rank(rank), checks.seed(seed, logits.device)
    label: Tensor = _draw_labels_operator(checks.accumulable(logits).detach(), seed, rank)
    return label


def mask_channels(features: Tensor, mask: Tensor, *, channel_dim: int = 1) -> Tensor:
    """Scale each channel of each sample's feature maps.

    Args:
        features: ``[B, N, *spatial]`` float32, float64, bfloat16 or float16.
        mask: ``[B, N]`` any of these dtypes; used in float32 (float64 for float64 features).
        channel_dim: the filter axis of ``features``.

    Returns:
        ``features[b, i] * mask[b, i]``, like ``features``; exactly 0 where the mask is 0, whatever
        the features hold there.

    Raises:
        TypeError: unsupported dtype.
        ValueError: shapes or devices that disagree.

    Example:
        >>> import torch
        >>> from picnn_fast.functional import mask_channels
        >>> mask_channels(torch.ones(1, 2, 1, 1), torch.tensor([[0.5, 0.0]])).flatten()
        tensor([0.5000, 0.0000])
    """
    maps = _channels_second(features, channel_dim)
    checks.floating("mask", mask)
    if mask.shape != maps.shape[:2]:
        raise ValueError(
            f"mask: got shape {tuple(mask.shape)}, want {tuple(maps.shape[:2])}: the batch and the"
            f" channels, axis {channel_dim}, of features {tuple(features.shape)}"
        )
    checks.same_device("mask", mask, "features", features)
    masked: Tensor = _mask_channels_operator(
        readable(maps), as_dtype(mask, reference.accumulate_dtype(features.dtype))
    )
    return masked if channel_dim == 1 else masked.movedim(1, channel_dim)


def class_gate(features: Tensor, gate: Tensor, labels: Tensor, *, channel_dim: int = 1) -> Tensor:
    """Scale feature maps by the gate row of each sample's label (Class-Specific Gate, section 3.1).

    Args:
        features: ``[B, N, *spatial]`` float32, float64, bfloat16 or float16.
        gate: ``[K, N]`` any of these dtypes; used in float32 (float64 for float64 features).
        labels: ``[B]`` integers in [0, K).
        channel_dim: the filter axis of ``features``.

    Returns:
        ``mask_channels(features, gate[labels])``: exactly 0 where the gate is 0.

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
    maps = _channels_second(features, channel_dim)
    _check_filters("gate", gate, maps, channel_dim)
    checks.labels("labels", labels, maps.shape[0], gate.shape[0], by_kernel=True)
    checks.same_device("labels", labels, "features", features)
    # Widened before a row is taken: the gradients of its samples are summed in the wider type.
    table = as_dtype(gate, reference.accumulate_dtype(features.dtype))
    try:
        gated: Tensor = _class_gate_operator(readable(maps), table, as_dtype(labels, torch.int64))[
            0
        ]
    except RuntimeError:
        checks.labels("labels", labels, maps.shape[0], gate.shape[0])
        raise
    return gated if channel_dim == 1 else gated.movedim(1, channel_dim)


def project_gate(gate: Tensor) -> Tensor:
    """A gate back among those allowed: in [0, 1], and 1 for some class of every filter.

    Each filter's column is divided by its greatest element, the sign included, and clipped to
    [0, 1], as in the authors' code. A column without a positive element, which yields NaN or all
    ones there, becomes 1 at its greatest element and 0 elsewhere. Composed of PyTorch's operators:
    a gate is small beside the maps it is for.

    Args:
        gate: ``[K, N]`` float32, float64, bfloat16 or float16.

    Returns:
        Of the same shape and dtype; what is allowed already is returned as it is. A column with
        NaN keeps it.

    Raises:
        TypeError: unsupported dtype.
        ValueError: no gate ``[K, N]`` of at least one class.

    Source:
        Liang et al., "Training Interpretable Convolutional Neural Networks by Differentiating
        Class-specific Filters", ECCV 2020, section 3.4.

    Example:
        >>> import torch
        >>> from picnn_fast.functional import project_gate
        >>> project_gate(torch.tensor([[0.2, -3.0], [0.4, -1.0]]))
        tensor([[0.5000, 0.0000],
                [1.0000, 1.0000]])
    """
    return reference.project_gate(_gate(gate))


def gate_penalty(
    gate: Tensor, bound: float, *, norm: Literal["l1", "l2", "smooth_l1"] = "l1"
) -> Tensor:
    """What is to be paid for a gate above its bound: ψ(max(‖gate‖₁ - bound, 0)) (CSG, eq. 3).

    Args:
        gate: ``[K, N]`` float32, float64, bfloat16 or float16.
        bound: g, a number >= 0.
        norm: ψ(r): "l1" is r, "l2" is r², "smooth_l1" r²/2 up to 1 and r - 1/2 beyond.

    Returns:
        A scalar, float64 for a float64 gate, else float32.

    Raises:
        TypeError: unsupported dtype, a bound that is no number.
        ValueError: no gate ``[K, N]``, a bound below 0, an unknown norm.

    Example:
        >>> import torch
        >>> from picnn_fast.functional import gate_penalty
        >>> gate_penalty(torch.ones(2, 3), 4.0), gate_penalty(torch.ones(2, 3), 7.0)
        (tensor(2.), tensor(0.))
    """
    checks.non_negative("bound", bound)
    checks.one_of("norm", norm, ("l1", "l2", "smooth_l1"))
    return reference.gate_penalty(checks.accumulable(_gate(gate)), bound, norm)


# Checks -------------------------------------------------------------------------------------------


def _channels_second(features: Tensor, channel_dim: int) -> Tensor:
    """A view ``[B, N, *spatial]``, after checking both arguments."""
    checks.floating("features", features)
    if features.ndim < 2:
        raise ValueError(
            f"features: got shape {tuple(features.shape)}, want at least 2 axes: batch, channels"
        )
    if type(channel_dim) is int and channel_dim == 1:
        return features
    if isinstance(channel_dim, bool) or not isinstance(channel_dim, int):
        raise TypeError(f"channel_dim: got {type(channel_dim).__name__}, want an int")
    if not -features.ndim <= channel_dim < features.ndim or channel_dim % features.ndim == 0:
        raise ValueError(
            f"channel_dim: got {channel_dim}, want an axis of features other than the batch axis 0"
            f" (features has shape {tuple(features.shape)})"
        )
    return features.movedim(channel_dim, 1)


def _check_table(name: str, table: Tensor) -> None:
    checks.floating(name, table)
    if table.ndim != 2:
        raise ValueError(f"{name}: got shape {tuple(table.shape)}, want [classes, filters]")


def _check_filters(name: str, table: Tensor, maps: Tensor, channel_dim: int) -> None:
    _check_table(name, table)
    if table.shape[1] != maps.shape[1]:
        raise ValueError(
            f"{name}: got {table.shape[1]} filters (shape {tuple(table.shape)}), want"
            f" {maps.shape[1]}, the size of axis {channel_dim} of features"
        )
    checks.same_device(name, table, "features", maps)


def _check_draws(maps: Tensor, logits: Tensor, correspondence: Tensor, channel_dim: int) -> None:
    _check_filters("correspondence", correspondence, maps, channel_dim)
    if correspondence.shape[0] < 1:
        raise ValueError("correspondence: got no class, want at least one row")
    checks.floating("logits", logits)
    expected = (maps.shape[0], correspondence.shape[0])
    if tuple(logits.shape) != expected:
        raise ValueError(
            f"logits: got shape {tuple(logits.shape)}, want {expected}:"
            " the batch of features and the classes of correspondence"
        )
    checks.same_device("logits", logits, "features", maps)


def _gate(value: Tensor) -> Tensor:
    checks.floating("gate", value)
    if value.ndim != 2 or len(value) == 0:
        raise ValueError(
            f"gate: got shape {tuple(value.shape)}, want [classes, filters], at least one class"
        )
    return value


# Between the two ----------------------------------------------------------------------------------


def _rows(table: Tensor, labels: Tensor) -> Tensor:
    """``table[labels]``, whose gradient has the same bits every time: no atomic sums."""
    return torch.embedding(table, as_dtype(labels, torch.int64))


def _one_hot(labels: Tensor, like: Tensor) -> Tensor:
    """Rows like ``like``'s; PyTorch's own ``one_hot`` cannot be mapped over by ``vmap``."""
    return torch.zeros_like(like).scatter(-1, labels[:, None], 1.0)


# Draws --------------------------------------------------------------------------------------------


def _fake_draw_labels(logits: Tensor, seed: Tensor, rank: int) -> Tensor:
    return logits.new_empty(logits.shape[:1], dtype=torch.int64)


_draw_labels_operator = define(
    "masking",
    "draw_labels(Tensor logits, Tensor seed, SymInt rank) -> Tensor",
    reference=reference.draw_labels,
    fake=_fake_draw_labels,
)


def _fake_draw_filters(
    probabilities: Tensor,
    seed: Tensor,
    rank: int,
    labels: Tensor | None = None,
    validate: bool = False,
) -> Tensor:
    batch = probabilities.shape[:1] if labels is None else labels.shape
    return probabilities.new_empty((*batch, probabilities.shape[1]))


def _setup_draw_filters(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    probabilities, _, _, labels = (*inputs, None)[:4]
    ctx.classes = probabilities.shape[0]
    if labels is not None:
        ctx.save_for_backward(labels)


def _draw_filters_gradient(ctx: Any, saved: tuple[Tensor, ...], grad_mask: Tensor) -> tuple[Tensor]:
    """Straight through."""
    if not saved:
        return (grad_mask,)
    return (_sums_by_label(grad_mask, saved[0], ctx.classes),)


def _sums_by_label(rows: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The operator, or others that have a derivative where one may be asked for."""
    if not torch.is_grad_enabled():
        found: Tensor = _SUMS_BY_LABEL(rows, labels, classes)
        return found
    sums = rows.new_zeros(classes, rows.shape[1])
    return sums.index_put((labels,), rows, accumulate=True)


def _fake_sums_by_label(rows: Tensor, labels: Tensor, classes: int) -> Tensor:
    return rows.new_empty((classes, rows.shape[1]))


define(
    "masking",
    "sums_by_label(Tensor rows, Tensor labels, SymInt classes) -> Tensor",
    reference=reference.sums_by_label,
    fake=_fake_sums_by_label,
)


_draw_filters_operator = define(
    "masking",
    "draw_filters(Tensor probabilities, Tensor seed, SymInt rank, Tensor? labels=None,"
    " bool validate=False) -> Tensor",
    reference=reference.draw_filters,
    fake=_fake_draw_filters,
    setup_context=_setup_draw_filters,
    backward=_draw_filters_gradient,
)


# The Bernoulli mask -------------------------------------------------------------------------------


def _fake_bernoulli_mask(
    features: Tensor,
    logits: Tensor,
    correspondence: Tensor,
    seed: Tensor,
    rank: int,
    validate: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    mask_dtype = reference.accumulate_dtype(features.dtype)
    return (
        torch.empty_like(features),
        features.new_empty(features.shape[:2], dtype=mask_dtype),
        logits.new_empty(logits.shape[:1], dtype=torch.int64),
    )


def _setup_bernoulli_mask(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    features, logits, correspondence = inputs[:3]
    _, mask, pseudo_label = output
    ctx.save_for_backward(features, logits, correspondence, mask, pseudo_label)
    ctx.mark_non_differentiable(pseudo_label)


def _bernoulli_mask_gradient(
    ctx: Any,
    saved: tuple[Tensor, ...],
    grad_masked: Tensor | None,
    grad_mask: Tensor | None,
    _: None,
) -> tuple[Tensor | None, ...]:
    """Straight-through (PICNN eq. 5, 8)."""
    features, logits, correspondence, mask, pseudo_label = saved
    grad_features, grad_z = None, grad_mask
    if grad_masked is not None:
        grad_features, grad_z = _maps_gradient(grad_masked, features, mask)
        if grad_mask is not None:
            grad_z = grad_z + grad_mask
    grad_logits = grad_correspondence = None
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        assert grad_z is not None
        dtype = logits.dtype
        if dtype != correspondence.dtype:
            dtype = torch.promote_types(dtype, correspondence.dtype)
        grad_logits, grad_correspondence = _parameters_gradient(
            as_dtype(grad_z, dtype),
            as_dtype(logits, dtype),
            as_dtype(correspondence, dtype),
            pseudo_label,
        )
        grad_logits = as_dtype(grad_logits, logits.dtype)
        grad_correspondence = as_dtype(grad_correspondence, correspondence.dtype)
    return grad_features, grad_logits, grad_correspondence


def _parameters_gradient(
    grad_z: Tensor, logits: Tensor, correspondence: Tensor, pseudo_label: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the logits and of the correspondence.

    In PyTorch's own operators where they may be differentiated again.
    """
    if not torch.is_grad_enabled():
        grads: tuple[Tensor, Tensor] = _PARAMETERS_BACKWARD(
            grad_z, logits, correspondence, pseudo_label
        )
        return grads
    y1 = logits.softmax(-1)
    with torch.autocast(logits.device.type, enabled=False):
        grad_y1 = grad_z @ correspondence.T
        # Straight through: the one-hot label carries the gradient of the softmax here too.
        grad_correspondence = (_one_hot(pseudo_label, y1) + y1 - y1.detach()).T @ grad_z
    return y1 * (grad_y1 - (y1 * grad_y1).sum(-1, keepdim=True)), grad_correspondence


_bernoulli_mask_operator = define(
    "masking",
    "bernoulli_mask(Tensor features, Tensor logits, Tensor correspondence, Tensor seed,"
    " SymInt rank, bool validate=False) -> (Tensor masked, Tensor mask, Tensor pseudo_label)",
    reference=reference.bernoulli_mask,
    fake=_fake_bernoulli_mask,
    setup_context=_setup_bernoulli_mask,
    backward=_bernoulli_mask_gradient,
)


def _fake_parameters_backward(
    grad_mask: Tensor, logits: Tensor, correspondence: Tensor, pseudo_label: Tensor
) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape), correspondence.new_empty(correspondence.shape)


define(
    "masking",
    "bernoulli_parameters_backward(Tensor grad_mask, Tensor logits, Tensor correspondence,"
    " Tensor pseudo_label) -> (Tensor grad_logits, Tensor grad_correspondence)",
    reference=reference.bernoulli_parameters_backward,
    fake=_fake_parameters_backward,
)


# Masks that are given -----------------------------------------------------------------------------


def _fake_mask_channels(features: Tensor, mask: Tensor) -> Tensor:
    return torch.empty_like(features)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    ctx.save_for_backward(*inputs)


def _maps_gradient(grad_masked: Tensor, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the maps and of the mask."""
    grads: tuple[Tensor, Tensor] = _MASKING_BACKWARD(readable(grad_masked), features, mask)
    return grads


def _mask_channels_gradient(
    ctx: Any, saved: tuple[Tensor, Tensor], grad_masked: Tensor
) -> tuple[Tensor, Tensor]:
    return _maps_gradient(grad_masked, *saved)


_mask_channels_operator = define(
    "masking",
    "mask_channels(Tensor features, Tensor mask) -> Tensor",
    reference=reference.mask_channels,
    fake=_fake_mask_channels,
    setup_context=_save_inputs,
    backward=_mask_channels_gradient,
)


def _fake_class_gate(features: Tensor, gate: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(features), gate.new_empty(features.shape[:2])


def _setup_class_gate(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    features, gate, labels = inputs
    rows = output[1]
    ctx.classes = gate.shape[0]
    ctx.save_for_backward(features, gate, labels, rows)
    ctx.mark_non_differentiable(rows)


def _class_gate_gradient(
    ctx: Any, saved: tuple[Tensor, ...], grad_masked: Tensor, _: None
) -> tuple[Tensor, Tensor]:
    features, gate, labels, rows = saved
    if torch.is_grad_enabled():  # the rows may be differentiated, too
        rows = _rows(gate, labels)
    grad_features, grad_rows = _maps_gradient(grad_masked, features, rows)
    return grad_features, _sums_by_label(grad_rows, labels, ctx.classes)


_class_gate_operator = define(
    "masking",
    "class_gate(Tensor features, Tensor gate, Tensor labels) -> (Tensor masked, Tensor rows)",
    reference=reference.class_gate,
    fake=_fake_class_gate,
    setup_context=_setup_class_gate,
    backward=_class_gate_gradient,
)


def _fake_masking_backward(
    grad_masked: Tensor, features: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(features), mask.new_empty(mask.shape)


def _masking_backward_gradient(
    ctx: Any,
    saved: tuple[Tensor, Tensor, Tensor],
    grad_grad_features: Tensor | None,
    grad_grad_mask: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of ``grad_masked * mask`` and of the sums of ``features * grad_masked``, rounded once."""
    dtype, mask = saved[0].dtype, saved[2]
    grad_masked, features = (as_dtype(t, mask.dtype) for t in saved[:2])
    to_grad = to_features = to_mask = None
    if grad_grad_features is not None:
        wide = as_dtype(grad_grad_features, mask.dtype)
        to_grad, to_mask = _maps_gradient(wide, grad_masked, mask)
    if grad_grad_mask is not None:
        scale = torch.ops.picnn_fast.mask_channels.default
        to_features = as_dtype(scale(grad_masked, grad_grad_mask), dtype)
        through = scale(features, grad_grad_mask)
        to_grad = through if to_grad is None else to_grad + through
    return None if to_grad is None else as_dtype(to_grad, dtype), to_features, to_mask


define(
    "masking",
    "masking_backward(Tensor grad_masked, Tensor features, Tensor mask)"
    " -> (Tensor grad_features, Tensor grad_mask)",
    reference=reference.masking_backward,
    fake=_fake_masking_backward,
    setup_context=_save_inputs,
    backward=_masking_backward_gradient,
)
# Bound once; Dynamo, which compiles backward passes, too, knows overloads alone.
_MASKING_BACKWARD = torch.ops.picnn_fast.masking_backward.default
_PARAMETERS_BACKWARD = torch.ops.picnn_fast.bernoulli_parameters_backward.default
_SUMS_BY_LABEL = torch.ops.picnn_fast.sums_by_label.default
