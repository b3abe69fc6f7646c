"""Losses that make filters stand for classes or parts; added to that of any network."""

import math
import weakref
from typing import Any, Literal

import torch
from torch import Tensor, nn

from picnn_fast import checks, functional
from picnn_fast.ops.filter_loss import ESTIMATORS, filter_loss
from picnn_fast.ops.histogram import MOST_BINS
from picnn_fast.ops.templates import PartTemplate, check_maps, check_template

__all__ = ["FilterLoss", "MutualInformationLoss", "PublishedFilterLoss"]


class MutualInformationLoss(nn.Module):
    """Minus the mutual information between filters and classes in a batch, in nats.

    m[c, i] between filter i's pooled activation and 1[y = c] is estimated from a histogram with
    linear binning, which is differentiable (``functional.mutual_information(...,
    estimator="soft_histogram")``). With ``objective="class"`` the loss is minus the mean over
    filters of the maximum over classes of m, which MIS measures; with ``"label"`` minus the mean
    over filters of the mutual information with y itself.

    Bin centres run from a filter's least to its greatest activation in the batch, which count as
    constants in the backward pass; a filter that is constant in the batch has no gradient. The
    estimate from a batch of B samples is too high by about (bins - 1)(classes - 1) / 2B nats (one
    class against the rest: classes = 2), hence few bins.

    Args:
        num_classes: K, below 2**31.
        bins: of the histogram, 2 to 2**24.
        objective: "class" or "label".
        temperature: None takes the maximum over classes; a number t > 0 the soft maximum
            t · log(mean over c of exp(m[c, i] / t)), between the mean (t large) and the maximum
            (t small), so that more classes than the best have a gradient. Of "class" alone.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an argument out of range, or a temperature with ``objective="label"``.

    Example:
        >>> import torch
        >>> from picnn_fast.losses import MutualInformationLoss
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> activations = torch.tensor([[0.0], [0.4], [0.6], [1.0]], requires_grad=True)
        >>> loss = MutualInformationLoss(num_classes=2, bins=2)
        >>> loss(activations, labels).backward()
        >>> activations.grad[1:3, 0].sign().tolist()  # descent moves the two classes apart
        [1.0, -1.0]
    """

    def __init__(
        self,
        num_classes: int,
        bins: int = 16,
        *,
        objective: Literal["class", "label"] = "class",
        temperature: float | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = checks.integer("num_classes", num_classes, 1, 2**31)
        self.bins = checks.integer("bins", bins, 2, MOST_BINS + 1)
        checks.one_of("objective", objective, ("class", "label"))
        self.objective = objective
        if temperature is not None:
            checks.positive("temperature", temperature)
            if objective == "label":
                raise ValueError(
                    f"temperature: got {temperature} with objective='label', want None:"
                    " there is no maximum over classes to soften"
                )
        self.temperature = temperature

    def forward(self, activations: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            activations: ``[B, N]`` pooled, or maps ``[B, N, *spatial]``, which are averaged over
                their positions, at least one; B >= 1, float32, float64, bfloat16 or float16.
            labels: ``[B]`` integers in [0, K).

        Returns:
            A scalar <= 0, float32 (float64 for float64 activations), under autocast too. A filter
            with NaN or infinity makes it NaN.

        Raises:
            TypeError: not tensors, or of the wrong dtype.
            ValueError: of another shape, or labels out of range (on a GPU a device-side assert,
                see ``functional.bernoulli_mask``).
        """
        checks.floating("activations", activations)
        if activations.ndim < 2:
            raise ValueError(
                f"activations: got shape {tuple(activations.shape)}, want [samples, filters], or"
                " maps [samples, filters, height, width]"
            )
        if activations.ndim > 2:
            if 0 in activations.shape[2:]:
                raise ValueError(
                    f"activations: got shape {tuple(activations.shape)}, want maps of at least one"
                    " position"
                )
            dtype = torch.promote_types(activations.dtype, torch.float32)
            activations = activations.flatten(2).mean(-1, dtype=dtype)
        information = functional.soft_histogram_mutual_information(
            activations, labels, self.num_classes, bins=self.bins, target=self.objective
        )
        if self.objective == "class":
            information = self._maximum(information)
        return -information.mean()

    def _maximum(self, information: Tensor) -> Tensor:
        """Over classes: ``[K, N]`` to ``[N]``."""
        if self.temperature is None:
            return information.amax(0)
        # The mean of exponentials, not their sum: never above the maximum. Taken from there, where
        # neither a small temperature overflows nor a large one cancels.
        best = information.detach().amax(0)
        below = ((information - best) / self.temperature).expm1().mean(0)
        return best + self.temperature * below.log1p()

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, bins={self.bins}, objective={self.objective!r},"
            f" temperature={self.temperature}"
        )


class Copies(weakref.WeakSet[Any]):
    """A module and the copies made of it, also of copies; other processes have their own.

    For buffers whose size the first batch tells: made in all of them at once, averages of the
    weights can be begun before it.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> "Copies":
        return self

    def __reduce__(self) -> Any:
        return Copies, ()


class FilterLoss(nn.Module):
    """The filter loss of Interpretable CNNs with what its estimators remember.

    See ``functional.filter_loss``. The running estimates are buffers, saved with the model, made
    for the size of the first maps and bound to it; evaluation mode uses them without renewing them.
    Copies made before the first maps get buffers of that size, too (but in a compiled step), so
    that averages of the weights, as of ``torch.optim.swa_utils``, can be begun at once. A pass
    computed again by ``torch.utils.checkpoint`` would renew them twice: it is refused, and under
    ``torch.compile`` is what PyTorch calls an unsafe side effect.

    Args:
        template: see ``PartTemplate``.
        num_filters: N.
        estimator: "batch", "running" or "target".
        momentum: share of a new batch in the running estimates, in (0, 1].

    Raises:
        TypeError, ValueError: options of the wrong kind or out of range.

    Source:
        Zhang, Wu, Zhu, "Interpretable Convolutional Neural Networks", CVPR 2018, eq. 1-4.

    Example:
        >>> import torch
        >>> from picnn_fast import PartTemplate
        >>> from picnn_fast.losses import FilterLoss
        >>> loss = FilterLoss(PartTemplate("l2"), num_filters=8, estimator="running")
        >>> loss(torch.rand(2, 8, 7, 7)).shape, loss.log_mean.shape
        (torch.Size([8]), torch.Size([8, 50]))
    """

    log_mean: Tensor
    log_ratio: Tensor

    def __init__(
        self,
        template: PartTemplate,
        num_filters: int,
        *,
        estimator: Literal["batch", "running", "target"] = "batch",
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        self.template = check_template(template)
        self.num_filters = checks.integer("num_filters", num_filters, 1)
        checks.one_of("estimator", estimator, ESTIMATORS)
        self.estimator = estimator
        self.momentum = momentum
        empty = functional.FilterLossState.empty(num_filters, 1, 1, momentum=momentum)
        # No template yet: the size of the maps is not known.
        self.register_buffer("log_mean", empty.log_mean[:, :0])
        self.register_buffer("log_ratio", empty.log_ratio)
        self._map_size: tuple[int, int] | None = None
        self._copies = Copies([self])

    def forward(
        self, x: Tensor, labels: Tensor | None = None, filter_category: Tensor | None = None
    ) -> Tensor:
        """Loss of each filter, ``[N]``; arguments as for ``functional.filter_loss``.

        Raises:
            TypeError, ValueError: as ``functional.filter_loss``; maps of another number of filters,
                or, of "running" and "target", of another size than those before.
            RuntimeError: computed again by ``torch.utils.checkpoint``, in training.
        """
        check_maps(x)
        if x.shape[1] != self.num_filters:
            raise ValueError(
                f"x: got {x.shape[1]} channels in maps of shape {tuple(x.shape)}, want"
                f" {self.num_filters}, num_filters"
            )
        state = None if self.estimator == "batch" else self._state(x)
        return filter_loss(
            x,
            self.template,
            estimator=self.estimator,
            labels=labels,
            filter_category=filter_category,
            state=state,
            renew=self.training,
        )

    def _state(self, x: Tensor) -> functional.FilterLossState:
        # Single precision at least, whatever ``half()`` made of the buffers.
        dtype = torch.promote_types(x.dtype, torch.float32)
        height, width = x.shape[2:]
        if self._map_size is None and self.log_mean.shape[1] == height * width + 1:
            self._map_size = (height, width)
        if self._map_size != (height, width):
            self._refuse_other_maps(height, width)
            self._map_size = (height, width)
            self.log_ratio = self.log_ratio.to(x.device, dtype)
            self._make_room(height * width + 1)
        elif self.log_mean.dtype != dtype:
            self.log_mean, self.log_ratio = self.log_mean.to(dtype), self.log_ratio.to(dtype)
        return functional.FilterLossState(self.log_mean, self.log_ratio, self.momentum)

    def _refuse_other_maps(self, height: int, width: int) -> None:
        """Of another size than those that the estimates are of, where there are any yet."""
        templates = self.log_mean.shape[1]
        if templates == 0 or self.log_ratio.isneginf().all():
            return
        known = self._map_size
        want = f"{known[0]} x {known[1]}" if known else f"{templates - 1} positions"
        raise ValueError(
            f"x: got maps {height} x {width}, want {want} as in the batches before: what"
            f" estimator={self.estimator!r} remembers is bound to that size; give images of one"
            " size, or take estimator='batch'"
        )

    def _make_room(self, templates: int) -> None:
        """For the estimates of so many templates, in the copies that have no room yet as well."""
        ratio = self.log_ratio
        self.log_mean = ratio.new_full((self.num_filters, templates), -math.inf)
        if torch.compiler.is_compiling():
            return
        for loss in self._copies:
            if loss.log_mean.shape[1] == 0:
                loss.log_ratio = loss.log_ratio.to(ratio.dtype)
                loss.log_mean = loss.log_ratio.new_full(self.log_mean.shape, -math.inf)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        saved = state_dict.get(f"{prefix}log_mean")
        if saved is not None and saved.ndim == 2 and len(saved) == self.num_filters:
            self._map_size = None
            self._make_room(saved.shape[1])
        super()._load_from_state_dict(state_dict, prefix, *others)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._copies.add(self)

    def extra_repr(self) -> str:
        return f"{self.template}, num_filters={self.num_filters}, estimator={self.estimator!r}"


class PublishedFilterLoss(nn.Module):
    """The gradient of the authors' code in place of a filter loss's own, with what it remembers.

    See ``functional.published_filter_loss``. The density of a category is the share of its images
    among those seen so far in training, this batch included; with more than ten classes it is 1/K,
    as published. The counts are of each rank; DistributedDataParallel hands rank 0's to all.

    Args:
        template: see ``PartTemplate``.
        num_classes: K.

    Raises:
        TypeError, ValueError: arguments of the wrong kind or out of range.

    Example:
        >>> import torch
        >>> from picnn_fast import PartTemplate
        >>> from picnn_fast.losses import PublishedFilterLoss
        >>> loss = PublishedFilterLoss(PartTemplate(), num_classes=2)
        >>> labels, category = torch.tensor([0, 1]), torch.zeros(8, dtype=torch.int64)
        >>> loss(torch.rand(2, 8, 7, 7), labels, category).shape
        torch.Size([8])
    """

    counts: Tensor

    def __init__(self, template: PartTemplate, num_classes: int) -> None:
        super().__init__()
        self.template = check_template(template)
        self.num_classes = checks.integer("num_classes", num_classes, 1)
        self.register_buffer("counts", torch.zeros(num_classes, dtype=torch.int64))

    def forward(
        self, x: Tensor, labels: Tensor, filter_category: Tensor, beta: Tensor | None = None
    ) -> Tensor:
        """Loss of each filter, ``[N]``; arguments as for ``functional.published_filter_loss``."""
        checks.tensor("labels", labels)
        checks.labels("labels", labels, len(x), self.num_classes)
        one_hot = nn.functional.one_hot(labels.to(torch.int64), self.num_classes)
        counts = self.counts + one_hot.sum(0)
        if self.training:
            checks.not_recomputed("PublishedFilterLoss")
            self.counts.copy_(counts)
        if self.num_classes > 10:
            shares = torch.full_like(counts, 1 / self.num_classes, dtype=torch.float32)
        else:
            shares = counts / counts.sum()
        return functional.published_filter_loss(
            x,
            self.template,
            labels=labels,
            filter_category=filter_category,
            density=shares[filter_category],
            beta=beta,
        )

    def extra_repr(self) -> str:
        return f"{self.template}, num_classes={self.num_classes}"


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Per-sample cross entropy ``[B]`` in float32 or wider, whatever autocast makes the logits."""
    return nn.functional.cross_entropy(
        checks.accumulable(logits), labels.to(torch.int64), reduction="none"
    )


def check_output(output: object, kind: type[tuple[Any, ...]], labels: Tensor, classes: int) -> None:
    """What a method's ``loss_terms`` is given, at the door.

    Args:
        output: to be a ``kind``, which has ``logits`` ``[B, K]``.
        kind: what the method's forward yields.
        labels: to be ``[B]`` integers in [0, K).
        classes: K.

    Raises:
        ValueError: an output of another method's forward, labels of another shape or out of range.
        TypeError: labels that are not integers.
    """
    if not isinstance(output, kind):
        raise ValueError(
            f"output: got {type(output).__name__}, want a {kind.__name__}, what this model's"
            " forward yields"
        )
    logits: Tensor = output.logits  # type: ignore[attr-defined]
    checks.labels("labels", labels, len(logits), classes)
