"""FIGURES: a record a figure says what it is called, what it needs and how it is computed."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from picnn_fast._extras import extra
from picnn_fast.backbones.receptive_field import ReceptiveField, receptive_field
from picnn_fast.data.loading import SeededDataModule
from picnn_fast.data.parts import PartDataModule
from picnn_fast.evaluation import localisation
from picnn_fast.evaluation.attacks import Attack, AttackDetection
from picnn_fast.evaluation.observation import Observation
from picnn_fast.evaluation.removal import removal_ownership
from picnn_fast.losses import cross_entropy
from picnn_fast.metrics import (
    TRAINING_SAMPLES,
    CalibrationError,
    FilterRemoval,
    GateSimilarity,
    InterClassCorrelation,
    LocationInstability,
    MaskLeakage,
    MeanOverImages,
    MutualInformationEstimates,
    PartInterpretability,
    PathwayAccuracy,
    Throughput,
    filter_cosines,
    filter_redundancy,
)
from picnn_fast.models import filter_weights
from picnn_fast.models.base import InterpretableNetwork
from picnn_fast.models.csg import CSG

with extra("train"):
    from torchmetrics import MeanMetric, Metric

# Of the maps that part interpretability has to keep; it needs somewhat more to compute.
MOST_MAP_BYTES = 3 << 29
# Above it the pattern of a mask names the class, and a run says so.
MOST_LEAKAGE = 0.9
# s of r_s, of the paper's figure 7.
CORRELATED = 0.1
# Of the test split; the attack of Carlini and Wagner takes many times as long as the others.
MOST_ATTACKED = {"fgsm": 4000, "pgd": 4000, "cw": 2000}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of evaluation.

    Those with the same ``metric``, ``update`` and ``prepare`` share one metric, which sees each
    image once: they are its parts.

    Attributes:
        heading: over its column of a table.
        meaning: what it measures, and its unit, in a few words.
        better: which way is better.
        reading: a sentence that says what chance gives, what a plain network gives, and which way
            is better.
        metric: network, data, draws to a new ``torchmetrics`` metric, whose ``compute`` yields a
            scalar, a ``MeanOverDraws``, or a NamedTuple of either.
        update: adds an observation to the metric.
        prepare: where given, it sees every image of the figure before the first update: a pass
            over the data of its own.
        prepares: whether ``prepare`` is of use for a network: else the pass is saved.
        part: which field of the NamedTuple that the metric computes; None: all it computes.
        needs: why the figure cannot be had of a network and data, or None where it can.
        when: "epoch": quick enough to be taken of the validation images every epoch; "run": of
            every evaluation; "asked": where it is named alone, since it costs much.
        images: of at most so many images of the test split, spread evenly over it; None: of all.
        remark: what to say of a value at the end of a training, or None where nothing need be said.
    """

    heading: str
    meaning: str
    better: Literal["higher", "lower"]
    reading: str
    metric: Callable[[InterpretableNetwork, Any, int], Metric]
    update: Callable[[Any, Observation], None]
    prepare: Callable[[Any, Observation], None] | None = None
    prepares: Callable[[InterpretableNetwork], bool] = lambda network: True
    part: str | None = None
    needs: Callable[[InterpretableNetwork, Any], str | None] = lambda network, data: None
    when: Literal["epoch", "run", "asked"] = "run"
    images: int | None = None
    remark: Callable[[float], str | None] = lambda value: None

    def of(self, computed: Any) -> Any:
        """The figure's own part of what its metric computed: a scalar, or a ``MeanOverDraws``."""
        return computed if self.part is None else getattr(computed, self.part)


def default_figures() -> list[str]:
    """The figures of every evaluation: all but those to be asked for."""
    return [name for name, figure in FIGURES.items() if figure.when != "asked"]


def sharing(names: Iterable[str]) -> dict[str, list[str]]:
    """Figures by the first of those that share one metric.

    Example:
        >>> from picnn_fast.evaluation.figures import sharing
        >>> sharing(["acc1", "mis"])
        {'acc1': ['acc1'], 'mis': ['mis']}
    """
    groups: dict[Any, list[str]] = {}
    for name in names:
        figure = FIGURES[name]
        key = (figure.metric, figure.update, figure.prepare, figure.images)
        groups.setdefault(key, []).append(name)
    return {group[0]: group for group in groups.values()}


