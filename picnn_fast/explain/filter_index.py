"""An index of all filters: the images each fires on, and those whose prediction it carried."""

from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from picnn_fast import checks, functional
from picnn_fast._extras import extra
from picnn_fast.backbones import ReceptiveField, receptive_field
from picnn_fast.explain.contributions import contribution_maps, owners
from picnn_fast.models.base import InterpretableNetwork
from picnn_fast.reference.masking import add_by_label

_MEMORY_LIMIT = 2**30
# Share of its mean by which a filter may vary and count as constant: the rounding of float32.
_ROUNDING = 2**-20


class TopImages(NamedTuple):
    """Of each filter the images that come first by some value, the first of them first.

    Of equal values the image of the lower index comes first.

    Attributes:
        images: ``[N, k]`` int64, indices of images in the order they were read.
        labels: ``[N, k]`` int64, their classes.
        predicted: ``[N, k]`` int64, the classes they were taken for.
        values: ``[N, k]`` float32, what they were ranked by.
        positions: ``[N, k, 2]`` int64, row and column of the map where it peaks.
        boxes: ``[N, k, 4]`` float32, edges x0, y0, x1, y1 in pixels of that position's receptive
            field, clipped to the image; the whole image where the network has no such fields.
        parts: ``[N, k, P]`` bool, the parts that the middle of that field lies on; P is 0 where
            there are no part masks, or no fields.
    """

    images: Tensor
    labels: Tensor
    predicted: Tensor
    values: Tensor
    positions: Tensor
    boxes: Tensor
    parts: Tensor

    def shares(self, num_classes: int) -> Tensor:
        """The share of each class among a filter's images: ``[N, K]`` float32."""
        counts = torch.zeros(len(self.labels), num_classes)
        counts.scatter_add_(1, self.labels, torch.ones(self.labels.shape))
        return counts / self.labels.shape[1]


class FilterIndex(NamedTuple):
    """What a data set says of every filter. N filters, K classes, M images; all on the CPU.

    Attributes:
        by_activation: the images with the highest maximum of the filter's map.
        by_contribution: those to the logit of whose predicted class the filter added most; the
            peak is where it added most.
        exact: whether contributions sum up to the logits, as behind a linear head. Else they are
            the first order alone.
        num_images: M.
        image_size: pixels (H, W).
        map_size: positions (h, w); (1, T) of T tokens.
        field: where positions look; None where no regular fields can be told.
        without_field: why not, in a line; empty where there is a field.
        owner: ``[N]`` int64, the class that a filter stands for by ``ownership``; -1: none.
        owned: ``[N]`` float32, how much of the filter that class has, in [0, 1].
        constant: ``[N]`` bool, filters whose map's mean is the same in all images but for rounding,
            as of those that never fire.
        mutual_information: ``[K, N]`` float32, between the map's mean and each class, nats; 0 of
            constant filters, of which an estimate is noise.
        estimator: of it: "knn", or "histogram" where there were too many images to keep.
        class_means: ``[K, N]`` float32, the mean over the images of a class of the map's mean; NaN
            of a class without images.
        class_counts: ``[K]`` int64, images of each class.
        neighbours: ``[N, n]`` int64, the filters whose map's mean goes along most with it over the
            images, the nearest first, n at most N - 1.
        correlations: ``[N, n]`` float32, their correlation (Pearson's) with it; 0 where either
            filter is constant.
    """

    by_activation: TopImages
    by_contribution: TopImages
    exact: bool
    num_images: int
    image_size: tuple[int, int]
    map_size: tuple[int, int]
    field: ReceptiveField | None
    without_field: str
    owner: Tensor
    owned: Tensor
    constant: Tensor
    mutual_information: Tensor
    estimator: str
    class_means: Tensor
    class_counts: Tensor
    neighbours: Tensor
    correlations: Tensor

    @property
    def num_filters(self) -> int:
        """N."""
        return len(self.owner)

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_counts)

    def images_of(self, filters: Sequence[int]) -> list[int]:
        """The images that the pages of these filters show, ascending."""
        shown: set[int] = set()
        for ranking in (self.by_activation, self.by_contribution):
            shown.update(ranking.images[list(filters)].flatten().tolist())
        return sorted(shown)

    def as_dict(self) -> dict[str, Any]:
        """Tensors, numbers and text alone, nested in dictionaries."""
        plain = self._asdict()
        for name in ("by_activation", "by_contribution"):
            plain[name] = plain[name]._asdict()
        plain["field"] = None if self.field is None else self.field._asdict()
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        """The index that ``as_dict`` was made of.

        Raises:
            KeyError, TypeError: another content.
        """
        field = plain["field"]
        return cls(
            **{
                **plain,
                "by_activation": TopImages(**plain["by_activation"]),
                "by_contribution": TopImages(**plain["by_contribution"]),
                "field": None if field is None else ReceptiveField(**field),
            }
        )


