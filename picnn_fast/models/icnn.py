"""ICNN: Interpretable CNN, whose top filters are pushed to stand for one object part each."""

import math
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from picnn_fast import checks
from picnn_fast.layers import (
    LearnedBeta,
    TemplateMask,
    check_insert_kernel,
    inserted_convolution,
)
from picnn_fast.losses import FilterLoss, PublishedFilterLoss, check_output, cross_entropy
from picnn_fast.models.base import InterpretableNetwork, check_task
from picnn_fast.models.masked_head import layers_of, leading_pooling
from picnn_fast.ops.templates import PartTemplate, check_scale, check_template
from picnn_fast.reference.masking import sums_by_label

TASKS = ("softmax", "logistic", "single")
INITIAL = ("default", "published")
ESTIMATORS = ("batch", "running", "target", "published")
# Of one map; the time of a filter loss grows with the square.
MANY_POSITIONS = 1024


class ICNNOutput(NamedTuple):
    """What a forward pass yields.

    Attributes:
        logits: ``[B, K]``.
        maps: of the last interpretable layer, masked, as the head takes them.
        activations: maps of the interpretable layers before their mask layers, one after the other.
    """

    logits: Tensor
    maps: Tensor
    activations: tuple[Tensor, ...]


class FilterCategories(nn.Module):
    """Each filter's category, the class whose images activate it most, learnt as training goes.

    Keeps running class means of sum_ij x_ij, an exponential average over the batches in which the
    class occurs, of each rank; DistributedDataParallel hands rank 0's to all.

    Args:
        num_classes: K.
        num_filters: N.
        momentum: share of a new batch, in (0, 1].
        by: "sum"; or "max", which takes max_ij x_ij in its place and starts at 0.1 or more, as the
            authors' published code does.

    Source:
        Zhang, Wu, Zhu, "Interpretable Convolutional Neural Networks", CVPR 2018, section 3.
    """

    means: Tensor
    seen: Tensor

    def __init__(
        self, num_classes: int, num_filters: int, momentum: float = 0.1, by: str = "sum"
    ) -> None:
        super().__init__()
        self.momentum = momentum
        self.by = checks.one_of("category_by", by, ("sum", "max"))
        self.register_buffer("means", torch.zeros(num_classes, num_filters))
        # 1 for the classes that occurred. Not bool, of which averages of weights can make no mean.
        self.register_buffer("seen", torch.zeros(num_classes, 1))

    @torch.no_grad()
    def update(self, maps: Tensor, labels: Tensor) -> None:
        """Take in maps ``[B, N, h, w]`` and their labels ``[B]``."""
        labels = labels.to(torch.int64)
        # Single precision at least, whatever ``half()`` made of the buffer: sums would overflow.
        self.means = self.means.to(torch.promote_types(self.means.dtype, torch.float32))
        if self.by == "sum":
            values = maps.detach().sum((2, 3), dtype=self.means.dtype)
        else:
            values = maps.detach().amax((2, 3)).to(self.means.dtype)
        total = sums_by_label(values, labels, len(self.means))
        ones = torch.ones_like(labels, dtype=total.dtype)[:, None]
        count = sums_by_label(ones, labels, len(total))
        present = count > 0
        new = total / count.clamp_min(1)
        first = new if self.by == "sum" else new.clamp_min(0.1)
        mixed = torch.where(self.seen > 0, self.means.lerp(new, self.momentum), first)
        self.means.copy_(torch.where(present, mixed, self.means))
        self.seen.masked_fill_(present, 1)

    def forward(self) -> Tensor:
        """``[N]`` int64; the first class before any batch."""
        return self.means.argmax(0)