def _needs_ownership(network: InterpretableNetwork, data: object) -> str | None:
    if not network.draws_masks:
        return f"{type(network).__name__} draws no masks of filters"
    if network.ownership() is None:
        return f"{type(network).__name__} gives no filter to a class"
    return None


def _needs_gate(network: InterpretableNetwork, data: object) -> str | None:
    return None if isinstance(network, CSG) else f"{type(network).__name__} has no gate"


def _update_density(metric: Metric, seen: Observation) -> None:
    assert isinstance(seen.network, CSG)
    metric.update(seen.network.density())


def _needs_performer(network: InterpretableNetwork, data: object) -> str | None:
    return "no performer" if network.performer() is None else None


# Whose maps a figure is of: the layers from the images to them, and their channels.
Layers = Callable[[InterpretableNetwork], tuple[nn.Module, int] | str]


def _filters(network: InterpretableNetwork) -> tuple[nn.Module, int] | str:
    return network.features, network.num_filters


def _performer_target(network: InterpretableNetwork) -> tuple[nn.Module, int] | str:
    performer = network.performer()
    if performer is None:
        return "no performer"
    return performer.target, performer.target_channels


def _performer_top(network: InterpretableNetwork) -> tuple[nn.Module, int] | str:
    performer = network.performer()
    if performer is None or performer.top is None:
        return "no performer" if performer is None else "no convolution above the target layer"
    return nn.Sequential(performer.target, performer.top), performer.top_channels


def _field(layers: nn.Module, data: PartDataModule) -> ReceptiveField:
    return receptive_field(layers, data.part_sets["test"].image_size)


def _needs_parts(
    kind: str, layers: Layers = _filters
) -> Callable[[InterpretableNetwork, SeededDataModule], str | None]:
    def needs(network: InterpretableNetwork, data: SeededDataModule) -> str | None:
        of = layers(network)
        if isinstance(of, str):
            return of
        if not isinstance(data, PartDataModule):
            return "the data has no part annotations"
        if not getattr(data.part_sets["test"], f"{kind}_names"):
            return f"the data has no {kind}s"
        if network.channel_dim != 1:
            return "the maps are not [B, N, h, w]"
        try:
            field = _field(of[0], data)
        except (TypeError, ValueError) as error:
            return str(error)
        samples = len(data.part_sets["test"])
        size = samples * of[1] * math.prod(field.map_size) * 4
        if kind == "part" and size > MOST_MAP_BYTES:
            return (
                f"the maps of {samples} images would take more than {MOST_MAP_BYTES / 2**30:g} GiB"
            )
        return None

    return needs


def _part_metric(
    kind: type[LocationInstability] | type[PartInterpretability],
    names: str,
    layers: Layers = _filters,
    filters: int | None = None,
) -> Callable[[InterpretableNetwork, PartDataModule, int], Metric]:
    """Of so many filters; None: as many as the layers have."""

    def metric(network: InterpretableNetwork, data: PartDataModule, draws: int) -> Metric:
        of = layers(network)
        assert not isinstance(of, str)
        count = len(getattr(data.part_sets["test"], names))
        # Of one category's images alone, where one was singled out (ICNN, tables 1 and 3).
        classes = 1 if data.category is not None else data.num_classes
        return kind(filters or of[1], count, _field(of[0], data), num_classes=classes)

    return metric


def _maps(seen: Observation) -> Tensor:
    return seen.maps


