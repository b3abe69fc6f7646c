"""Operators of the template family: part templates and the mask layer of Interpretable CNNs."""

import dataclasses
import math
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from picnn_fast import checks
from picnn_fast.ops.define import define
from picnn_fast.ops.layout import readable
from picnn_fast.reference import templates as reference
from picnn_fast.reference.masking import accumulate_dtype

# Squared distances and numbers of offsets fit an int32.
MOST_SIDE = 2**15
# Sizes, types and devices that a template keeps its values for.
MOST_KEPT = 16
CENTERS = ("argmax", "mass")
# Looked up once: a call on small tensors is made of little else.
_compiling = torch.compiler.is_dynamo_compiling
_ORDINARY = frozenset({Tensor, torch.nn.Parameter})


@dataclasses.dataclass(frozen=True, eq=False)  # a profile may be a tensor
class PartTemplate:
    """The shape of an object part on a feature map: what T_mu is at a distance d from its peak mu.

    On maps ``[h, w]`` with n = max(h, w), d the distance in map positions. Made by
    ``PartTemplate.gradient``, ``uniform``, ``radial`` or ``offsets``, or by the profile's name:

    - "gradient": T_mu = tau·max(1 - beta·d / n, -1);
    - "uniform": T_mu = tau where beta·d / n < gamma, else -tau;
    - a function: T_mu = tau·profile(d), of a tensor of distances, returning a tensor alike;
    - a tensor ``[2H - 1, 2W - 1]``: T_mu / tau at each offset from mu, the middle entry at mu;
      serves maps of up to H x W.

    Its values are made once a size, type and device, and a function is called as often.

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
        >>> PartTemplate.uniform("l1", beta=4.0).table(2, 3)
        tensor([[-1., -1.,  1., -1., -1.],
                [-1.,  1.,  1.,  1., -1.],
                [-1., -1.,  1., -1., -1.]])
    """

    norm: Literal["l1", "l2"] = "l1"
    profile: Literal["gradient", "uniform"] | Callable[[Tensor], Tensor] | Tensor = "gradient"
    beta: float | Literal["published"] | None = None
    gamma: float | None = None
    tau: float | None = None

    @classmethod
    def gradient(
        cls,
        norm: Literal["l1", "l2"] = "l1",
        *,
        beta: float | Literal["published"] | None = None,
        tau: float | None = None,
    ) -> "PartTemplate":
        """T_mu = tau·max(1 - beta·d / n, -1); arguments as for the class."""
        return cls(norm, "gradient", beta=beta, tau=tau)

    @classmethod
    def uniform(
        cls,
        norm: Literal["l1", "l2"] = "l1",
        *,
        beta: float | None = None,
        gamma: float | None = None,
        tau: float | None = None,
    ) -> "PartTemplate":
        """T_mu = tau where beta·d / n < gamma, else -tau; arguments as for the class."""
        return cls(norm, "uniform", beta=beta, gamma=gamma, tau=tau)

    @classmethod
    def radial(
        cls,
        function: Callable[[Tensor], Tensor],
        norm: Literal["l1", "l2"] = "l1",
        *,
        tau: float | None = None,
    ) -> "PartTemplate":
        """T_mu = tau·function(d), of a float64 tensor of distances, returning a tensor alike."""
        if not callable(function):
            raise TypeError(
                f"function: got {type(function).__name__}, want a function of the distance"
            )
        return cls(norm, function, tau=tau)

    @classmethod
    def offsets(cls, values: Tensor, *, tau: float | None = None) -> "PartTemplate":
        """T_mu / tau is ``values`` ``[2H - 1, 2W - 1]`` at each offset from mu, the middle entry at
        mu; on smaller maps what lies about the middle."""
        _check_offsets("values", values)
        return cls(profile=values, tau=tau)

    def __post_init__(self) -> None:
        checks.one_of("norm", self.norm, ("l1", "l2"))
        if isinstance(self.profile, Tensor):
            _check_offsets("profile", self.profile)
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

    # Values by height, width, type and device, and of a tensor of offsets its version.
    _kept = MappingProxyType[Any, Tensor]({})

    def __getstate__(self) -> dict[str, Any]:
        """A copy makes its own values, on its own device."""
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}

    def tau_for(self, height: int, width: int) -> float:
        """tau on maps of that size."""
        return 0.5 / max(height, width) ** 2 if self.tau is None else self.tau

    def table(self, height: int, width: int) -> Tensor:
        """T_mu / tau at each offset from mu, ``[2 height - 1, 2 width - 1]`` float32.

        Raises:
            ValueError: see ``functional.template_mask``.
        """
        return self.offsets_for(height, width, torch.empty(0, device="cpu")).clone()

    def offsets_for(self, height: int, width: int, like: Tensor) -> Tensor:
        """What the operators take for maps of that size: ``table``, not to be changed.

        Args:
            like: gives the device and the type, that of its sums.

        Raises:
            ValueError: maps without a position or too large, or a tensor of offsets too small for
                them or not finite.
        """
        device = like.device
        symbolic = type(height) is not int or type(width) is not int
        if _compiling() or symbolic or type(like) not in _ORDINARY:
            _check_sides(height, width)
            # What is made belongs to the graph.
            return self._make(height, width, accumulate_dtype(like.dtype), device, traced=True)
        key: tuple[Any, ...] = (height, width, like.dtype, device)
        if isinstance(self.profile, Tensor):
            key += (_version(self.profile),)
        offsets = self._kept.get(key)
        if offsets is None:
            kept: dict[Any, Tensor] = self.__dict__.setdefault("_kept", {})
            _check_sides(height, width)
            dtype = accumulate_dtype(like.dtype)
            with torch.inference_mode(False):  # a later call may save it for its backward pass
                offsets = self._make(height, width, dtype, device, traced=False)
            # One made inside of a transform or a fake mode does not outlive it.
            if type(offsets) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(
                offsets
            ):
                if len(kept) >= MOST_KEPT:
                    kept.clear()
                kept[key] = offsets
        return offsets

    def _make(
        self, height: int, width: int, dtype: torch.dtype, device: torch.device, *, traced: bool
    ) -> Tensor:
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
            slope = min(slope, 2.0)
            if traced:
                slopes = torch.full((1,), slope, dtype=dtype, device=device)
                return reference.gradient_tables(slopes, norm, height, width)[0]
            return reference.gradient_offsets(height, width, norm, slope, dtype, device)
        if profile == "uniform":
            gamma = 2.0 if self.gamma is None else self.gamma
            assert not isinstance(self.beta, str)
            radius = gamma * n / (2.0 if self.beta is None else self.beta)
            # Beyond every distance there is, all radii are alike.
            limit = math.ceil(min(min(radius, 2.0**16) ** norm, 2.0**31 - 1))
            return reference.uniform_offsets(height, width, norm, limit, dtype, device)
        offsets = self._custom(height, width, norm, device, traced)
        offsets = offsets.detach().to(device, dtype, copy=True).contiguous()
        checks.holds(
            "profile",
            offsets.isfinite().all(),
            lambda: "values that are not finite",
            "finite values",
        )
        return offsets

    def _custom(
        self, height: int, width: int, norm: int, device: torch.device, traced: bool
    ) -> Tensor:
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
            return self.profile[top : top + 2 * height - 1, left : left + 2 * width - 1]
        assert callable(self.profile)
        distance = _distances(height, width, norm, device, traced)
        values = self.profile(distance)
        if not isinstance(values, Tensor) or values.shape != distance.shape:
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"profile: got {got} from the function, want a tensor of the shape of its"
                f" distances, {tuple(distance.shape)}"
            )
        return values