def filter_index(
    network: InterpretableNetwork,
    batches: Iterable[Sequence[Tensor]],
    *,
    top: int = 9,
    neighbours: int = 5,
    memory_limit: int = _MEMORY_LIMIT,
    progress: bool = False,
) -> FilterIndex:
    """Of every filter what it fires on, what it is used for and what it tells, in one pass.

    A strong filter need not be a used one: images are ranked by the maximum of the filter's map,
    and again by what it adds to the logit of the class predicted, see ``contribution_maps``.

    No map is kept. Beside what it returns the pass holds sums ``[K, N]`` and ``[N, N]`` in double
    precision, label and prediction of each image, and the means of the maps, ``4 · N`` bytes an
    image; from ``memory_limit`` on histograms of them, ``512 · K · N`` bytes in all.

    Args:
        network: left in eval mode.
        batches: images ``[B, C, H, W]`` as the network takes them, labels ``[B]`` integers in
            [0, K), and where they are annotated the masks of parts, ``[B, P, H, W]`` bool. All
            images are of one size. ``picnn_fast.data.Batches`` yields them of a data module.
        top: images to keep of each filter, by either value; fewer where there are fewer.
        neighbours: nearest filters to keep of each.
        memory_limit: bytes of means that are kept to tell mutual information by nearest
            neighbours, the papers' estimate; above it is told by histograms.
        progress: show a progress bar.

    Raises:
        TypeError: arguments of the wrong kind.
        ValueError: fewer than three images, images of several sizes, labels out of range, or maps
            that are not finite.

    Source:
        Contributions: see ``explain_image``. Mutual information: Liang et al., "Training
        Interpretable CNNs by Differentiating Class-Specific Filters", ECCV 2020, section 4.1.

    Example:
        >>> import torch
        >>> from picnn_fast.explain import filter_index
        >>> from picnn_fast.models import make_interpretable
        >>> network = make_interpretable("small-cnn", "icnn", num_classes=3, num_filters=8)
        >>> batches = [(torch.rand(6, 3, 32, 32), torch.arange(6) % 3) for _ in range(2)]
        >>> index = filter_index(network, batches, top=4)
        >>> index.by_activation.images.shape, index.by_activation.boxes.shape
        (torch.Size([8, 4]), torch.Size([8, 4, 4]))
        >>> index.mutual_information.shape, index.neighbours.shape
        (torch.Size([3, 8]), torch.Size([8, 5]))
    """
    if not isinstance(network, InterpretableNetwork):
        raise TypeError(
            f"network: got {type(network).__name__}, want an interpretable network, as of"
            " make_interpretable"
        )
    for name, value in (("top", top), ("neighbours", neighbours), ("memory_limit", memory_limit)):
        checks.integer(name, value, 1)
    network.eval()
    with torch.inference_mode(False), torch.no_grad():
        making = _Pass(network, top, memory_limit)
        for images, labels, masks in _read(network, batches, progress):
            making.add(images, labels, masks)
        return making.result(neighbours)


