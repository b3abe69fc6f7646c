"""Operators of the template family: part templates and the mask layer of Interpretable CNNs."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from picnn_fast import checks
from picnn_fast.ops.define import define
from picnn_fast.ops.layout import readable
from picnn_fast.reference import templates as reference
from picnn_fast.reference.masking import accumulate_dtype

# Squared distances fit an int32.
MOST_SIDE = 2**15
# How the operators' schemas take a template; ``PartTemplate.arguments`` yields it.
ARGUMENTS = "Tensor? table, int profile, int norm, float slope, SymInt limit"
CENTERS = ("argmax", "mass")

Arguments = tuple[Tensor | None, int, int, float, int]


@dataclasses.dataclass(frozen=True, eq=False)  # a profile may be a tensor
class PartTemplate:
    """The shape of an object part on a feature map: what T_mu is at a distance d from its peak mu.

    On maps ``[h, w]`` with n = max(h, w), d the distance in map positions:

    - "gradient": T_mu = tau·max(1 - beta·d / n, -1);
    - "uniform": T_mu = tau where beta·d / n < gamma, else -tau;
    - a function: T_mu = tau·profile(d), of a tensor of distances, returning a tensor alike;
    - a tensor ``[2H - 1, 2W - 1]``: T_mu / tau at each offset from mu, the middle entry at mu;
      serves maps of up to H x W.

    Args:
        norm: "l1" or "l2": the distance. Without effect on a tensor.
        profile: "gradient", "uniform", a function of the distance, or a tensor of offsets.
        beta: None takes 4 for "gradient", 2 for "uniform"; of these two alone. "published", of
            "gradient" alone: 4·n / (n - 1), the text's 4 on coordinates from -1 to 1, as the
            authors' code has it.
        gamma: None takes 2; of "uniform" alone.
        tau: None takes 0.5 / n².

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an argument out of range, or of another profile.

    Source:
        Zhang, Wu, Zhu, "Interpretable Convolutional Neural Networks", CVPR 2018, section 3 (l1,
        gradient); the other three of the part template study, section 4.2.

    Example:
        >>> from picnn_fast import PartTemplate
        >>> PartTemplate("l1", "uniform", beta=4.0).table(2, 3)
        tensor([[-1., -1.,  1., -1., -1.],
                [-1.,  1.,  1.,  1., -1.],
                [-1., -1.,  1., -1., -1.]])
    """

    norm: Literal["l1", "l2"] = "l1"
    profile: Literal["gradient", "uniform"] | Callable[[Tensor], Tensor] | Tensor = "gradient"
    beta: float | Literal["published"] | None = None
    gamma: float | None = None
    tau: float | None = None

    def __post_init__(self) -> None:
        checks.one_of("norm", self.norm, ("l1", "l2"))
        if isinstance(self.profile, Tensor):
            checks.floating("profile", self.profile)
            sides = self.profile.shape
            if len(sides) != 2 or not all(side % 2 for side in sides):
                raise ValueError(
                    f"profile: got a tensor of shape {tuple(sides)}, want [2H - 1, 2W - 1]:"
                    " two odd sides, the peak in the middle"
                )
        elif isinstance(self.profile, str):
            checks.one_of("profile", self.profile, ("gradient", "uniform"))
        elif not callable(self.profile):
            raise TypeError(
                f"profile: got {type(self.profile).__name__}, want 'gradient', 'uniform', a"
                " function of the distance or a tensor of offsets"
            )
        owners = {"beta": ("gradient", "uniform"), "gamma": ("uniform",)}
        for name, profiles in owners.items():
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(self.profile, str) or self.profile not in profiles:
                raise ValueError(
                    f"{name}: got {value!r}, want None: it is an option of"
                    f" {' and '.join(map(repr, profiles))} profiles"
                )
            if isinstance(value, str) and (name, value) == ("beta", "published"):
                if self.profile == "gradient":
                    continue
                raise TypeError(
                    f"{name}: got {value!r} with profile {self.profile!r}, want a number > 0"
                )
            checks.positive(name, value)
        if self.tau is not None:
            _float32("tau", self.tau)

    def __repr__(self) -> str:
        profile = repr(self.profile)
        if isinstance(self.profile, Tensor):
            profile = f"<table of shape {tuple(self.profile.shape)}>"
        options = [f"norm={self.norm!r}", f"profile={profile}"]
        for name in ("beta", "gamma", "tau"):
            if getattr(self, name) is not None:
                options.append(f"{name}={getattr(self, name)!r}")
        return f"PartTemplate({', '.join(options)})"

    def tau_for(self, height: int, width: int) -> float:
        """tau on maps of that size."""
        return 0.5 / max(height, width) ** 2 if self.tau is None else self.tau

    def arguments(self, height: int, width: int, like: Tensor) -> Arguments:
        """What the operators take for maps of that size: ``ARGUMENTS``.

        Raises:
            ValueError: maps without a position or too large, or a table too small for them or not
                finite.
        """
        for name, side in (("h", height), ("w", width)):
            if not 1 <= side <= MOST_SIDE:
                raise ValueError(f"x: got maps with {name} = {side}, want 1 to {MOST_SIDE}")
        norm = 1 if self.norm == "l1" else 2
        n = max(height, width)
        # Nothing but a name is compared: of a tensor, torch.compile may not (torch 2.11).
        profile = self.profile if isinstance(self.profile, str) else None
        if profile == "gradient":
            if self.beta == "published":
                slope = 4.0 / max(n - 1, 1)
            else:
                slope = (4.0 if self.beta is None else self.beta) / n
            # At 2 all but the peak is -1 already; more would overflow float32.
            return None, reference.GRADIENT, norm, min(slope, 2.0), 0
        if profile == "uniform":
            gamma = 2.0 if self.gamma is None else self.gamma
            assert not isinstance(self.beta, str)
            radius = gamma * n / (2.0 if self.beta is None else self.beta)
            # Beyond every distance there is, all radii are alike.
            limit = math.ceil(min(min(radius, 2.0**16) ** norm, 2.0**31 - 1))
            return None, reference.UNIFORM, norm, 0.0, limit
        return self._custom(height, width, norm, like), reference.TABLE, norm, 0.0, 0

    def _custom(self, height: int, width: int, norm: int, like: Tensor) -> Tensor:
        dtype = accumulate_dtype(like.dtype)
        if isinstance(self.profile, Tensor):
            top, left = (
                (size - 2 * side + 1) // 2
                for size, side in zip(self.profile.shape, (height, width), strict=True)
            )
            if min(top, left) < 0:
                raise ValueError(
                    f"template: got a table of shape {tuple(self.profile.shape)}, want at least"
                    f" {(2 * height - 1, 2 * width - 1)} for maps {height} x {width}"
                )
            table = self.profile[top : top + 2 * height - 1, left : left + 2 * width - 1]
        else:
            assert callable(self.profile)
            distance = _distances(height, width, norm, like.device)
            table = self.profile(distance)
            if not isinstance(table, Tensor) or table.shape != distance.shape:
                got = tuple(table.shape) if isinstance(table, Tensor) else type(table).__name__
                raise ValueError(
                    f"profile: got {got} from the function, want a tensor of the shape of its"
                    f" distances, {tuple(distance.shape)}"
                )
        table = table.detach().to(like.device, dtype).contiguous()
        checks.holds(
            "profile", table.isfinite().all(), lambda: "values that are not finite", "finite values"
        )
        return table

    def table(self, height: int, width: int) -> Tensor:
        """T_mu / tau at each offset from mu, ``[2 height - 1, 2 width - 1]`` float32.

        Raises:
            ValueError: see ``functional.template_mask``.
        """
        like = torch.empty(0)
        arguments = self.arguments(height, width, like)
        return reference.offset_table(*arguments, height, width, like.dtype, like.device)


def _distances(height: int, width: int, norm: int, device: torch.device) -> Tensor:
    """What a profile that is a function takes: ``[2 height - 1, 2 width - 1]`` float64."""
    if not torch.compiler.is_compiling():
        return torch.from_numpy(reference.distances(height, width, norm)).to(device)
    # Sizes may be symbols here, which NumPy knows nothing of.
    rows = torch.arange(1 - height, height, device=device)[:, None]
    columns = torch.arange(1 - width, width, device=device)
    if norm == 1:
        return (rows.abs() + columns.abs()).to(torch.float64)
    return (rows * rows + columns * columns).to(torch.float64).sqrt()


def _setup_template_mask(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, table, *ctx.template = inputs
    _, peak = output
    ctx.save_for_backward(peak, table)
    ctx.mark_non_differentiable(peak)


def _template_mask_gradient(
    ctx: Any, saved: tuple[Tensor, Tensor | None], grad_masked: Tensor, *_: None
) -> tuple[Tensor]:
    """The mask is a constant in the backward pass."""
    backward = torch.ops.picnn_fast.template_mask_backward.default
    return (backward(readable(grad_masked), *saved, *ctx.template),)


def _setup_template_mask_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, peak, table, *ctx.template = inputs
    ctx.save_for_backward(peak, table)


def _fake_template_mask(
    x: Tensor,
    table: Tensor | None,
    profile: int,
    norm: int,
    slope: float,
    limit: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[:2], dtype=torch.int64)


def _fake_template_mask_backward(
    grad_masked: Tensor,
    peak: Tensor,
    table: Tensor | None,
    profile: int,
    norm: int,
    slope: float,
    limit: int,
    scale: float,
) -> Tensor:
    return torch.empty_like(grad_masked)


def _decomposed_template_mask(
    x: Tensor,
    table: Tensor | None,
    profile: int,
    norm: int,
    slope: float,
    limit: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """As the reference has it, but for rounding, and without NumPy: sizes may be symbols."""
    height, width = x.shape[2:]
    peak = x.flatten(2).argmax(-1)
    rows = torch.arange(height, device=x.device)[:, None] - (peak // width)[..., None, None]
    columns = torch.arange(width, device=x.device) - (peak % width)[..., None, None]
    dtype = accumulate_dtype(x.dtype)
    if profile == reference.TABLE:
        assert table is not None
        template = table.to(dtype)[rows + (height - 1), columns + (width - 1)]
    else:
        distance = rows.abs() + columns.abs() if norm == 1 else rows * rows + columns * columns
        if profile == reference.UNIFORM:
            template = (distance < limit).to(dtype)
        else:
            length = distance.to(dtype) if norm == 1 else distance.to(dtype).sqrt()
            template = 1 - slope * length
    return (x.to(dtype) * (template.clamp_min(0) * scale)).to(x.dtype), peak


define(
    "templates",
    f"template_mask(Tensor x, {ARGUMENTS}, float scale) -> (Tensor masked, Tensor peak)",
    reference=reference.template_mask,
    fake=_fake_template_mask,
    setup_context=_setup_template_mask,
    backward=_template_mask_gradient,
    decomposition=_decomposed_template_mask,
)
define(
    "templates",
    f"template_mask_backward(Tensor grad_masked, Tensor peak, {ARGUMENTS}, float scale) -> Tensor",
    reference=reference.template_mask_backward,
    fake=_fake_template_mask_backward,
    # The product with a mask that is known, which is its own gradient.
    setup_context=_setup_template_mask_backward,
    backward=_template_mask_gradient,
)


def check_maps(x: Tensor) -> None:
    """Maps ``[B, N, h, w]``; ``PartTemplate.arguments`` asks for at least one position."""
    checks.floating("x", x)
    if x.ndim != 4:
        raise ValueError(f"x: got shape {tuple(x.shape)}, want maps [B, N, h, w]")


def check_template(template: object) -> PartTemplate:
    if not isinstance(template, PartTemplate):
        raise TypeError(f"template: got {type(template).__name__}, want a PartTemplate")
    return template


def _float32(name: str, value: float) -> float:
    """A number > 0 that float32 can hold."""
    checks.positive(name, value)
    most = torch.finfo(torch.float32).max
    if value > most:
        raise ValueError(f"{name}: got {value}, want a number of at most {most}")
    return float(value)


def check_scale(scale: float | Literal["tau"], name: str = "scale") -> float | Literal["tau"]:
    if isinstance(scale, str):
        checks.one_of(name, scale, ("tau",))
        return scale
    return _float32(name, scale)


def check_beta(beta: Tensor, template: PartTemplate, x: Tensor) -> None:
    """A beta for each filter of the maps, of a gradient template."""
    checks.floating("beta", beta)
    if tuple(beta.shape) != (x.shape[1],):
        raise ValueError(f"beta: got shape {tuple(beta.shape)}, want ({x.shape[1]},), one a filter")
    checks.same_device("beta", beta, "x", x)
    # A template's profile may be a tensor, which must not be compared.
    if not isinstance(template.profile, str) or template.profile != "gradient":
        raise ValueError(
            f"beta: got a tensor with {template}, want a gradient template, or None: others have no"
            " slope"
        )


def filter_tables(template: PartTemplate, x: Tensor, beta: Tensor | None) -> Tensor:
    """The template's values in units of tau at each offset from its centre.

    Args:
        beta: ``[N]`` in place of the template's own, see ``check_beta``.

    Returns:
        ``[1 or N, 2h - 1, 2w - 1]`` in the accumulation type of ``x``, without gradient.
    """
    height, width = x.shape[2:]
    dtype = accumulate_dtype(x.dtype)
    table, profile, norm, slope, limit = template.arguments(height, width, x)
    if beta is not None:
        slopes = beta.detach().to(dtype) / max(height, width)
    elif profile == reference.GRADIENT:
        slopes = torch.full((1,), slope, dtype=dtype, device=x.device)
    else:
        values = reference.offset_table(
            table, profile, norm, slope, limit, height, width, dtype, x.device
        )
        return values[None]
    return reference.gradient_tables(slopes, norm, height, width)


def template_mask(
    x: Tensor,
    template: PartTemplate,
    *,
    scale: float | Literal["tau"],
    center: Literal["argmax", "mass"],
    beta: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See ``functional.template_mask``."""
    check_maps(x)
    height, width = x.shape[2:]
    arguments = check_template(template).arguments(height, width, x)
    if check_scale(scale) == "tau":
        scale = template.tau_for(height, width)
    checks.one_of("center", center, CENTERS)
    if beta is not None:
        check_beta(beta, template, x)
    if center == "argmax" and beta is None:
        masked, peak = torch.ops.picnn_fast.template_mask.default(readable(x), *arguments, scale)
        return masked, peak
    maps = x.detach()
    peak = reference.peaks(maps) if center == "argmax" else reference.centre_of_mass(maps)
    return reference.mask_about(x, peak, filter_tables(template, x, beta), float(scale)), peak