def _version(profile: Tensor) -> int:
    """Of a tensor of offsets, which may be changed in place."""
    return 0 if profile.is_inference() else profile._version


def _check_offsets(name: str, value: Tensor) -> None:
    checks.floating(name, value)
    if value.ndim != 2 or not all(side % 2 for side in value.shape):
        raise ValueError(
            f"{name}: got a tensor of shape {tuple(value.shape)}, want [2H - 1, 2W - 1]: two odd"
            " sides, the peak in the middle"
        )


def _distances(height: int, width: int, norm: int, device: torch.device, traced: bool) -> Tensor:
    """What a profile that is a function takes: ``[2 height - 1, 2 width - 1]`` float64."""
    if not traced:
        return torch.from_numpy(reference.distances(height, width, norm)).to(device)
    # Sizes may be symbols here, which NumPy knows nothing of.
    rows = torch.arange(1 - height, height, device=device)[:, None]
    columns = torch.arange(1 - width, width, device=device)
    if norm == 1:
        return (rows.abs() + columns.abs()).to(torch.float64)
    return (rows * rows + columns * columns).to(torch.float64).sqrt()


def map_peaks(x: Tensor) -> Tensor:
    """Where each map is greatest: its first maximum in row-major order.

    Args:
        x: maps ``[B, N, h, w]`` float32, float64, bfloat16 or float16; sides of 1 to 32768.

    Returns:
        ``[B, N]`` int64, row · w + column. NaN counts as the maximum.

    Raises:
        TypeError: unsupported dtype.
        ValueError: no maps ``[B, N, h, w]``, or maps without a position.

    Example:
        >>> import torch
        >>> from picnn_fast.functional import map_peaks
        >>> map_peaks(torch.tensor([[[[1.0, 2.0], [0.0, 2.0]]]]))
        tensor([[1]])
    """
    check_maps(x)
    peak: Tensor = _map_peaks_operator(readable(x.detach()))
    return peak