def _read(
    network: InterpretableNetwork, batches: Iterable[Sequence[Tensor]], progress: bool
) -> Iterable[tuple[Tensor, Tensor, Tensor | None]]:
    """Checked batches, on the network's device."""
    if progress:
        with extra("train"):
            from rich.progress import track
        total = len(batches) if isinstance(batches, Sized) else None
        batches = track(batches, "indexing filters", total=total, transient=True)
    parameter = next(network.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    size: tuple[int, ...] | None = None
    parts: int | None = None
    for batch in batches:
        if not isinstance(batch, tuple | list) or len(batch) not in (2, 3):
            raise TypeError(
                f"batches: got {type(batch).__name__}, want images, labels and perhaps part masks"
            )
        images, labels, *rest = batch
        checks.floating("images", images)
        size = tuple(images.shape[1:]) if size is None else size
        if images.ndim != 4 or tuple(images.shape[1:]) != size:
            raise ValueError(
                f"images: got shape {tuple(images.shape)}, want [B, C, H, W], all of one size"
            )
        checks.labels("labels", labels, len(images), network.num_classes)
        masks = rest[0] if rest else None
        count = 0
        if masks is not None:
            checks.tensor("masks", masks)
            count = masks.shape[1] if masks.ndim == 4 else 0
            wanted = (len(images), count, *size[1:])
            if tuple(masks.shape) != wanted or masks.dtype != torch.bool:
                raise ValueError(
                    f"masks: got {masks.dtype} {tuple(masks.shape)}, want bool [B, P,"
                    f" {size[1]}, {size[2]}]: of each image and part, as large as the image"
                )
            masks = masks.to(device)
        parts = count if parts is None else parts
        if count != parts:
            raise ValueError(f"masks: got {count} parts, want {parts} as in the batches before")
        if len(images):
            yield images.to(device), labels.to(device, torch.int64), masks


class _Pass:
    """What is held of the images so far."""

    def __init__(self, network: InterpretableNetwork, top: int, memory_limit: int) -> None:
        self.network = network
        self.by_activation, self.by_contribution = _Top(top), _Top(top)
        self.labels: list[Tensor] = []
        self.predicted: list[Tensor] = []
        self.seen = 0
        self.exact = True
        self.image_size = (0, 0)
        self.map_size = (0, 0)
        self.field: ReceptiveField | None = None
        self.without_field = ""
        self.pixels = torch.empty(0, dtype=torch.int64)
        self.sums = _Sums(network.num_classes, network.num_filters)
        self.information = _Information(network.num_classes, memory_limit)

    def add(self, images: Tensor, labels: Tensor, masks: Tensor | None) -> None:
        found = contribution_maps(self.network, images)
        maps = checks.accumulable(found.maps.movedim(self.network.channel_dim, 1))
        checks.holds("maps", maps.isfinite().all(), lambda: "NaN or infinity", "finite activations")
        if self.seen == 0:
            self._look(images, maps)
        on_parts = None
        if masks is not None and self.field is not None:  # the parts at each position
            on_parts = masks.flatten(2)[..., self.pixels.to(masks.device)].movedim(1, 2)
        maps, terms = (x.reshape(*x.shape[:2], -1) for x in (maps, found.terms))
        numbers = torch.arange(self.seen, self.seen + len(images), device=images.device)
        values, places = maps.max(2)
        self.by_activation.add(values, numbers, places, on_parts)
        terms = checks.accumulable(terms)
        self.by_contribution.add(terms.sum(2), numbers, terms.argmax(2), on_parts)
        self.seen += len(images)
        self.exact = self.exact and bool(found.exact.all())
        labels = labels.cpu()
        self.labels.append(labels)
        self.predicted.append(found.target.cpu())
        pooled = maps.mean(2).cpu()
        self.sums.add(pooled, labels)
        self.information.add(pooled, labels)

    def _look(self, images: Tensor, maps: Tensor) -> None:
        """Sizes, and where the positions of the maps look, of the first images."""
        height, width = images.shape[2:]
        self.image_size = (height, width)
        self.map_size = (1, maps[0, 0].numel())
        if self.network.channel_dim != 1 or maps.ndim != 4:
            self.without_field = "the maps are not [B, N, h, w]"
            return
        self.map_size = (maps.shape[2], maps.shape[3])
        try:
            field = receptive_field(
                self.network.features, self.image_size, channels=images.shape[1]
            )
        except (TypeError, ValueError) as error:
            self.without_field = " ".join(str(error).split())
            return
        if tuple(field.map_size) != self.map_size:
            self.without_field = f"the maps are {self.map_size}, their fields {field.map_size}"
            return
        self.field = field
        x, y = field.centres().flatten(0, 1).floor().long().unbind(1)
        self.pixels = y.clamp(0, height - 1) * width + x.clamp(0, width - 1)

    def result(self, neighbours: int) -> FilterIndex:
        if self.seen < 3:
            raise ValueError(f"batches: got {self.seen} images, want at least 3")
        owner = owners(self.network).cpu()
        ownership = self.network.ownership()
        owned = torch.zeros(len(owner))
        if ownership is not None:
            owned = ownership.cpu().float().amax(0)
        constant = self.sums.constant()
        nearest, correlations = self.sums.nearest(neighbours)
        return FilterIndex(
            by_activation=self._ranked(self.by_activation),
            by_contribution=self._ranked(self.by_contribution),
            exact=self.exact,
            num_images=self.seen,
            image_size=self.image_size,
            map_size=self.map_size,
            field=self.field,
            without_field=self.without_field,
            owner=owner,
            owned=owned,
            constant=constant,
            mutual_information=self.information.matrix().where(~constant, 0).float(),
            estimator=self.information.estimator,
            class_means=(self.sums.by_class / self.sums.counts[:, None]).float(),
            class_counts=self.sums.counts,
            neighbours=nearest,
            correlations=correlations,
        )

    def _ranked(self, ranking: "_Top") -> TopImages:
        values, images, places, parts = (column.transpose(0, 1).cpu() for column in ranking.columns)
        labels, predicted = torch.cat(self.labels), torch.cat(self.predicted)
        height, width = self.image_size
        whole = torch.tensor([0, 0, width, height], dtype=torch.float32)
        boxes = whole.expand(*places.shape, 4).clone()
        if self.field is not None:
            boxes = self.field.boxes().flatten(0, 1)[places]
        columns = self.map_size[1]
        return TopImages(
            images=images.contiguous(),
            labels=labels[images],
            predicted=predicted[images],
            values=values.float().contiguous(),
            positions=torch.stack([places // columns, places % columns], -1),
            boxes=boxes,
            parts=parts.contiguous(),
        )


class _Top:
    """Running best of each filter: values, images, places ``[k, N]``, and parts ``[k, N, P]``."""

    def __init__(self, top: int) -> None:
        self.top = top
        self.columns: list[Tensor] = []

    def add(self, values: Tensor, images: Tensor, places: Tensor, parts: Tensor | None) -> None:
        """Images after all those before, ``[B]``; of the others ``[B, N]``.

        Args:
            values: to rank by.
            images: their numbers.
            places: of the peaks.
            parts: ``[B, positions, P]``, the parts at each position.
        """
        on_parts = values.new_empty(*values.shape, 0, dtype=torch.bool)
        if parts is not None:
            on_parts = parts.gather(1, places[..., None].expand(-1, -1, parts.shape[2]))
        columns = [values, images[:, None].expand_as(values), places, on_parts]
        if self.columns:
            columns = [torch.cat(both) for both in zip(self.columns, columns, strict=True)]
        order = columns[0].sort(dim=0, descending=True, stable=True).indices[: self.top]
        *flat, on_parts = columns
        by_part = order[..., None].expand(-1, -1, on_parts.shape[2])
        self.columns = [*(column.gather(0, order) for column in flat), on_parts.gather(0, by_part)]


class _Sums:
    """Sums by class, and how filters vary together, of means of maps as they come."""

    def __init__(self, classes: int, filters: int) -> None:
        self.counts = torch.zeros(classes, dtype=torch.int64)
        self.by_class = torch.zeros(classes, filters, dtype=torch.float64)
        self.mean = torch.zeros(filters, dtype=torch.float64)
        self.products = torch.zeros(filters, filters, dtype=torch.float64)
        self.seen = 0

    def add(self, pooled: Tensor, labels: Tensor) -> None:
        pooled, batch = pooled.double(), len(pooled)
        self.counts += labels.bincount(minlength=len(self.counts))
        add_by_label(self.by_class, labels, pooled)
        # Chan, Golub, LeVeque 1979: of deviations from the mean, which do not cancel.
        mean = pooled.mean(0)
        apart, between = pooled - mean, mean - self.mean
        both = self.seen + batch
        self.products += apart.T @ apart
        self.products.addr_(between, between, alpha=self.seen * batch / both)
        self.mean += between * (batch / both)
        self.seen = both

    def deviations(self) -> Tensor:
        """Standard deviation of each filter over the images, ``[N]``."""
        return (self.products.diagonal() / self.seen).sqrt()

    def constant(self) -> Tensor:
        """Which filters do not vary but for rounding, ``[N]`` bool."""
        return self.deviations() <= _ROUNDING * self.mean.abs()

    def nearest(self, count: int) -> tuple[Tensor, Tensor]:
        """Of each filter those it correlates with most: indices and correlations ``[N, n]``."""
        scale = self.deviations().where(~self.constant(), torch.inf)
        correlations = self.products / self.seen / (scale[:, None] * scale)
        # In single precision, that equal filters be equal.
        correlations = correlations.clamp(-1, 1).float().fill_diagonal_(-torch.inf)
        values, order = correlations.sort(dim=1, descending=True, stable=True)
        count = min(count, len(order) - 1)
        return order[:, :count].contiguous(), values[:, :count].contiguous()


class _Information:
    """Mutual information of means of maps: of all of them, or of histograms where they are many."""

    def __init__(self, classes: int, memory_limit: int) -> None:
        self.classes, self.memory_limit = classes, memory_limit
        self.kept: list[tuple[Tensor, Tensor]] = []
        self.stored = 0
        self.histogram: Any = None

    @property
    def estimator(self) -> str:
        return "knn" if self.histogram is None else "histogram"

    def add(self, pooled: Tensor, labels: Tensor) -> None:
        self.kept.append((pooled, labels))
        self.stored += pooled.nbytes
        if self.histogram is None and self.stored > self.memory_limit:
            with extra("train"):
                from picnn_fast.metrics import MutualInformationScore
            self.histogram = MutualInformationScore(self.classes, estimator="histogram")
        if self.histogram is not None:
            for batch in self.kept:
                self.histogram.update(*batch)
            self.kept.clear()

    def matrix(self) -> Tensor:
        """``[K, N]`` in nats."""
        if self.histogram is not None:
            matrix: Tensor = self.histogram.matrix()
            return matrix
        activations, labels = (torch.cat(each) for each in zip(*self.kept, strict=True))
        return functional.mutual_information(activations, labels, self.classes)