def _middle(seen: Observation) -> Tensor:
    """The maps of a filter that peaks in the middle of every image."""
    maps = torch.zeros_like(seen.maps[:, :1])
    maps[..., maps.shape[2] // 2, maps.shape[3] // 2] = 1
    return maps


def _anywhere(seen: Observation) -> Tensor:
    """Maps that peak anywhere, every place as likely as any other."""
    draw = torch.Generator().manual_seed(seen.seed)
    return torch.rand(seen.maps.shape, generator=draw).to(seen.maps.device)


def _update_parts(
    annotation: str, look: Callable[[Observation], Tensor] = _maps
) -> Callable[[Metric, Observation], None]:
    def update(metric: Any, seen: Observation) -> None:
        parts = seen.parts
        assert parts is not None
        maps, labels = look(seen), seen.labels
        annotations = getattr(parts, annotation)
        if metric.num_classes != seen.network.num_classes:  # the category, label 1
            shown = labels == 1
            if not shown.any():
                return
            maps, annotations, labels = maps[shown], annotations[shown], labels[shown] - 1
        metric.update(maps, annotations, labels)

    return update


def _remark_on_leakage(value: float) -> str | None:
    if value <= MOST_LEAKAGE:
        return None
    return (
        f"mask leakage is {value:.2f}: a mask drawn for a class gives that class with the maps of"
        " other images too, so that ACC2 says little of the maps"
    )


def _leakage(
    heading: str, meaning: str, reading: str, masks: Callable[[Observation], Tensor], **more: Any
) -> Figure:
    """Of the masks that ``masks`` takes from an observation."""
    return Figure(
        heading=heading,
        meaning=meaning,
        better="lower",
        reading=reading,
        metric=lambda network, data, draws: MaskLeakage(network.num_classes, draws),
        update=lambda metric, seen: metric.update(
            seen.maps, seen.labels, masks(seen), seen.network.head_logits
        ),
        needs=_needs_ownership,
        **more,
    )


def _top_maps(seen: Observation) -> Tensor:
    assert seen.performed.top is not None
    return seen.performed.top


def _more_errors(metric: Any, seen: Observation) -> None:
    """1 where the performer alone is right, -1 where it alone is wrong, else 0."""
    right = [
        (logits.argmax(1) == seen.labels).float() for logits in (seen.performed.logits, seen.logits)
    ]
    metric.update(right[0] - right[1])


def _location_instability(
    heading: str,
    meaning: str,
    reading: str,
    look: Callable[[Observation], Tensor] = _maps,
    layers: Layers = _filters,
    filters: int | None = None,
) -> Figure:
    """Of the maps that ``look`` makes of an observation, as those of ``layers``."""
    return Figure(
        heading=heading,
        meaning=meaning,
        better="lower",
        reading=reading,
        metric=_part_metric(LocationInstability, "landmark_names", layers, filters),
        update=_update_parts("landmarks", look),
        needs=_needs_parts("landmark", layers),
    )


def _throughput(network: InterpretableNetwork, data: object, draws: int) -> Metric:
    return Throughput()


def _update_throughput(metric: Any, seen: Observation) -> None:
    metric.update(seen.network, seen.network.discriminator(), seen.images)


def _timed(heading: str, meaning: str, reading: str, **more: Any) -> Figure:
    """Of wall-clock time, which another run does not repeat."""
    return Figure(
        heading=heading,
        meaning=meaning,
        reading=reading,
        metric=_throughput,
        update=_update_throughput,
        when="asked",
        **more,
    )


def _estimates(network: InterpretableNetwork, data: object, draws: int) -> Metric:
    return MutualInformationEstimates(network.num_classes)


def _update_estimates(metric: Metric, seen: Observation) -> None:
    metric.update(seen.pooled, seen.labels)


def _information(heading: str, meaning: str, reading: str, part: str) -> Figure:
    """By one estimator, of activations that all of them share."""
    return Figure(
        heading=heading,
        meaning=meaning,
        better="higher",
        reading=reading,
        metric=_estimates,
        update=_update_estimates,
        part=part,
    )


def _weights(network: InterpretableNetwork, data: SeededDataModule) -> Tensor:
    """Of the filters, found by an image of zeros."""
    image: Tensor = data.test_set[0][0]
    return filter_weights(network, torch.zeros_like(image[None], device=_device(network)))


def _device(network: InterpretableNetwork) -> torch.device:
    return next((x.device for x in network.parameters()), torch.device("cpu"))


def _needs_weights(network: InterpretableNetwork, data: SeededDataModule) -> str | None:
    if len(data.test_set) == 0:  # type: ignore[arg-type]
        return "the test split has no image"
    try:
        _weights(network, data)
    except ValueError as error:
        return str(error).partition(": ")[2]
    return None


def _update_redundancy(metric: Any, seen: Observation) -> None:
    """Of the weights alone: one batch is enough."""
    if not metric.update_called:
        weights = filter_weights(seen.network, seen.images[:1])
        metric.update(filter_redundancy(filter_cosines(weights), CORRELATED))


def _inter_class_correlation(
    network: InterpretableNetwork, data: SeededDataModule, draws: int
) -> Metric:
    cosines = filter_cosines(_weights(network, data))
    fixed = network.fixed if isinstance(network, CSG) else None
    return InterClassCorrelation(cosines, network.num_classes, fixed and fixed[0])


def _needs_classes_of_filters(network: InterpretableNetwork, data: object) -> str | None:
    if network.num_classes < 2:
        return "there is a single class"
    if network.ownership() is None:
        return f"{type(network).__name__} gives no filter to a class"
    return None


def _gate_similarity(network: InterpretableNetwork, data: object, draws: int) -> Metric:
    ownership = network.ownership()
    assert ownership is not None
    return GateSimilarity(ownership)


def _update_similarity(metric: Any, seen: Observation) -> None:
    metric.update(seen.pooled, seen.logits, seen.labels)


def _removal(network: InterpretableNetwork, data: object, draws: int) -> Metric:
    ownership = removal_ownership(network)
    return FilterRemoval(network.num_classes, network.num_filters, ownership=ownership)


def _prepare_removal(metric: Any, seen: Observation) -> None:
    metric.prepare(seen.pooled, seen.labels)


def _update_removal(metric: Any, seen: Observation) -> None:
    def classify(maps: Tensor, mask: Tensor) -> Tensor:
        return seen.network.head_logits(maps, mask, seen.bypass)

    metric.update(seen.maps, seen.labels, classify)


def _of_removal(heading: str, meaning: str, reading: str, **more: Any) -> Figure:
    """Without the filters of one class after another."""
    return Figure(
        heading=heading,
        meaning=meaning,
        reading=reading,
        metric=_removal,
        update=_update_removal,
        prepare=_prepare_removal,
        prepares=lambda network: removal_ownership(network) is None,
        **more,
    )


def _needs_detection(network: InterpretableNetwork, data: SeededDataModule) -> str | None:
    images = len(data.test_set)  # type: ignore[arg-type]
    if network.num_classes < 2:
        return "there is no other class to attack towards"
    if not any(isinstance(x, nn.Conv1d | nn.Conv2d | nn.Conv3d) for x in network.modules()):
        return "there is no convolution"
    if images < TRAINING_SAMPLES[0]:
        return f"the test split has {images} images, want at least {TRAINING_SAMPLES[0]}"
    return None


def _update_detection(metric: Any, seen: Observation) -> None:
    metric.update(seen.images, seen.labels, seed=seen.seed)


def _detection(name: str, attack: str) -> dict[str, Figure]:
    """Of images attacked in one way: whether they are told, and whether the attack succeeds."""

    def metric(network: InterpretableNetwork, data: SeededDataModule, draws: int) -> Metric:
        return AttackDetection(Attack(network, name, mean=data.mean, std=data.std))

    shared: Any = {
        "metric": metric,
        "update": _update_detection,
        "needs": _needs_detection,
        "when": "asked",
        "images": MOST_ATTACKED[name],
        "better": "lower",
    }
    return {
        f"detection_{name}": Figure(
            heading=f"detection {name}",
            meaning=f"error of a forest that tells images attacked by {attack}, where it succeeded",
            reading=(
                "Lower is better: chance is 0.5, and a plain network's is the mark to beat; of the"
                " most training samples, 2000 at most, that the images give."
            ),
            part="error",
            **shared,
        ),
        f"attack_{name}": Figure(
            heading=f"… {name} succeeds",
            meaning="share of images classified rightly that no longer are once attacked",
            reading=(
                "Lower is better: 0 where no attack succeeds, of a plain network it is often near"
                " 1, and there is no chance in it."
            ),
            part="success",
            **shared,
        ),
    }


def _localisation(
    name: str, heading: str, percent: int, iou: str, precision: str, reading: str, **told: Any
) -> dict[str, Figure]:
    """The two parts of a metric of localisation: IoU, and its precision at so many per cent."""
    common: Any = {"better": "higher", "reading": reading, **told}
    return {
        f"{name}_iou": Figure(heading=f"{heading} IoU", meaning=iou, part="iou", **common),
        f"{name}_ap{percent}": Figure(
            heading=f"… AP{percent}", meaning=precision, part="precision", **common
        ),
    }


FIGURES: dict[str, Figure] = {
    "acc1": Figure(
        heading="ACC1",
        meaning="accuracy by all filters",
        better="higher",
        reading=(
            "Higher is better: from chance, 1 / classes, to what a plain network reaches on the"
            " same images."
        ),
        metric=lambda network, data, draws: PathwayAccuracy(network.num_classes),
        update=lambda metric, seen: metric.update(seen.logits, seen.labels),
        when="epoch",
    ),
    "acc2": Figure(
        heading="ACC2",
        meaning="by those drawn for the pseudo-label",
        better="higher",
        reading=(
            "Higher is better: chance is 1 / classes, ACC1 as much as there is to reach, and a"
            " plain network, whose filters are dealt out at random, lies between them."
        ),
        metric=lambda network, data, draws: PathwayAccuracy(network.num_classes, draws),
        update=lambda metric, seen: metric.update(seen.masked_logits, seen.labels),
        needs=_needs_ownership,
        when="epoch",
    ),
    "acc3": Figure(
        heading="ACC3",
        meaning="without those of the true class",
        better="lower",
        reading=(
            "Lower is better: chance is 1 / classes, and a plain network, which misses a few"
            " random filters alone, stays near its ACC1."
        ),
        metric=lambda network, data, draws: PathwayAccuracy(network.num_classes, draws),
        update=lambda metric, seen: metric.update(seen.complement_logits, seen.labels),
        needs=_needs_ownership,
        when="epoch",
    ),
    "leakage": _leakage(
        "leakage",
        "accuracy by the label's filters with the maps of another image, 1 / classes at best",
        "Lower is better: a mask that tells nothing by itself gives chance, 1 / classes, as a"
        " plain network's random ones nearly do, and one that names its class gives 1.",
        lambda seen: seen.label_masks,
        remark=_remark_on_leakage,
    ),
    "pseudo_label_leakage": _leakage(
        "… pseudo",
        "the same with the filters of ACC2, drawn for the pseudo-label",
        "Lower is better: chance and a plain network are as of leakage, and a mask that names"
        " its class gives ACC1.",
        lambda seen: seen.pseudo_label_masks,
    ),
    "mis": _information(
        "MIS",
        "mutual information score by nearest neighbours, nats",
        "Higher is better: by chance, of filters that tell nothing of the classes, about 0, of one"
        " that tells a class from all others its entropy, 0.33 with ten classes of one size, and a"
        " plain network lies between them.",
        "knn",
    ),
    "mis_histogram": _information(
        "… histogram",
        "the same by counts in bins",
        "Higher is better: chance gives about 32 / images too much, and a plain network what MIS"
        " says and somewhat more.",
        "histogram",
    ),
    "mis_miller_madow": _information(
        "… Miller-Madow",
        "the same with what it is too high by taken off",
        "Higher is better: chance gives about 0, and a plain network what MIS says or somewhat"
        " less.",
        "miller_madow",
    ),
    "mis_soft_histogram": _information(
        "… soft histogram",
        "by counts shared out between the two nearest bins, as it can be trained by",
        "Higher is better: chance gives somewhat above 0, and a plain network about what MIS says.",
        "soft_histogram",
    ),
    "calibration_error": Figure(
        heading="ECE",
        meaning="expected calibration error: accuracy apart from confidence, in 15 bins of it",
        better="lower",
        reading=(
            "Lower is better: 0 where as many images are right as their confidence says, as of a"
            " guess at chance that knows it is one; a plain network trained to the end is often"
            " surer than it is right."
        ),
        metric=lambda network, data, draws: CalibrationError(network.num_classes),
        update=lambda metric, seen: metric.update(seen.logits, seen.labels),
    ),
    "negative_log_likelihood": Figure(
        heading="NLL",
        meaning="negative log-likelihood of the true class, nats",
        better="lower",
        reading=(
            "Lower is better: chance gives the logarithm of the number of classes, a plain network"
            " is trained to give less, and mistakes that it is sure of add much."
        ),
        metric=lambda network, data, draws: MeanOverImages(),
        update=lambda metric, seen: metric.update(cross_entropy(seen.logits, seen.labels)),
    ),
    "density": Figure(
        heading="L1-density",
        meaning="of the gate: the share of its elements that it sums to",
        better="lower",
        reading=(
            "Lower is better: 1 where every filter serves every class, as in a plain network, and"
            " 1 / classes, where each serves one, is the least; there is no chance in it."
        ),
        metric=lambda network, data, draws: MeanMetric(),
        update=_update_density,
        needs=_needs_gate,
    ),
    "filter_redundancy": Figure(
        heading="r_0.1",
        meaning="share of pairs of filters whose weights have a cosine of 0.1 or more",
        better="lower",
        reading=(
            "Lower is better: filters alike in nothing give 0, those with a few hundred weights"
            " drawn at random, chance, a few hundredths at most, and a plain network more."
        ),
        metric=lambda network, data, draws: MeanMetric(),
        update=_update_redundancy,
        needs=_needs_weights,
    ),
    "inter_class_correlation": Figure(
        heading="C_IC",
        meaning="mean cosine between the weights of filters that different classes activate most",
        better="lower",
        reading=(
            "Lower is better: filters with weights drawn at random give about 0, chance, unless"
            " classes share those that they activate most, as in a plain network, about twice as"
            " much in the paper as with CSG."
        ),
        metric=_inter_class_correlation,
        update=lambda metric, seen: metric.update(seen.pooled, seen.labels),
        needs=_needs_weights,
    ),
    "s_tp": Figure(
        heading="S_TP",
        meaning="cosine of a class's mean feature and its own filters, less others', if right",
        better="higher",
        reading=(
            "Higher is better: 0 is chance, what a plain network's random filters give, and 1 where"
            " images classified rightly activate the filters of their class alone."
        ),
        metric=_gate_similarity,
        update=_update_similarity,
        part="true_positives",
        needs=_needs_classes_of_filters,
    ),
    "s_fn": Figure(
        heading="S_FN",
        meaning="the same of images that are classified wrongly",
        better="higher",
        reading=(
            "Higher is better: 0 is chance, what a plain network's random filters give; below S_TP"
            " where images are classified wrongly since they activate filters of other classes."
        ),
        metric=_gate_similarity,
        update=_update_similarity,
        part="false_negatives",
        needs=_needs_classes_of_filters,
    ),
    "removed_class": _of_removal(
        "removed",
        "accuracy of a class without its filters, mean over classes, 20 at most",
        "Lower is better: 0 where a class cannot be told without its filters, chance is 1 /"
        " classes, ACC1 what it stays at where it owns none by more than a half, and a plain"
        " network without the tenth that it activates most lies between them.",
        better="lower",
        part="removed",
    ),
    "removed_others": _of_removal(
        "… others",
        "accuracy of all other classes without those filters",
        "Higher is better: chance is 1 / classes, ACC1 as much as there is to reach, and a plain"
        " network, of whose filters a tenth is gone, lies between them; chance, too, where a class"
        " owns all filters.",
        better="higher",
        part="others",
    ),
    "location_instability": _location_instability(
        "location instab.",
        "of a filter's peak about the landmarks, image diagonals",
        "Lower is better, and says something of parts below that of the middle alone: chance is"
        " that of filters that peak anywhere, and a plain network lies between these two or"
        " thereabouts.",
    ),
    "location_instability_middle": _location_instability(
        "… of the middle",
        "of filters that always peak in the middle, and say nothing of parts",
        "A mark to beat, lower than chance: a plain network, and others, that do not lie below"
        " it say nothing of parts.",
        _middle,
        filters=1,  # others would be the same
    ),
    "location_instability_random": _location_instability(
        "… at random",
        "of filters that peak anywhere",
        "What chance gives, whatever the network, a plain one too; lower is better.",
        _anywhere,
    ),
    "location_instability_performer": _location_instability(
        "… performer",
        "of the maps that are explained",
        "What the plain network gives that is explained, its explainer's are to be lower;"
        " chance is that of filters that peak anywhere.",
        lambda seen: seen.performed.target,
        _performer_target,
    ),
    "location_instability_top": _location_instability(
        "… its top conv.",
        "of the performer's last convolution",
        "What the top of the plain network gives that is explained, its explainer's are to be"
        " lower; chance is that of filters that peak anywhere.",
        _top_maps,
        _performer_top,
    ),
    "part_interpretability": Figure(
        heading="part interpr.",
        meaning="share of images whose part a filter finds",
        better="higher",
        reading=(
            "Higher is better: filters that fire by chance cover a part in few images, a plain"
            " network's are the mark to beat, and what a fixed place gives was not measured."
        ),
        metric=_part_metric(PartInterpretability, "part_names"),
        update=_update_parts("part_masks"),
        needs=_needs_parts("part"),
    ),
    **_localisation(
        "gradmap",
        "GradMap",
        20,
        "IoU of the object and the pixels that move a class's 30 filters most, mean over them",
        "share of images in which that mean is at least 0.2",
        "Higher is better: pixels at chance have at most the share of the image that the object"
        " fills, and a plain ResNet-152 on VOC Part was published at 0.26 and 0.70.",
        metric=localisation.gradmap,
        prepare=localisation.prepare_gradmap,
        update=localisation.update_gradmap,
        needs=localisation.needs_object_masks,
        when="asked",
        images=500,
    ),
    **_localisation(
        "gradmap_class",
        "GradMap class",
        20,
        "IoU of the object and the pixels that move the true class's probability most",
        "share of images in which that is at least 0.2",
        "Higher is better: chance is as of GradMap, and a plain network, which is trained on that"
        " probability, is the mark to beat.",
        metric=localisation.class_gradmap,
        update=localisation.update_class_gradmap,
        needs=localisation.needs_object_masks,
        when="asked",
        images=500,
    ),
    **_localisation(
        "activmap",
        "ActivMap",
        30,
        "IoU of the object and a filter's top 30 %, of its best class, mean over filters",
        "share of that class's images in which that is above 0.3, mean over filters",
        "Higher is better: chance is about 0.3 o / (0.3 + 0.7 o) of an object that fills a share o,"
        " o of a filter that fires in less than 30 % of places and so marks the whole image, and a"
        " plain ResNet-152 on VOC Part was published at 0.36 and 0.68.",
        metric=localisation.activmap,
        prepare=localisation.prepare_activmap,
        update=localisation.update_activmap,
        needs=localisation.needs_maps_and_object_masks,
    ),
    **_localisation(
        "cam",
        "CAM",
        30,
        "IoU of the object and the top 30 % of the true class's activation map",
        "share of images in which that is above 0.3",
        "Higher is better: chance is about 0.3 o / (0.3 + 0.7 o) of an object that fills a share o,"
        " and a plain ResNet-152 on VOC Part was published at 0.35 and 0.69.",
        metric=localisation.cam,
        update=localisation.update_cam,
        needs=localisation.needs_maps_and_object_masks,
    ),
    "pointing_game": Figure(
        heading="pointing game",
        meaning="share of Grad-CAM in the class's cell of 3 x 3 images, 2 x 2 below nine classes",
        better="higher",
        reading=(
            "Higher is better: chance is 1/9, 1/4 below nine classes, 1 is all of a class's"
            " attribution on its own image, and a plain network lies between them."
        ),
        metric=localisation.pointing_game,
        update=localisation.update_pointing_game,
        needs=localisation.needs_grids,
    ),
    "p": Figure(
        heading="p",
        meaning="share of an explainer's interpretable track",
        better="higher",
        reading=(
            "Higher is better: 0.5 is where training starts, and of a plain network, which has no"
            " such track, or of chance there is none."
        ),
        metric=lambda network, data, draws: MeanMetric(),
        update=lambda metric, seen: metric.update(seen.network.logged()["p"]),
        needs=_needs_performer,
    ),
    "more_errors": Figure(
        heading="Δ error",
        meaning="share of images that are wrong by the reconstruction, less the performer's",
        better="lower",
        reading=(
            "Lower is better: 0 is the plain network that is explained, and chance would add to"
            " it up to 1 - 1 / classes."
        ),
        metric=lambda network, data, draws: MeanOverImages(),
        update=_more_errors,
        needs=_needs_performer,
    ),
    "throughput": _timed(
        "images/s",
        "of one forward pass of the network, by the clock",
        "Higher is better: that of the plain network in it is as much as there is to reach, and"
        " there is no chance in it.",
        better="higher",
        part="images_per_second",
    ),
    "throughput_plain": _timed(
        "… plain",
        "of the plain network in it, its discriminator",
        "Higher is better: the mark that the network is compared with, and there is no chance in"
        " it.",
        better="higher",
        part="plain_images_per_second",
    ),
    "overhead": _timed(
        "overhead",
        "how many times as long as its discriminator the network takes",
        "Lower is better: 1 is as fast as the plain network in it, and there is no chance in it.",
        better="lower",
        part="overhead",
    ),
    **_detection("fgsm", "FGSM"),
    **_detection("pgd", "PGD"),
    **_detection("cw", "Carlini and Wagner"),
}