def assigned_templates(x: Tensor, labels: Tensor, filter_category: Tensor) -> Tensor:
    """``map_peaks`` where the image is of the filter's category, h · w where it is not.

    Args:
        labels, filter_category: ``[B]`` and ``[N]`` integers.
    """
    categories = (t.to(torch.int64) for t in (labels, filter_category))
    assigned: Tensor = _map_peaks_operator(readable(x.detach()), *categories)
    return assigned


def template_mask(
    x: Tensor,
    template: PartTemplate,
    *,
    scale: float | Literal["tau"] = 1.0,
    center: Literal["argmax", "mass"] = "argmax",
    beta: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Keep of each map what lies around its peak: the mask layer of Interpretable CNNs.

    With mu the peak of a map, its first maximum in row-major order, the map is multiplied by
    scale·max(T_mu / tau, 0). The mask counts as a constant in the backward pass. With
    ``center="mass"``, as in the authors' published code, mu is the map's centre of mass
    Σ pos·x / Σ x, rounded to the nearest position, halves up; (0, 0) where Σ x is 0 or not finite.
    Where activations have both signs it may lie outside: the nearest position of the map counts.

    The usual call is a kernel of its own; ``center="mass"`` and ``beta`` are composed of PyTorch's
    operators, with sums in float32 at least.

    Args:
        x: maps ``[B, N, h, w]`` float32, float64, bfloat16 or float16, usually after a ReLU;
            sides of 1 to 32768. Contiguous and channels_last maps are read in place and keep their
            layout.
        template: its tau does not matter unless ``scale="tau"``.
        scale: what the peak is multiplied by: 1 as in the published code; "tau" is the paper's
            text, max(T_mu, 0) with tau left in.
        center: "argmax" or "mass": what mu is.
        beta: ``[N]`` floating, for each filter in place of the template's own, in the same units;
            of gradient templates. A constant in the backward pass.

    Returns:
        masked, like ``x``; peak ``[B, N]`` int64, mu as row · w + column. A map of zeros stays one.
        NaN counts as the maximum and, like infinity, makes NaN where the mask is 0.

    Raises:
        TypeError: unsupported dtype, a template that is no ``PartTemplate``.
        ValueError: no maps ``[B, N, h, w]``, maps without a position, a template's table too small
            for them, a scale that is no number > 0, betas of another shape or of a template that is
            no gradient.

    Source:
        Zhang, Wu, Zhu, "Interpretable Convolutional Neural Networks", CVPR 2018, section 3.

    Example:
        >>> import torch
        >>> from picnn_fast import PartTemplate
        >>> from picnn_fast.functional import template_mask
        >>> x = torch.tensor([[[[1.0, 2.0, 1.0, 2.0]]]])
        >>> masked, peak = template_mask(x, PartTemplate("l1", beta=2.0))
        >>> peak.item(), masked.flatten().tolist()
        (1, [0.5, 2.0, 0.5, 0.0])
        >>> template_mask(x, PartTemplate("l1", beta=2.0), center="mass")[1].item()  # 10 / 6
        2
    """
    offsets = None
    if (
        type(x) in _ORDINARY
        and x.layout is torch.strided
        and not x.is_nested
        and x.ndim == 4
        and type(template) is PartTemplate
        and not _compiling()
    ):
        # What values are kept for has been checked. Symbolic sizes have no hash.
        _, _, height, width = x.shape
        if type(height) is int and type(width) is int:
            offsets = template._kept.get((height, width, x.dtype, x.device))
    if offsets is None:
        height, width = check_maps(x)
        offsets = check_template(template).offsets_for(height, width, x)
    if (type(scale) is not float or scale != 1.0) and check_scale(scale) == "tau":
        scale = template.tau_for(height, width)
    if center == "argmax" and beta is None:
        masked, peak = _template_mask_operator(readable(x), offsets, scale)
        return masked, peak
    if center != "argmax":
        checks.one_of("center", center, CENTERS)
    if beta is not None:
        check_beta(beta, template, x)
    peak = map_peaks(x) if center == "argmax" else reference.centre_of_mass(x.detach())
    tables = offsets[None] if beta is None else filter_tables(template, x, beta)
    return reference.mask_about(x, peak, tables, float(scale)), peak


def filter_tables(template: PartTemplate, x: Tensor, beta: Tensor | None) -> Tensor:
    """The template's values in units of tau at each offset from its centre.

    Args:
        beta: ``[N]`` in place of the template's own, see ``check_beta``.

    Returns:
        ``[1 or N, 2h - 1, 2w - 1]`` in the accumulation type of ``x``, without gradient.
    """
    height, width = x.shape[2:]
    if beta is None:
        return template.offsets_for(height, width, x)[None]
    slopes = beta.detach().to(accumulate_dtype(x.dtype)) / max(height, width)
    return reference.gradient_tables(slopes, 1 if template.norm == "l1" else 2, height, width)


def check_maps(x: Tensor) -> tuple[int, int]:
    """Maps ``[B, N, h, w]`` of at least one position; their sides."""
    checks.floating("x", x)
    if x.ndim != 4:
        raise ValueError(f"x: got shape {tuple(x.shape)}, want maps [B, N, h, w]")
    _, _, height, width = x.shape
    if not (1 <= height <= MOST_SIDE and 1 <= width <= MOST_SIDE):
        _check_sides(height, width)
    return height, width


def _check_sides(height: int, width: int) -> None:
    for name, side in (("h", height), ("w", width)):
        if not 1 <= side <= MOST_SIDE:
            raise ValueError(f"x: got maps with {name} = {side}, want 1 to {MOST_SIDE}")


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


def _fake_map_peaks(
    x: Tensor, labels: Tensor | None = None, filter_category: Tensor | None = None
) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.int64)


def _fake_template_mask(x: Tensor, offsets: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), _fake_map_peaks(x)


def _fake_template_mask_backward(
    grad_masked: Tensor, peak: Tensor, offsets: Tensor, scale: float
) -> Tensor:
    return torch.empty_like(grad_masked)


def _decomposed_map_peaks(
    x: Tensor, labels: Tensor | None = None, filter_category: Tensor | None = None
) -> Tensor:
    peak = x.flatten(2).argmax(-1)
    if labels is None or filter_category is None:
        return peak
    return torch.where(labels[:, None] == filter_category, peak, x.shape[2] * x.shape[3])


def _decomposed_template_mask(x: Tensor, offsets: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """As the reference has it, of operators that exporters know."""
    height, width = x.shape[2:]
    peak = _decomposed_map_peaks(x)
    rows = torch.arange(height, device=x.device)[:, None] - (peak // width)[..., None, None]
    columns = torch.arange(width, device=x.device) - (peak % width)[..., None, None]
    mask = offsets.clamp_min(0)[rows + (height - 1), columns + (width - 1)] * scale
    return (x.to(mask.dtype) * mask).to(x.dtype), peak


def _setup_template_mask(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, offsets, ctx.scale = inputs
    _, peak = output
    ctx.save_for_backward(peak, offsets)
    ctx.mark_non_differentiable(peak)


def _setup_template_mask_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, peak, offsets, ctx.scale = inputs
    ctx.save_for_backward(peak, offsets)


def _template_mask_gradient(
    ctx: Any, saved: tuple[Tensor, Tensor], grad_masked: Tensor, *_: None
) -> tuple[Tensor]:
    """The mask is a constant in the backward pass."""
    return (_BACKWARD(readable(grad_masked), *saved, ctx.scale),)


_map_peaks_operator = define(
    "templates",
    "map_peaks(Tensor x, Tensor? labels=None, Tensor? filter_category=None) -> Tensor",
    reference=reference.map_peaks,
    fake=_fake_map_peaks,
    decomposition=_decomposed_map_peaks,
)
_template_mask_operator = define(
    "templates",
    "template_mask(Tensor x, Tensor offsets, float scale) -> (Tensor masked, Tensor peak)",
    reference=reference.template_mask,
    fake=_fake_template_mask,
    setup_context=_setup_template_mask,
    backward=_template_mask_gradient,
    decomposition=_decomposed_template_mask,
)
define(
    "templates",
    "template_mask_backward(Tensor grad_masked, Tensor peak, Tensor offsets, float scale)"
    " -> Tensor",
    reference=reference.template_mask_backward,
    fake=_fake_template_mask_backward,
    # The product with a mask that is known, which is its own gradient.
    setup_context=_setup_template_mask_backward,
    backward=_template_mask_gradient,
)
# Bound once; Dynamo, which compiles backward passes, too, knows overloads alone.
_BACKWARD = torch.ops.picnn_fast.template_mask_backward.default