class ICNN(InterpretableNetwork):
    """An Interpretable CNN: mask layers and filter losses on the top convolutions.

    ``features`` end with the activation of the top convolution, which becomes interpretable: a mask
    layer follows it. Above it comes, where ``in_channels`` is given, a second convolution
    (3x3, padding 1) with ReLU and a mask layer of its own, then ``head``. Both layers have a filter
    loss, taken of their maps before the mask.

    Loss = discrimination + sum over layers and filters of lambda·Loss_f. With t the epoch
    (``begin_epoch``) and x the filter's maps, lambda = ``filter_loss_weight``/t · mean_b max_ij x,
    renewed with every batch; with ``estimator="published"`` ``filter_loss_weight``/t alone.

    A filter belongs to its category: ``ownership`` is 1 there, else 0, and ``class_mask`` keeps a
    class's own filters.

    The paper's tau suits activations of tens, as in its networks. Where they are about 1, as after
    batch norm, every exp(s) is 1 and the filter loss does next to nothing: give the template a tau
    of 0.1 or so. "running" and "target" are bound to the size of the first images; see
    ``functional.filter_loss`` and ``functional.published_filter_loss``.

    The defaults are the paper's text. The authors' published code has, beside other training,
    ``center="mass"``, ``learn_beta=True``, ``mask_after_pool=True``, ``category_by="max"``,
    ``estimator="published"`` and ``initial="published"``; ``PartTemplate(beta="published")`` where
    beta is not learnt. It also scales the gradient of the task, with several categories by 0.2 (at
    most ten) or 1/50: a ``filter_loss_weight`` of 5e-6 or 5e-5 keeps that proportion.

    Args:
        features: images to the maps of the top convolution after its activation.
        head: masked maps to logits ``[B, K]``.
        num_classes: K.
        num_filters: N of the last interpretable layer; what ``features`` yield where none is
            inserted.
        in_channels: channels that ``features`` yield: inserts the second convolution, from as many
            to ``num_filters`` (the paper: the same number). None inserts nothing.
        insert_kernel: side of that convolution's windows: 3, or 1, with a ninth of the weights.
        initial: of the inserted convolution: "default" for PyTorch's, or "published": weights
            normal with deviation 0.01, no bias at first.
        template: the shape of a part, of the mask layers and filter losses; None is the paper's,
            ``PartTemplate()``.
        center: where a mask's template lies: "argmax": on the largest activation; "mass": on the
            map's centre of mass, as published.
        learn_beta: let each filter learn the template's beta for its masks, and for "published"
            losses; it follows how far the filter's maps spread. The other losses keep the
            template's. Gradient templates alone.
        mask_after_pool: put the second mask layer and filter loss behind the pooling that the head
            starts with, which goes over to the features: up to its last max or average pooling of
            a fixed window; the head must be an ``nn.Sequential``.
        estimator: of the filter loss: exact over each "batch"; from "running" estimates; from those
            and the "target", the one template that a map is assigned to by its filter's category;
            or as "published" by the authors, by the categories too.
        category_by: what of a filter's maps tells its category: their "sum", or their "max" as
            published.
        task: "softmax": cross entropy over the classes; "logistic": the sum of K independent
            logistic losses; "single": one category against the rest, label 1 for its images and
            0 for the others, logistic loss of the difference of two logits (K = 2); every filter
            is of category 1.
        filter_loss_weight: of the filter losses, which lambda is in proportion to, >= 0; None takes
            0.003, and 1e-6 for the estimator "published". Lambda grows with the activations, which
            the loss makes grow: too large a weight drowns the discrimination.
        momentum: share of a new batch in the running estimates of filter loss and categories.
        mask_scale: what a mask layer multiplies the peak by: 1, or "tau" for the paper's text.

    Raises:
        TypeError, ValueError: see ``InterpretableNetwork``; options out of range, or that do not go
            together.

    Warns:
        UserWarning: see ``InterpretableNetwork``; at a forward, maps on which filter losses take
            long, once.

    Note:
        In ``forward``, hooks on ``features`` itself do not run, hooks on its layers do.

    Source:
        Zhang, Wu, Zhu, "Interpretable Convolutional Neural Networks", CVPR 2018, sections 3 and 5.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from picnn_fast.models import ICNN
        >>> features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
        >>> model = ICNN(features, head, num_classes=4, num_filters=8, in_channels=8)
        >>> images, labels = torch.randn(2, 3, 16, 16), torch.tensor([0, 3])
        >>> output = model(images)
        >>> model.loss(output, labels).backward()
        >>> [tuple(maps.shape) for maps in output.activations]
        [(2, 8, 14, 14), (2, 8, 14, 14)]
        >>> model.filter_category.shape
        torch.Size([8])
    """

    filters_per_class: ClassVar[float | None] = None  # the paper: as many as the layer below
    ownership_meaning: ClassVar[str] = (
        "categories: the class each filter fires most for, and no other"
    )
    epoch: Tensor

    def __init__(
        self,
        features: nn.Module,
        head: nn.Module,
        num_classes: int,
        num_filters: int,
        *,
        in_channels: int | None = None,
        insert_kernel: int = 3,
        initial: Literal["default", "published"] = "default",
        template: PartTemplate | None = None,
        center: Literal["argmax", "mass"] = "argmax",
        learn_beta: bool = False,
        mask_after_pool: bool = False,
        estimator: Literal["batch", "running", "target", "published"] = "batch",
        category_by: Literal["sum", "max"] = "sum",
        task: Literal["softmax", "logistic", "single"] = "softmax",
        filter_loss_weight: float | None = None,
        momentum: float = 0.1,
        mask_scale: float | Literal["tau"] = 1.0,
    ) -> None:
        checks.module("features", features)
        template = PartTemplate() if template is None else check_template(template)
        check_scale(mask_scale, "mask_scale")
        checks.boolean("learn_beta", learn_beta)
        checks.boolean("mask_after_pool", mask_after_pool)

        def mask(width: int) -> TemplateMask:
            beta = LearnedBeta(template, width) if learn_beta else None
            return TemplateMask(template, scale=mask_scale, center=center, beta=beta)

        layers: OrderedDict[str, nn.Module] = OrderedDict(top=features)
        widths = [num_filters]
        if in_channels is None:
            _refuse_without_convolution(initial, mask_after_pool)
            check_insert_kernel(insert_kernel, inserted=False)
            layers["top_mask"] = mask(num_filters)
        else:
            widths = [checks.integer("in_channels", in_channels, 1), num_filters]
            layers["top_mask"] = mask(in_channels)
            layers["conv"] = _convolution(in_channels, num_filters, insert_kernel, initial)
            layers["relu"] = nn.ReLU()
            if mask_after_pool:
                layers["pool"], head = _split_behind_pooling(head)
            layers["mask"] = mask(num_filters)
        super().__init__(nn.Sequential(layers), head, num_classes, num_filters)
        self._warned = False
        self.task = check_task(task, TASKS, num_classes)
        self.estimator = checks.one_of("estimator", estimator, ESTIMATORS)
        if filter_loss_weight is None:
            filter_loss_weight = 1e-6 if estimator == "published" else 0.003
        self.filter_loss_weight = checks.non_negative("filter_loss_weight", filter_loss_weight)
        # A tensor: a compiled step would be compiled anew for each number.
        self.register_buffer("epoch", torch.tensor(1))
        self.filter_losses = nn.ModuleList(
            PublishedFilterLoss(template, num_classes)
            if estimator == "published"
            else FilterLoss(template, width, estimator=estimator, momentum=momentum)
            for width in widths
        )
        self.categories = nn.ModuleList(
            FilterCategories(num_classes, width, momentum, category_by) for width in widths
        )

    def ownership(self) -> Tensor:
        """``[K, N]`` float32: 1 for a filter's category, else 0."""
        classes = torch.arange(self.num_classes, device=self.filter_category.device)
        return (classes[:, None] == self.filter_category).float()

    @property
    def filter_category(self) -> Tensor:
        """The category of each filter of the last interpretable layer, ``[N]`` int64."""
        return self._category(len(self.categories) - 1)

    def _category(self, layer: int) -> Tensor:
        category: Tensor = self._categories(layer)()
        return torch.ones_like(category) if self.task == "single" else category

    def _categories(self, layer: int) -> FilterCategories:
        categories = self.categories[layer]
        assert isinstance(categories, FilterCategories)
        return categories

    def forward(self, images: Tensor, labels: Tensor | None = None) -> ICNNOutput:
        """Logits, maps and activations; the labels are not used."""
        maps, activations = images, []
        for layer in self.features.children():
            if isinstance(layer, TemplateMask):
                activations.append(maps)
            maps = layer(maps)
        self._warn_of_many_positions(activations)
        return ICNNOutput(self.head_logits(maps), maps, tuple(activations))

    def loss_terms(self, output: ICNNOutput, labels: Tensor) -> dict[str, Tensor]:
        """``discrimination``, and ``filter_loss``: the weighted sum over both layers.

        In training mode the categories and running estimates take in the batch, and learnt betas
        see where they are to go.

        Raises:
            TypeError, ValueError: see ``InterpretableNetwork``.
            RuntimeError: computed again by ``torch.utils.checkpoint``, in training.
        """
        check_output(output, ICNNOutput, labels, self.num_classes)
        if len(output.activations) != len(self.filter_losses):
            raise ValueError(
                f"output: got {len(output.activations)} layers of activations, want"
                f" {len(self.filter_losses)}: the output of this model's forward"
            )
        if self.training:
            checks.not_recomputed("ICNN.loss_terms")
        terms = []
        for layer, (maps, beta) in enumerate(zip(output.activations, self._betas(), strict=True)):
            filter_loss = self.filter_losses[layer]
            if self.training:
                self._categories(layer).update(maps, labels)
            category = self._category(layer)
            if isinstance(filter_loss, PublishedFilterLoss):
                betas = None if beta is None else beta(*maps.shape[2:])
                terms.append(filter_loss(maps, labels, category, betas).sum())
            else:
                of_categories = (labels, category) if self.estimator == "target" else ()
                loss = filter_loss(maps, *of_categories)
                peaks = maps.detach().amax((2, 3)).to(loss.dtype)
                terms.append((peaks.sum(0) / max(len(maps), 1) * loss).sum())
            if self.training and beta is not None:
                beta.observe(maps, labels, category)
        return {
            "discrimination": self._discrimination(output.logits, labels),
            "filter_loss": self.filter_loss_weight * torch.stack(terms).sum() / self.epoch,
        }

    def begin_epoch(
        self,
        epoch: int,
        batches: int | None = None,
        epochs: int | None = None,
        *,
        images: Iterable[tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        """The weight of the filter loss falls with the epoch; see ``InterpretableNetwork``."""
        super().begin_epoch(epoch, batches, epochs, images=images)
        self.epoch.fill_(epoch)

    def after_step(self) -> None:
        """Learnt betas move; see ``InterpretableNetwork``."""
        for beta in self._betas():
            if beta is not None:
                beta.step()

    def _betas(self) -> list[LearnedBeta | None]:
        """Of each mask layer."""
        return [mask.beta for mask in self.features.children() if isinstance(mask, TemplateMask)]

    def _warn_of_many_positions(self, activations: list[Tensor]) -> None:
        if self._warned or torch.compiler.is_compiling():
            return
        size = max((maps.shape[2:] for maps in activations), key=math.prod)
        if math.prod(size) > MANY_POSITIONS:
            self._warned = True
            warnings.warn(
                f"features: yield maps {' x '.join(map(str, size))}; filter losses take long on"
                f" more than {MANY_POSITIONS} positions: smaller images, or a deeper backbone, take"
                " less",
                stacklevel=3,
            )

    def _discrimination(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.task != "logistic":  # of two logits, cross entropy is the logistic loss
            return cross_entropy(logits, labels).mean()
        logits = checks.accumulable(logits)
        own = nn.functional.one_hot(labels.to(torch.int64), self.num_classes).to(logits.dtype)
        each = nn.functional.binary_cross_entropy_with_logits(logits, own, reduction="none")
        return each.sum(1).mean()

    def options(self) -> Mapping[str, object]:
        return {
            "task": self.task,
            "estimator": self.estimator,
            "filter_loss_weight": self.filter_loss_weight,
        }


def _convolution(in_channels: int, num_filters: int, kernel: int, initial: str) -> nn.Conv2d:
    conv = inserted_convolution(in_channels, num_filters, kernel)
    if checks.one_of("initial", initial, INITIAL) == "published":
        assert conv.bias is not None
        nn.init.normal_(conv.weight, std=0.01)
        nn.init.zeros_(conv.bias)
    return conv


def _refuse_without_convolution(initial: str, mask_after_pool: bool) -> None:
    """Options of the second interpretable layer where there is none."""
    if mask_after_pool:
        raise ValueError("mask_after_pool: got True, want False: no convolution is inserted")
    if checks.one_of("initial", initial, INITIAL) != "default":
        raise ValueError(f"initial: got {initial!r}, want 'default': no convolution is inserted")


def _split_behind_pooling(head: nn.Module) -> tuple[nn.Sequential, nn.Sequential]:
    """A head up to the last pooling by a window that it starts with, and the rest of it."""
    layers = layers_of(head)
    last = 0
    for position, layer in enumerate(layers[: leading_pooling(head)], start=1):
        if isinstance(layer, nn.MaxPool2d | nn.AvgPool2d):
            last = position
    if last == 0:
        start = next((type(layer).__name__ for layer in layers), "nothing")
        raise ValueError(
            f"mask_after_pool: got True with a head that starts with {start}, want a head that is"
            " an nn.Sequential starting with nn.MaxPool2d or nn.AvgPool2d; or False"
        )
    return nn.Sequential(*layers[:last]), nn.Sequential(*layers[last:])
