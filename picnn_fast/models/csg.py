"""CSG: a gate between classes and filters that grows sparse while the network trains."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from picnn_fast import checks
from picnn_fast.functional import class_gate, gate_penalty, project_gate
from picnn_fast.layers import with_target_layer
from picnn_fast.losses import check_output, cross_entropy
from picnn_fast.models.base import InterpretableNetwork
from picnn_fast.ops.layout import whole

STD_PATH, CSG_PATH = "std", "csg"  # names of the two optimisers, too
SPARSE_ENOUGH = 1.1  # times the bound


class CSGOutput(NamedTuple):
    """What a forward pass yields.

    Attributes:
        logits: ``[B, K]`` of the STD path, all filters: what the network is judged by.
        maps: of the target layer.
        gated_logits: ``[B, K]`` of the CSG path, which sees the label; None without labels.
    """

    logits: Tensor
    maps: Tensor
    gated_logits: Tensor | None


class CSG(InterpretableNetwork):
    """A network whose filters pass only for the classes that a learnt gate gives them to.

    Epochs take turns. In those of the STD path the network learns by cross entropy as usual; in
    those of the CSG path filter i of an image with label y is scaled by ``G[y, i]``, and gate and
    network learn by cross entropy and a penalty on the gate's L1 norm above ``bound``. After each
    step every filter's column of G is divided by its greatest element and clipped to [0, 1]. The
    CSG path sees the label, so nothing is judged by it: testing runs the STD path, without a gate.

    The authors' run steps either path by an Adam of its own (``optimizers``). One optimiser of
    ``parameter_groups`` serves as well; by SGD at small rates the gate does not become sparse.

    Args:
        features, head, num_classes, num_filters, channel_dim: see ``InterpretableNetwork``.
        in_channels: channels of ``features``: a new target layer is put after them, a 3x3
            convolution to ``num_filters`` channels. None inserts nothing.
        insert_kernel: side of that convolution's windows: 3, or 1, with a ninth of the weights.
        inserted_activation: behind the inserted convolution: "relu" or "none".
        period: one epoch in so many runs the gated path, the last of each period; 1: every one.
        start: epochs of the ordinary path alone at the beginning.
        bound: what the L1 norm of the gate may be without a penalty, at least the number of filters
            N. None: a fifth of K·N, or N where that is more.
        penalty_norm: of what exceeds the bound: "l1", "l2" (the square) or "smooth_l1".
        penalty_weight: of that penalty, λ2 of eq. 3.
        classification_weight: of the cross entropy of the gated path, λ1 of eq. 3.
        csg_lr: learning rate of network and gate in epochs of the gated path; None: that of the
            network in all others.
        gate_lr: learning rate of the gate; None: that of the network in the same epochs, as
            published. In a short run only a greater one makes the gate sparse.
        std_layers: names of the modules that learn in epochs of the ordinary path, such as
            features.layer4 and head; None: all. What learns in neither path is frozen.
        csg_layers: names of the modules that learn, beside the gate, in epochs of the gated path;
            None: all; []: the gate alone.
        fixed: two numbers m1 and m2: m1 filters for each class alone, then m2 for all, not learnt
            and without a penalty (section 4.3); N must be m1·K + m2.
        mask_at: where filters are scaled: "maps", or "late", behind the pooling that the head
            starts with, where it is the same and takes less; "auto": late where possible.

    Attributes:
        gate: G ``[K, N]``, a parameter, or a buffer where it is fixed.

    Raises:
        TypeError, ValueError: see ``InterpretableNetwork``; a bound below N; layers that are not
            there; a fixed gate that does not fit.

    Source:
        Liang, Ouyang, Zeng, Su, He, Xia, Zhu, Zhang, "Training Interpretable Convolutional Neural
        Networks by Differentiating Class-specific Filters", ECCV 2020: eq. 3, algorithm 1, whose
        line 3 has the comparison the wrong way round. The projection is the authors' code's, by
        the signed maximum; a column without anything positive, which yields NaN there, keeps its
        greatest element as 1.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from picnn_fast.models import CSG
        >>> _ = torch.manual_seed(0)
        >>> features = nn.Sequential(nn.Conv2d(3, 20, 3), nn.ReLU())
        >>> head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 4))
        >>> model = CSG(features, head, num_classes=4, num_filters=20, start=0, period=2)
        >>> optimizer = torch.optim.Adam(model.parameter_groups(lr=1e-3))
        >>> images, labels = torch.randn(2, 3, 16, 16), torch.tensor([0, 3])
        >>> for epoch in (1, 2):
        ...     model.begin_epoch(epoch)
        ...     model.loss(model(images, labels), labels).backward()
        ...     optimizer.step()
        ...     model.after_step()
        >>> model.ownership().amax(0).unique()
        tensor([1.])
    """

    ownership_meaning: ClassVar[str] = "gate, learned: how far a filter is let through for a class"

    def __init__(
        self,
        features: nn.Module,
        head: nn.Module,
        num_classes: int,
        num_filters: int,
        *,
        in_channels: int | None = None,
        inserted_activation: Literal["relu", "none"] = "relu",
        insert_kernel: int = 3,
        period: int = 3,
        start: int = 10,
        bound: float | None = None,
        penalty_norm: Literal["l1", "l2", "smooth_l1"] = "l1",
        penalty_weight: float = 1e-3,
        classification_weight: float = 1.0,
        csg_lr: float | None = 1e-3,
        gate_lr: float | None = None,
        std_layers: Sequence[str] | None = None,
        csg_layers: Sequence[str] | None = None,
        fixed: tuple[int, int] | None = None,
        mask_at: Literal["auto", "maps", "late"] = "auto",
        channel_dim: int = 1,
    ) -> None:
        features = with_target_layer(
            features,
            in_channels,
            num_filters,
            activation=inserted_activation,
            channel_dim=channel_dim,
            kernel=insert_kernel,
        )
        super().__init__(
            features, head, num_classes, num_filters, mask_at=mask_at, channel_dim=channel_dim
        )
        self.period = checks.integer("period", period, 1)
        self.start = checks.integer("start", start, 0)
        checks.one_of("penalty_norm", penalty_norm, ("l1", "l2", "smooth_l1"))
        self.penalty_norm = penalty_norm
        self.penalty_weight = checks.non_negative("penalty_weight", penalty_weight)
        self.classification_weight = checks.positive("classification_weight", classification_weight)
        self.csg_lr = None if csg_lr is None else checks.positive("csg_lr", csg_lr)
        self.gate_lr = None if gate_lr is None else checks.positive("gate_lr", gate_lr)
        if bound is None:
            bound = max(0.2 * num_classes * num_filters, float(num_filters))
        elif bound != float("inf") and checks.positive("bound", bound) < num_filters:
            raise ValueError(
                f"bound: got {bound}, want at least {num_filters}, the filters: each is some"
                " class's"
            )
        self.bound = float(bound)
        if fixed is not None and not (isinstance(fixed, Sequence) and len(fixed) == 2):
            raise TypeError(f"fixed: got {fixed!r}, want two numbers, (m1, m2)")
        self.fixed = fixed
        if fixed is None:
            self.gate: Tensor = nn.Parameter(torch.full((num_classes, num_filters), 0.5))
        else:
            self.register_buffer("gate", fixed_gate(num_classes, num_filters, *fixed))
        # A tensor, so that a compiled step serves both paths, and a resumed run goes on in it.
        self.in_csg_epoch: Tensor
        self.register_buffer("in_csg_epoch", torch.tensor(False))
        self._layers = {
            STD_PATH: self._learning("std_layers", std_layers),
            CSG_PATH: self._learning("csg_layers", csg_layers),
        }
        for name, parameter in self.named_parameters():
            if name != "gate" and not any(name in names for names in self._layers.values()):
                parameter.requires_grad_(False)

    def _learning(self, argument: str, layers: Sequence[str] | None) -> frozenset[str]:
        """Names of the network's parameters in these layers."""
        names = [name for name, _ in self.named_parameters() if name != "gate"]
        if layers is None:
            return frozenset(names)
        if isinstance(layers, str) or not isinstance(layers, Sequence):
            raise TypeError(
                f"{argument}: got a {type(layers).__name__}, want a list of names of modules"
            )
        if not layers and (argument == "std_layers" or self.fixed is not None):
            raise ValueError(
                f"{argument}: got [], with which nothing learns in epochs of that path, want names"
                " of modules, or None for all"
            )
        chosen = frozenset(
            name for name in names if any(f"{name}.".startswith(f"{layer}.") for layer in layers)
        )
        for layer in layers:
            if not any(f"{name}.".startswith(f"{layer}.") for name in names):
                there = [
                    name for name, module in self.named_modules() if name.count(".") < 3 and name
                ]
                near = checks.did_you_mean(layer, there)
                raise ValueError(
                    f"{argument}: got {layer!r},{near} want names of modules with parameters,"
                    f" as {', '.join(there[:8])} …"
                )
        return chosen

    def begin_epoch(
        self,
        epoch: int,
        batches: int | None = None,
        epochs: int | None = None,
        *,
        images: Iterable[tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        super().begin_epoch(epoch, batches, epochs, images=images)
        self.in_csg_epoch.fill_(self.optimizer_of(epoch, epochs) == CSG_PATH)

    def optimizer_of(self, epoch: int, epochs: int | None = None) -> str:
        """ "csg" for the last epoch of each period after ``start``, else "std".

        The last epoch of a run is the STD path's: right after one of the CSG path the network is
        worse at classifying without a gate.

        Args:
            epoch: from 1.
            epochs: of the run; None where that is not known.
        """
        if epoch <= self.start or epoch == epochs:
            return STD_PATH
        return CSG_PATH if epoch % self.period == 0 else STD_PATH

    def forward(self, images: Tensor, labels: Tensor | None = None) -> CSGOutput:
        """Both paths, the second where there are labels: in epochs of the STD path on a CPU without
        gradients, which count nothing there.

        Args:
            images: ``[B, C, H, W]``, whatever ``features`` take.
            labels: ``[B]`` integers in [0, K), for the CSG path.
        """
        maps = self.filter_maps(images)
        shared, layers = self.masked_head.share(self.head, maps)
        logits = self.masked_head.classify(layers, shared)
        if labels is None:
            return CSGOutput(logits, maps, None)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._gated_path_learns()):
            gated = class_gate(shared, self.gate, labels, channel_dim=self.channel_dim)
            return CSGOutput(logits, maps, self.masked_head.classify(layers, gated))

    def _gated_path_learns(self) -> bool:
        """Without it a head as wide as VGG's costs less; only where it can be told at no cost."""
        flag = self.in_csg_epoch
        return torch.compiler.is_compiling() or flag.device.type != "cpu" or bool(flag)

    def loss_terms(self, output: CSGOutput, labels: Tensor) -> dict[str, Tensor]:
        """``discrimination`` in epochs of the STD path, else ``gated`` and ``penalty`` (eq. 3).

        Those of the other path are 0, with a gradient of 0 to every parameter.

        Args:
            output: of ``forward`` with labels.
            labels: ``[B]`` integers in [0, K).

        Raises:
            TypeError: labels that are not integers.
            ValueError: labels of another shape or out of range, an output of another model, or of
                a forward without labels.
        """
        check_output(output, CSGOutput, labels, self.num_classes)
        if output.gated_logits is None:
            raise ValueError("output: got one of forward(images), want forward(images, labels)")
        terms = {
            "discrimination": cross_entropy(output.logits, labels).mean(),
            "gated": self.classification_weight * cross_entropy(output.gated_logits, labels).mean(),
        }
        if self.fixed is None:
            penalty = gate_penalty(self.gate, self.bound, norm=self.penalty_norm)
            terms["penalty"] = self.penalty_weight * penalty
        # Weights of 0 and 1, not a branch: one compiled graph for both, and no unused parameter.
        csg = self.in_csg_epoch.to(output.logits.dtype)
        return {
            name: (1 - csg if name == "discrimination" else csg) * term
            for name, term in terms.items()
        }

    def after_step(self) -> None:
        """The gate back among those allowed, after a step of the CSG path."""
        if self.fixed is None:
            with torch.no_grad():
                self.gate.copy_(torch.where(self.in_csg_epoch, project_gate(self.gate), self.gate))

    def ownership(self) -> Tensor:
        """G ``[K, N]``, each filter's column by its greatest element, clipped to [0, 1]."""
        return project_gate(whole(self.gate.detach()))

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """The network, and the gate apart, named "gate", where it is learnt.

        Args:
            lr: of the network; of the gate where ``csg_lr`` and ``gate_lr`` are None.
        """
        lr = checks.non_negative("lr", lr)
        network = [p for name, p in self.named_parameters() if name != "gate"]
        return [{"params": network, "lr": lr, "name": "network"}, *self._gate_group(lr)]

    def optimizers(self, lr: float) -> dict[str, list[dict[str, Any]]]:
        """Groups of the optimiser of either path, "std" and "csg".

        Args:
            lr: of the STD path; of the CSG path where ``csg_lr`` is None.
        """
        lr = checks.non_negative("lr", lr)
        rates = {STD_PATH: lr, CSG_PATH: self._csg_rate(lr)}
        named = dict(self.named_parameters())
        groups: dict[str, list[dict[str, Any]]] = {}
        for path, rate in rates.items():
            chosen = [p for name, p in named.items() if name in self._layers[path]]
            groups[path] = [{"params": chosen, "lr": rate, "name": path}] if chosen else []
        groups[CSG_PATH] += self._gate_group(lr)
        return groups

    def _csg_rate(self, lr: float) -> float:
        return lr if self.csg_lr is None else self.csg_lr

    def _gate_group(self, lr: float) -> list[dict[str, Any]]:
        """The gate's, where it is learnt."""
        if self.fixed is not None:
            return []
        rate = self._csg_rate(lr) if self.gate_lr is None else self.gate_lr
        return [{"params": [self.gate], "lr": rate, "weight_decay": 0.0, "name": "gate"}]

    def density(self) -> Tensor:
        """L1-density of G: ‖G‖₁ / (K·N), a scalar in [1 / K, 1]."""
        return self.ownership().mean()

    def logged(self) -> dict[str, Tensor]:
        """``density``, every epoch."""
        return {"density": self.density()}

    def remarks(self) -> list[str]:
        """That the gate did not become sparse, where it did not."""
        wanted = SPARSE_ENOUGH * self.bound / (self.num_classes * self.num_filters)
        density = self.density().item()
        if self.fixed is not None or density <= wanted:
            return []
        return [
            f"the gate did not become sparse: density {density:.3f}, want at most {wanted:.3f};"
            " more epochs, a greater gate_lr or penalty_weight, or the optimizer adam, take it down"
        ]

    def options(self) -> Mapping[str, object]:
        return {
            "masks_late": self.masked_head.late,
            "channel_dim": self.channel_dim,
            "period": self.period,
            "start": self.start,
            "bound": self.bound,
            "fixed": self.fixed,
        }


def fixed_gate(num_classes: int, num_filters: int, own: int, shared: int) -> Tensor:
    """G ``[K, N]`` of 0 and 1: ``own`` filters for each class in turn, then ``shared`` for all.

    Raises:
        TypeError, ValueError: numbers that do not make N filters.
    """
    checks.integer("fixed", own, 1)
    checks.integer("fixed", shared, 0)
    if own * num_classes + shared != num_filters:
        raise ValueError(
            f"fixed: got {own} filters a class and {shared} for all, {own * num_classes + shared},"
            f" want num_filters={num_filters} with {num_classes} classes"
        )
    gate = torch.eye(num_classes).repeat_interleave(own, 1)
    return torch.cat([gate, torch.ones(num_classes, shared)], 1)
