"""ICCNN: filters in groups, each of which is to show one region of the image together."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from picnn_fast import checks
from picnn_fast._extras import extra
from picnn_fast.functional import group_class_loss, group_correlation_loss
from picnn_fast.layers import with_target_layer
from picnn_fast.losses import Copies, check_output, cross_entropy
from picnn_fast.models.base import InterpretableNetwork, check_task, evaluating
from picnn_fast.reference.masking import add_by_label

DECAY = 0.95  # of the moving mean
PUBLISHED_GROUPS = 16
EPSILON = 1e-5  # of the similarity that filters are grouped by
RANDOM_STATE = 21  # of the clustering, as published


class ICCNNOutput(NamedTuple):
    """What a forward pass yields: logits ``[B, K]`` and the target layer's maps."""

    logits: Tensor
    maps: Tensor


class ICCNN(InterpretableNetwork):
    """A compositional network: filters form groups, which correlate within and not across.

    Before each of the first ``regroup_epochs`` epochs filters are grouped anew, by spectral
    clustering of how they correlate over the training images: give these to
    ``begin_epoch(epoch, images=loader)``. From then on groups stay. The network learns by cross
    entropy, by a loss that lets the filters of a group correlate with each other more than with
    others (``functional.group_correlation_loss``), and, of several categories, by one that lets
    images of a class use the groups alike (``functional.group_class_loss``).

    The authors start from the ordinary network trained on the same images, with Adam at 1e-5,
    ``padding="replicate"`` and, of a ResNet, behind layer3 without an inserted convolution: 16
    groups and weights of 0.1 for several categories; for one a ``correlation_weight`` of 1. Their
    other networks on one category have 5 groups and 0.1 (VGG) or 1 (DenseNet).

    Correlation is about a moving mean of the maps, a buffer as large as they are from the first
    forward on. It is of each rank's own batches; DistributedDataParallel hands rank 0's to all.

    Args:
        features, head, num_classes, num_filters: see ``InterpretableNetwork``; the maps are
            ``[B, N, h, w]``, those after a ReLU.
        in_channels: channels of ``features``: a new target layer is put after them, a convolution
            to ``num_filters`` channels. None inserts nothing.
        insert_kernel: side of that convolution's windows: 3, or 1, with a ninth of the weights.
        inserted_activation: behind the inserted convolution: "relu" or "none".
        padding: of every convolution of the network, the inserted one too: "replicate" pads by the
            values at the border, as published, so that zeros there are no pattern of their own;
            "own" leaves the convolutions as they are. The state dict is the same.
        task: "softmax": cross entropy over the classes; "single": one category against the rest,
            label 1 for its images and 0 for the others (K = 2): its images alone enter the
            correlation, and there is no loss of classes.
        groups: of filters. None: 16, as published for several categories, or half the filters
            where that is fewer.
        correlation_weight: of the loss by which filters correlate in groups, λ1.
        class_weight: of the loss by which images of a class use groups alike, λ2; with the task
            "single" it does nothing.
        regroup_epochs: filters are grouped anew before each of so many first epochs; 0: never, and
            filters are dealt out to the groups in turn.
        published_mean: scramble the moving mean as the published code does, which keeps it as
            positions by channels and reads it as channels by positions: for comparisons alone.

    Attributes:
        groups: ``[N]`` int64, the group of each filter; dealt out in turn before the first
            grouping.
        mean: the moving mean ``[N, h, w]``, decay 0.95; evaluation does not move it.

    Raises:
        TypeError, ValueError: see ``InterpretableNetwork``; more groups than filters.

    Warns:
        UserWarning: see ``InterpretableNetwork``; once, an epoch in which filters are to be grouped
            is begun without images.

    Source:
        Shen, Wei, Huang, Zhang, Fan, Zhao, Zhang, "Interpretable Compositional Convolutional Neural
        Networks", IJCAI 2021; similarity by images about a moving mean, the second loss and the
        schedule as in the authors' code (ada-shen/icCNN).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from picnn_fast.models import ICCNN
        >>> _ = torch.manual_seed(0)
        >>> features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
        >>> model = ICCNN(features, head, num_classes=2, num_filters=8, groups=3)
        >>> loader = [(torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 1, 0]))]
        >>> model.begin_epoch(1, images=loader)
        >>> model.groups.unique().tolist()
        [0, 1, 2]
        >>> for images, labels in loader:
        ...     terms = model.loss_terms(model(images), labels)
        >>> list(terms)
        ['discrimination', 'correlation', 'group_class']
    """

    filters_per_class: ClassVar[float | None] = None  # the layer's own filters are grouped
    draws_masks: ClassVar[bool] = False  # a group is no class's own
    ownership_meaning: ClassVar[str] = "share of each class in what a filter's group responds with"
    groups: Tensor
    response: Tensor
    mean: Tensor
    seen: Tensor

    def __init__(
        self,
        features: nn.Module,
        head: nn.Module,
        num_classes: int,
        num_filters: int,
        *,
        in_channels: int | None = None,
        insert_kernel: int = 3,
        inserted_activation: Literal["relu", "none"] = "relu",
        padding: Literal["own", "replicate"] = "own",
        task: Literal["softmax", "single"] = "softmax",
        groups: int | None = None,
        correlation_weight: float = 0.1,
        class_weight: float = 0.1,
        regroup_epochs: int = 100,
        published_mean: bool = False,
    ) -> None:
        features = with_target_layer(
            features,
            in_channels,
            num_filters,
            activation=inserted_activation,
            kernel=insert_kernel,
        )
        super().__init__(features, head, num_classes, num_filters)
        self.padding = checks.one_of("padding", padding, ("own", "replicate"))
        if padding == "replicate":
            for layer in self.modules():
                if isinstance(layer, nn.Conv2d):
                    layer.padding_mode = "replicate"
        self.task = check_task(task, ("softmax", "single"), num_classes)
        if groups is None:
            groups = min(PUBLISHED_GROUPS, max(num_filters // 2, 1))
        if checks.integer("groups", groups, 1) > num_filters:
            raise ValueError(f"groups: got {groups}, want at most {num_filters}, the filters")
        self.num_groups = groups
        self.correlation_weight = checks.non_negative("correlation_weight", correlation_weight)
        self.class_weight = checks.non_negative("class_weight", class_weight)
        self.regroup_epochs = checks.integer("regroup_epochs", regroup_epochs, 0)
        self.published_mean = checks.boolean("published_mean", published_mean)
        self._warned = False
        self.register_buffer("groups", torch.arange(num_filters) % groups)
        # How much of each group's activation is of each class.
        self.register_buffer("response", torch.full((num_classes, groups), 1 / num_classes))
        # No positions yet: the size of the maps is not known.
        self.register_buffer("mean", torch.zeros(num_filters, 0, 0))
        self._copies = Copies([self])
        # 1 once a batch has set the mean. Not bool, of which averages of weights can make no mean,
        # and no scalar: torch 2.11 loses what a compiled step writes to one in double precision.
        self.register_buffer("seen", torch.zeros(1))

    def begin_epoch(
        self,
        epoch: int,
        batches: int | None = None,
        epochs: int | None = None,
        *,
        images: Iterable[tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        """Group the filters anew, in the first ``regroup_epochs`` epochs.

        The network sees the images once, in evaluation mode; across ranks their sums count, and the
        groups are those of rank 0 on all.

        Args:
            epoch, batches, epochs, images: see ``InterpretableNetwork``.

        Raises:
            ValueError: see ``InterpretableNetwork``; no images in ``images``, or images that the
                network makes maps of that are not finite.
            ImportError: scikit-learn is not installed.
        """
        super().begin_epoch(epoch, batches, epochs, images=images)
        if epoch > self.regroup_epochs:
            return
        if images is not None:
            self._regroup(images)
        elif not self._warned:
            self._warned = True
            warnings.warn(
                f"images: got None in epoch {epoch}, want the training images, by which filters are"
                f" grouped before each of the first {self.regroup_epochs} epochs, as in"
                " begin_epoch(epoch, images=loader): groups stay as they are",
                stacklevel=2,
            )

    @torch.no_grad()
    def _regroup(self, images: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Groups, and what classes they respond to, from all images."""
        activations = _Activations(self.num_classes)
        like = next(self.parameters())
        with evaluating(self):
            for batch, labels in images:
                checks.labels("images", labels, len(batch), self.num_classes)
                # The whole network: sharded, it gathers its layers by its own hooks alone.
                output = self(batch.to(like.device, like.dtype))
                activations.update(output.maps, labels)
        activations.gather()
        similarity = activations.similarity()
        if not similarity.isfinite().all():
            raise ValueError("images: got some of which maps are not finite, want finite maps")
        groups = self.groups
        if 1 < self.num_groups < self.num_filters:
            if not _many_ranks() or dist.get_rank() == 0:
                groups = torch.from_numpy(_clusters(similarity.cpu().numpy(), self.num_groups))
            groups = groups.to(self.groups)
            if _many_ranks():
                dist.broadcast(groups, 0)
        self.groups.copy_(groups)
        self.response.copy_(self._response(activations.class_means()))

    def _response(self, class_means: Tensor) -> Tensor:
        """``[K, groups]``: the share of each class in a group's mean activation ``[K, N]``.

        A group that no class activates is no class's more than another's.
        """
        means = class_means.clamp_min(0)
        members = nn.functional.one_hot(self.groups, self.num_groups).to(means)
        of_group = means @ members
        total = of_group.sum(0)
        return torch.where(total > 0, of_group / total, 1 / self.num_classes)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> ICCNNOutput:
        """Logits and maps; the labels are not used."""
        maps = self.filter_maps(images)
        return ICCNNOutput(self.head_logits(maps), maps)

    def filter_maps(self, images: Tensor) -> Tensor:
        """Maps as the head takes them, ``[B, N, h, w]``; the first make room for the mean."""
        maps = super().filter_maps(images)
        if self.mean.shape[1:] != maps.shape[2:] and not self._has_mean():
            dtype = torch.promote_types(maps.dtype, torch.float32)
            self.mean = maps.new_zeros(maps.shape[1:], dtype=dtype)
            if not torch.compiler.is_compiling():
                for network in self._copies:
                    if network.mean.numel() == 0:
                        network.mean = torch.zeros_like(self.mean, device=network.mean.device)
        return maps

    def _has_mean(self) -> bool:
        if torch.compiler.is_compiling():  # which cannot look at a value
            return self.mean.numel() > 0
        return bool(self.seen > 0)

    def loss_terms(self, output: ICCNNOutput, labels: Tensor) -> dict[str, Tensor]:
        """``discrimination``, ``correlation`` and, of several categories, ``group_class``.

        ``correlation`` over its weight is in [-2, 0), whatever the number of groups: -1 where
        filters of a group have no more in common than others; -2 where those of a group are alike
        and all of an image cancel. In training mode the moving mean takes in the batch.

        Raises:
            TypeError: labels that are not integers.
            ValueError: labels of another shape or out of range, an output of another model, or maps
                of another size than those before.
            RuntimeError: computed again by ``torch.utils.checkpoint``, in training.
        """
        check_output(output, ICCNNOutput, labels, self.num_classes)
        maps, single = output.maps, self.task == "single"
        mean = self._renewed_mean(maps)
        if self.published_mean:
            mean = mean.flatten(1).T.reshape(mean.shape)
        correlation = group_correlation_loss(
            maps,
            mean,
            self.groups,
            num_groups=self.num_groups,
            positive=labels == 1 if single else None,
        )
        terms = {
            "discrimination": cross_entropy(output.logits, labels).mean(),
            "correlation": self.correlation_weight * correlation,
        }
        if not single:
            terms["group_class"] = self.class_weight * group_class_loss(
                maps, self.groups, labels, self.num_classes, num_groups=self.num_groups
            )
        return terms

    @torch.no_grad()
    def _renewed_mean(self, maps: Tensor) -> Tensor:
        """The moving mean, with this batch where it is one of training, or the first."""
        if maps.shape[1:] != self.mean.shape:
            got, want = (" x ".join(map(str, m.shape[-2:])) for m in (maps, self.mean))
            raise ValueError(
                f"output: got maps {got}, want {want} as in the batches before: the moving mean is"
                " bound to that size; give images of one size"
            )
        # Single precision at least, whatever ``half()`` made of the buffer: steps would be lost.
        dtype = torch.promote_types(maps.dtype, torch.float32)
        if self.mean.dtype != dtype:
            self.mean = self.mean.to(dtype)
        if len(maps) == 0:
            return self.mean.clone()
        batch = maps.mean(0, dtype=dtype)
        known = self.mean.lerp(batch, 1 - DECAY) if self.training else self.mean
        mean = torch.where(self.seen > 0, known, batch)
        if self.training:
            checks.not_recomputed("ICCNN.loss_terms")
            self.mean.copy_(mean)
            self.seen.fill_(1)
        return mean

    def ownership(self) -> Tensor:
        """``[K, N]``: the share of each class in the mean activation of a filter's group.

        Over the images that filters were grouped by last; each column sums to 1, and 1/K
        everywhere, before the first grouping, says nothing.
        """
        return self.response[:, self.groups]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        saved = state_dict.get(f"{prefix}mean")
        if saved is not None and saved.ndim == 3 and len(saved) == self.num_filters:
            self.mean = torch.zeros_like(saved, device=self.mean.device)
        super()._load_from_state_dict(state_dict, prefix, *others)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._copies.add(self)

    def options(self) -> Mapping[str, object]:
        return {
            "groups": self.num_groups,
            "task": self.task,
            "padding": self.padding,
            "correlation_weight": self.correlation_weight,
            "class_weight": self.class_weight,
            "regroup_epochs": self.regroup_epochs,
        }


class _Activations:
    """Mean maps, covariance of filters and means by class over many images, in one pass.

    Exact: the sums of batches, and of ranks, are joined about their joint mean (Chan, Golub,
    LeVeque, 1983), so nothing cancels however far the maps are from 0.

    Args:
        num_classes: K.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.count = 0

    def update(self, maps: Tensor, labels: Tensor) -> None:
        """Take in maps ``[B, N, h, w]`` and their labels ``[B]``."""
        if len(maps) == 0:
            return
        if maps.device.type == "mps":  # which has no double precision
            maps = maps.cpu()
        maps = maps.to(torch.float64).flatten(2)
        filters, positions = maps.shape[1:]
        if self.count == 0:
            self.mean = maps.new_zeros(filters, positions)
            self.scatter = maps.new_zeros(filters, filters)
            self.class_sums = maps.new_zeros(self.num_classes, filters)
            self.class_counts = maps.new_zeros(self.num_classes)
        labels = labels.to(maps.device, torch.int64)
        add_by_label(self.class_sums, labels, maps.mean(2))
        add_by_label(self.class_counts, labels, maps.new_ones(len(labels)))
        mean = maps.mean(0)
        centred = (maps - mean).transpose(0, 1).flatten(1)
        apart = mean - self.mean
        total = self.count + len(maps)
        self.scatter += centred @ centred.T
        self.scatter += apart @ apart.T * (self.count * len(maps) / total)
        self.mean += apart * (len(maps) / total)
        self.count = total

    def gather(self) -> None:
        """Join what all ranks have seen.

        Raises:
            ValueError: no image was seen.
        """
        if self.count == 0:
            raise ValueError("images: got none, want the training images in batches")
        if not _many_ranks():
            return
        count = self.class_counts.sum()
        total, mean = count.clone(), self.mean * count
        for sums in (total, mean):
            dist.all_reduce(sums)
        mean /= total
        apart = self.mean - mean
        self.scatter += apart @ apart.T * count
        self.mean, self.count = mean, int(total)
        for sums in (self.scatter, self.class_sums, self.class_counts):
            dist.all_reduce(sums)

    def similarity(self) -> Tensor:
        """``[N, N]`` float64 in [0, 2]: 1 + correlation over positions and images."""
        covariance = self.scatter / self.count
        deviation = covariance.diagonal().sqrt()
        return covariance / (deviation[:, None] * deviation + EPSILON) + 1

    def class_means(self) -> Tensor:
        """``[K, N]`` float64: mean activation over positions and the images of a class, or 0."""
        return self.class_sums / self.class_counts.clamp_min(1)[:, None]


def _many_ranks() -> bool:
    return dist.is_available() and dist.is_initialized()


def _clusters(similarity: np.ndarray[Any, Any], groups: int) -> np.ndarray[Any, Any]:
    """The group of each filter, ``[N]``."""
    with extra("train"):
        from sklearn.cluster import SpectralClustering
    clustering = SpectralClustering(
        n_clusters=groups, affinity="precomputed", random_state=RANDOM_STATE
    )
    found: np.ndarray[Any, Any] = clustering.fit_predict(similarity).astype(np.int64)
    return found
