"""What ``picnn-fast report`` tells of some runs, gathered from their folders."""

import dataclasses
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from picnn_fast._extras import extra
from picnn_fast._files import write_atomically
from picnn_fast._terminal import counted, printable
from picnn_fast.backbones import receptive_field
from picnn_fast.data import Batches, PartDataModule, shown_image
from picnn_fast.data.loading import SeededDataModule
from picnn_fast.evaluation import (
    FIGURES,
    Figures,
    confusion_without,
    format_figures,
    format_interval,
    full_headings,
    removal_ownership,
)
from picnn_fast.explain import FilterIndex, localisation_examples, pathway_grad_cam
from picnn_fast.models.base import InterpretableNetwork
from picnn_fast.report.galleries import (
    Gallery,
    filter_gallery,
    grad_cam_gallery,
    localisation_gallery,
    peak_gallery,
)
from picnn_fast.report.html import Cell, Confusion, FigureRow, Network, Report, render
from picnn_fast.training.checkpoint import find_checkpoints, load_checkpoint
from picnn_fast.training.filter_index import kept_filter_index
from picnn_fast.training.options import ConfigError, Options, few
from picnn_fast.training.run import METRICS, build_data, read_history, read_metrics, reading_images
from picnn_fast.training.run_folder import flat_options, read_record

with extra("train"):
    from rich.progress import track

REPORT = "report.html"
_NUMBERS = {2: "Two", 3: "Three", 4: "Four", 5: "Five", 6: "Six", 7: "Seven", 8: "Eight"}
IMAGES = 6
FILTERS = 6
_MOST_PICTURED = 8  # networks
_MOST_REMOVED = 10  # classes whose filters are removed in turn


@dataclasses.dataclass(frozen=True)
class _Trained:
    """A network of a run, with what its folder holds of it."""

    checkpoint: Path
    row: str
    network: InterpretableNetwork
    options: Options
    class_names: list[str]
    figures: Figures | None

    @property
    def folder(self) -> Path:
        return self.checkpoint.parent


@dataclasses.dataclass(frozen=True)
class _Shown:
    """Test images as they are shown, as the network takes them, their classes and places."""

    images: Tensor
    taken: Tensor
    labels: Tensor
    places: list[int]


def write_report(
    paths: Sequence[str | Path],
    output: str | Path | None = None,
    *,
    images: int = IMAGES,
    filters: int = FILTERS,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Path:
    """Write one HTML file about some runs, in place of an older one once it is whole.

    Args:
        paths: folders of runs, demos or comparisons, or checkpoints.
        output: the file; None: report.html in the first of these folders.
        images: test images that Grad-CAM shows of each network.
        filters: of each network, whose top images are shown; 0 looks at no filter, which takes a
            pass over the test images where no index of filters is kept beside the checkpoint.
        device: to make such an index on.
        progress: show a bar.

    Returns:
        The file.

    Raises:
        FileNotFoundError: a path that holds no checkpoint.
        RunFolderError: a checkpoint or a record that cannot be read.

    Example:
        >>> from picnn_fast.training.summary import write_report
        >>> write_report(["runs/demo"])  # doctest: +SKIP
        PosixPath('runs/demo/report.html')
    """
    page = render(
        summarise(paths, images=images, filters=filters, device=device, progress=progress)
    )
    if output is None:
        first = Path(paths[0])
        output = (first if first.is_dir() else first.parent) / REPORT
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page)
    return path


def summarise(
    paths: Sequence[str | Path],
    *,
    images: int = IMAGES,
    filters: int = FILTERS,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Report:
    """Gather the report of some runs; see ``write_report``."""
    rows = _rows([Path(path) for path in paths])
    data = _Data()
    networks: list[Network] = []
    for name, seeds in rows.items():
        if progress:
            print(f"looking at {name}", flush=True)
        reason = f"pictures are of the first {_MOST_PICTURED} networks alone"
        pictured = _Pictured(data, images, filters, device, progress)
        left_out = reason if len(networks) >= _MOST_PICTURED else None
        networks.append(_network(name, seeds[0], pictured, left_out))
    figures, missing = _figures(rows)
    histories = {name: [read_history(one.folder) for one in seeds] for name, seeds in rows.items()}
    return Report(
        title=_title(rows),
        summary=_summary(rows, data) + _diverged(rows, histories),
        names=list(rows),
        figures=figures,
        missing=missing,
        histories={
            name: [run for run in runs if run] for name, runs in histories.items() if any(runs)
        },
        headings={f"val/{name}": figure.heading for name, figure in FIGURES.items()},
        networks=networks,
        provenance=_provenance([Path(path) for path in paths], rows),
    )


def _rows(paths: Sequence[Path]) -> dict[str, list[_Trained]]:
    """The networks by their row of the table, in which seeds of the same options are one."""
    groups: dict[str, list[_Trained]] = {}
    for path in paths:
        several = len(paths) > 1
        for checkpoint in find_checkpoints(path):
            trained = _read(checkpoint, path)
            same = json.dumps(_without_seed(trained.options), sort_keys=True)
            groups.setdefault(same, []).append(
                dataclasses.replace(trained, row=f"{trained.row} ({_named(path)})")
                if several
                else trained
            )
    rows: dict[str, list[_Trained]] = {}
    for seeds in groups.values():
        name = seeds[0].row
        number = 2
        while name in rows:
            name = f"{seeds[0].row} ({number})"
            number += 1
        rows[name] = seeds
    return rows


def _read(checkpoint: Path, path: Path) -> _Trained:
    network, options, class_names = load_checkpoint(checkpoint)
    folder = checkpoint.parent
    figures = None
    if (folder / METRICS).is_file():
        method = options.method["name"]
        figures = read_metrics(folder, [method])[method]
    row = type(network).__name__
    if read_record(path).get("kind") == "compare":
        row = folder.name.rpartition("-")[0]
    names = [printable(name) for name in class_names]
    return _Trained(checkpoint, printable(row), network, options, names, figures)


def _named(path: Path) -> str:
    return printable(path.name or str(path))


def _without_seed(options: Options) -> dict[str, Any]:
    values = options.identity()
    del values["seed"]
    return {**values, "data": options.data_identity()}


class _Data:
    """The data of the networks, each set once, or why it cannot be had."""

    def __init__(self) -> None:
        self._made: dict[str, SeededDataModule | str] = {}
        self._shown: dict[str, _Shown] = {}

    def of(self, trained: _Trained) -> SeededDataModule | str:
        key = self._key(trained)
        if key not in self._made:
            try:
                self._made[key] = self._build(trained)
            except (ConfigError, OSError) as error:
                self._made[key] = f"the data cannot be read ({printable(str(error))})"
        return self._made[key]

    def shown(self, trained: _Trained, count: int) -> _Shown | str:
        """Test images of as many classes, spread over the split."""
        data = self.of(trained)
        if isinstance(data, str):
            return data
        key = f"{self._key(trained)}/{count}"
        if key not in self._shown:
            try:
                self._shown[key] = _choose(data, count)
            except (ConfigError, OSError) as error:
                return f"an image cannot be read ({printable(str(error))})"
        return self._shown[key]

    def _key(self, trained: _Trained) -> str:
        return json.dumps([trained.options.data, trained.options.category], sort_keys=True)

    def _build(self, trained: _Trained) -> SeededDataModule:
        data = build_data(trained.options)
        names = [printable(name) for name in data.class_names]
        if names != trained.class_names:
            raise ConfigError(
                f"data: it has other classes ({few(names)}) than the network was trained on"
                f" ({few(trained.class_names)})"
            )
        return data


def _choose(data: SeededDataModule, count: int) -> _Shown:
    """The first test images of different classes among those spread evenly over the split."""
    total = len(data.test_set)  # type: ignore[arg-type]
    looked_at = min(total, 8 * count)
    chosen: dict[int, tuple[int, Tensor]] = {}
    with reading_images():
        for place in range(looked_at):
            number = place * total // looked_at
            image, label = data.test_set[number]
            taken, labels = data.as_taken(image[None], torch.as_tensor([int(label)]))
            chosen.setdefault(int(labels[0]), (number, taken[0]))
            if len(chosen) == count:
                break
        order = sorted(chosen)
        places, images = zip(*(chosen[label] for label in order), strict=True)
        shown = torch.stack([shown_image(data, "test", place) for place in places])
    return _Shown(shown, torch.stack(images), torch.tensor(order), list(places))


class _Pictured(NamedTuple):
    """What is shown of a network: so many images and filters, looked at on a device."""

    data: _Data
    images: int
    filters: int
    device: torch.device | str
    progress: bool


def _network(name: str, trained: _Trained, look: _Pictured, left_out: str | None) -> Network:
    network = trained.network
    ownership = network.ownership()
    unknown = _no_ownership(network)
    if not _finite(network):
        ownership, unknown = None, f"its weights are {_NO_NUMBERS}"
        left_out = unknown
    return Network(
        name=name,
        class_names=trained.class_names,
        ownership=unknown if ownership is None else ownership,
        ownership_meaning=network.ownership_meaning,
        grad_cam=left_out or _grad_cam(trained, look),
        confusion=left_out or _confusion(trained, look),
        filters=left_out or _filters(trained, look),
        peaks=left_out or _peaks(trained, look),
        localisation=left_out or _localisation(trained, look),
    )


_NO_NUMBERS = "NaN or infinity"


def _finite(network: InterpretableNetwork) -> bool:
    """Whether all that it learned are finite numbers."""
    ownership = network.ownership()
    learned = [*network.parameters(), *([] if ownership is None else [ownership])]
    return all(bool(values.isfinite().all()) for values in learned)


def _no_ownership(network: InterpretableNetwork) -> str:
    return f"{type(network).__name__} gives no filter to a class"


def _grad_cam(trained: _Trained, look: _Pictured) -> Gallery | str:
    network = trained.network
    if network.ownership() is None:
        return _no_ownership(network)
    if not network.draws_masks:
        return f"{type(network).__name__} draws no masks of filters"
    if network.channel_dim != 1:
        return "the maps are not [B, N, h, w]"
    shown = look.data.shown(trained, look.images)
    if isinstance(shown, str):
        return shown
    if shown.images.shape[1] not in (1, 3):
        return f"images of {shown.images.shape[1]} channels are not shown"
    cam = pathway_grad_cam(network, shown.taken, shown.labels, seed=trained.options.seed)
    with torch.no_grad():
        maps, bypass = network.encode(shown.taken)
        predicted = network.head_logits(maps, bypass=bypass).argmax(1)
    labels, seen = (
        [trained.class_names[i] for i in classes.tolist()] for classes in (shown.labels, predicted)
    )
    return grad_cam_gallery(shown.images, cam, labels, seen)


def _confusion(trained: _Trained, look: _Pictured) -> Confusion | str:
    network, made = trained.network, look.data.of(trained)
    if isinstance(made, str):
        return made
    every = torch.linspace(0, network.num_classes - 1, min(network.num_classes, _MOST_REMOVED))
    labels = every.round().int().tolist()
    try:
        with reading_images():
            found = confusion_without(
                network.to(look.device).eval(),
                _Pairs(made, look.progress),
                [[label] for label in labels],
            )
    except (ConfigError, OSError, ValueError) as error:
        return printable(str(error))
    network.cpu()
    said = "A class's filters are those of which it keeps more than half."
    if removal_ownership(network) is None:
        said = "A class's filters are the tenth that its images activate most."
    return Confusion(
        complete=found.complete,
        without=dict(zip(labels, found.without, strict=True)),
        removed=dict(zip(labels, found.removed.sum(1).tolist(), strict=True)),
        said=said,
    )


class _Pairs:
    """The test images and their labels in batches, as often as they are wanted."""

    def __init__(self, data: SeededDataModule, progress: bool) -> None:
        self.batches, self.progress = Batches(data, "test"), progress

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        what = "without a class's filters"
        shown = track(self.batches, what, transient=True, disable=not self.progress)
        for images, labels, *_ in shown:
            yield images, labels


def _filters(trained: _Trained, look: _Pictured) -> Gallery | str:
    if look.filters == 0:
        return "no filters were asked for"
    made = look.data.of(trained)
    if isinstance(made, str):
        return made
    try:
        with reading_images():
            index = kept_filter_index(
                trained.checkpoint,
                trained.network,
                trained.options,
                made,
                device=look.device,
                progress=look.progress,
            )
            trained.network.cpu()
            chosen = _standing(index, look.filters)
            images = {i: shown_image(made, "test", i) for i in index.images_of(chosen)}
    except (ConfigError, OSError, ValueError) as error:
        return printable(str(error))
    if next(iter(images.values())).shape[0] not in (1, 3):
        return f"images of {len(next(iter(images.values())))} channels are not shown"
    parts = Batches(made, "test").part_names if index.by_activation.parts.shape[2] else []
    names = [printable(part) for part in parts]
    return filter_gallery(index, chosen, images, trained.class_names, names)


def _standing(index: FilterIndex, count: int) -> list[int]:
    """A filter each for so many classes, spread evenly.

    It is the one that stands for the class most surely or, where none does by more than half, the
    one that tells most about it.
    """
    count = min(count, index.num_filters)
    information = index.mutual_information.clone()
    sure = index.owned.where(index.owned > 0.5, -torch.inf)
    chosen: list[int] = []
    for label in torch.linspace(0, index.num_classes - 1, count).round().long().tolist():
        own = sure.where(index.owner == label, -torch.inf)
        best = own if own.max() > 0 else information[label]
        chosen.append(int(best.argmax()))
        sure[chosen[-1]] = -torch.inf
        information[:, chosen[-1]] = -torch.inf
    return chosen


def _peaks(trained: _Trained, look: _Pictured) -> Gallery | str:
    network = trained.network
    if network.channel_dim != 1:
        return "the maps are not [B, N, h, w]"
    shown = look.data.shown(trained, look.images)
    if isinstance(shown, str):
        return shown
    channels, height, width = shown.images.shape[1:]
    if channels not in (1, 3):
        return f"images of {channels} channels are not shown"
    try:
        field = receptive_field(network.features, (height, width), channels=channels)
        with torch.no_grad():
            activations, peaks = field.peaks(network.filter_maps(shown.taken))
    except (TypeError, ValueError) as error:
        return " ".join(str(error).split())
    firing = peaks.where((activations > 0)[..., None], torch.nan)
    labels = [trained.class_names[i] for i in shown.labels.tolist()]
    return peak_gallery(shown.images, firing, labels)


def _localisation(trained: _Trained, look: _Pictured) -> Gallery | str:
    network, made = trained.network, look.data.of(trained)
    if not isinstance(made, str) and not isinstance(made, PartDataModule):
        return "the data has no masks of objects"
    shown = look.data.shown(trained, look.images)
    if isinstance(made, str) or isinstance(shown, str):
        return made if isinstance(made, str) else str(shown)
    try:
        with reading_images():
            samples = [made.part_sets["test"][place] for place in shown.places]
        masks = torch.stack([sample.object_mask for sample in samples])
        examples = localisation_examples(network, shown.taken, shown.labels, masks)
    except (ConfigError, OSError, TypeError, ValueError) as error:
        return printable(" ".join(str(error).split()))
    labels = [trained.class_names[i] for i in shown.labels.tolist()]
    return localisation_gallery(shown.images, examples, masks, labels)


def _figures(
    rows: Mapping[str, Sequence[_Trained]],
) -> tuple[list[FigureRow], dict[str, list[str]]]:
    """A row for each figure that any network has, and by reason those that none has."""
    measured = {
        name: [one.figures for one in seeds if one.figures is not None]
        for name, seeds in rows.items()
    }
    if not any(measured.values()):
        return [], {}
    same = len(_sets(rows)) == 1
    shown: list[FigureRow] = []
    missing: dict[str, list[str]] = {}
    headings = full_headings()
    for key, figure in FIGURES.items():
        heading = headings.get(key, figure.heading)
        cells = [_cell(runs, key) for runs in measured.values()]
        if all(cell.text == "n/a" for cell in cells):
            reasons = "; ".join(dict.fromkeys(cell.detail for cell in cells))
            missing.setdefault(reasons, []).append(heading)
            continue
        spans = [_span(runs, key) for runs in measured.values()]
        shown.append(
            FigureRow(
                heading=heading,
                meaning=figure.said,
                better=figure.better,
                reading=figure.reading,
                cells=_with_best(cells, spans, figure.better) if same else cells,
            )
        )
    return shown, missing


def _cell(runs: Sequence[Figures], key: str) -> Cell:
    if not runs:
        return Cell(text="n/a", detail="not measured")
    values = [run.get(key, "n/a: not measured") for run in runs]
    reasons = dict.fromkeys(v.partition(": ")[2] for v in values if isinstance(v, str))
    if reasons:
        return Cell(text="n/a", detail="; ".join(reasons))
    text, _, spread = format_figures(runs, key).partition(" ± ")
    interval = format_interval(runs[0], key) if len(runs) == 1 else ""
    if not interval and spread:
        interval = f"± {spread}" + (f" over {len(runs)} seeds" if len(runs) > 1 else "")
    return Cell(text=text, detail=interval)


class _Span(NamedTuple):
    """A value, and the interval about it."""

    value: float
    low: float
    high: float


def _span(runs: Sequence[Figures], key: str) -> _Span | None:
    """The interval of one run, or mean and standard deviation of several; None of what is n/a."""
    values = [run.get(key) for run in runs]
    numbers = [value for value in values if isinstance(value, int | float)]
    if not numbers or len(numbers) < len(values):
        return None
    mean = statistics.fmean(numbers)
    ends = runs[0].get(f"{key}_interval")
    if len(runs) == 1 and isinstance(ends, list):
        return _Span(mean, *ends)
    spread = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
    return _Span(mean, mean - spread, mean + spread)


def _with_best(cells: Sequence[Cell], spans: Sequence[_Span | None], better: str) -> list[Cell]:
    """The cells, the best of several marked where no other's span reaches into its own."""
    known = [span for span in spans if span is not None]
    if len(known) < 2:
        return list(cells)
    best = (max if better == "higher" else min)(known, key=lambda span: span.value)
    apart = all(span is best or span.high < best.low or span.low > best.high for span in known)
    return [
        dataclasses.replace(cell, best=apart and span is best)
        for cell, span in zip(cells, spans, strict=True)
    ]


def _sets(rows: Mapping[str, Sequence[_Trained]]) -> dict[str, _Trained]:
    """A network of each data set, by what was asked of the data."""
    every = [one for seeds in rows.values() for one in seeds]
    return {
        json.dumps([one.options.data_identity(), one.options.category], sort_keys=True): one
        for one in every
    }


def _title(rows: Mapping[str, Sequence[_Trained]]) -> str:
    names = dict.fromkeys(one.options.data["name"] for one in _sets(rows).values())
    return printable(f"{_listed(list(rows))} on {_listed(list(names))}")


def _summary(rows: Mapping[str, Sequence[_Trained]], data: _Data) -> list[str]:
    """What was trained, on what, and what was measured, in plain sentences."""
    every = [one for seeds in rows.values() for one in seeds]
    count = len(every)
    facts = {
        "on the backbone {}": {one.options.backbone["name"] for one in every},
        "with {} in the target layer": {
            counted(one.network.num_filters, "filter") for one in every
        },
        "for {}": {counted(one.options.epochs, "epoch") for one in every},
    }
    alike = [text.format(*values) for text, values in facts.items() if len(values) == 1]
    trained = "One network was trained"
    if count > 1:
        trained = f"{_NUMBERS.get(count, str(count))} networks were trained"
    trained += " " + ", ".join(alike) if alike else ""
    if count > 1:
        trained += f": {_listed(list(rows))}"
        trained += ", several seeds of each" if count > len(rows) else ""
    sentences = [f"{printable(trained)}. {_images(rows, data)}"]
    if len(_sets(rows)) > 1:
        return sentences
    measured = {name: [s.figures for s in seeds if s.figures] for name, seeds in rows.items()}
    said = []
    for key in ("acc1", "acc3", "mis"):
        cells = {name: _cell(runs, key) for name, runs in measured.items()}
        values = [f"{name} {cell.text}" for name, cell in cells.items() if cell.text != "n/a"]
        if values:
            figure = FIGURES[key]
            values = values if len(rows) > 1 else [values[0].rpartition(" ")[2]]
            said.append(f"{figure.heading}, {figure.meaning}: {_listed(values)}")
    if said:
        sentences.append(f"On the test images: {'; '.join(said)}.")
    return sentences


def _diverged(
    rows: Mapping[str, Sequence[_Trained]],
    histories: Mapping[str, Sequence[Sequence[Mapping[str, float]]]],
) -> list[str]:
    """A sentence about each network whose training diverged."""
    said = []
    for name, seeds in rows.items():
        epochs = [
            int(row["epoch"]) + 1
            for run in histories[name]
            for row in run
            if not math.isfinite(row.get("train/loss", 0.0))
        ]
        found = [f"its loss was {_NO_NUMBERS} from epoch {min(epochs)}"] if epochs else []
        if not all(_finite(one.network) for one in seeds):
            found.append(f"its weights are {_NO_NUMBERS}")
        if found:
            said.append(f"The training of {name} diverged: {' and '.join(found)}.")
    return said


def _images(rows: Mapping[str, Sequence[_Trained]], data: _Data) -> str:
    sets = _sets(rows)
    if len(sets) > 1:
        return "They differ in their data, so that their figures do not compare."
    (one,) = sets.values()
    module = data.of(one)
    classes = counted(len(one.class_names), "class")
    if isinstance(module, str):
        return f"The data, {one.options.data['name']}, has {classes}; its images are not here."
    sizes = [len(images) for images in (module.train_set, module.test_set)]  # type: ignore[arg-type]
    several = sum(map(len, rows.values())) > 1
    return (
        f"{'They' if several else 'It'} learned from {counted(sizes[0], 'image')} of"
        f" {one.options.data['name']} in {classes}, and {'were' if several else 'was'} measured on"
        f" {sizes[1]:,} that took no part in it."
    )


def _listed(names: Sequence[str], most: int = 6) -> str:
    """Names in a sentence, no more than so many."""
    if len(names) > most:
        return f"{', '.join(names[: most - 1])} and {len(names) - most + 1} more"
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _provenance(
    paths: Sequence[Path], rows: Mapping[str, Sequence[_Trained]]
) -> dict[str, dict[str, str]]:
    """Of each run what it noted, and the options of its networks."""
    told: dict[str, dict[str, str]] = {}
    for path in paths:
        record = read_record(path if path.is_dir() else path.parent)
        made = record.get("provenance", {})
        pairs = {"folder": str(path), "picnn_fast": record.get("version", "not noted")}
        for key in ("command", "commit", "started", "finished"):
            pairs[key] = made.get(key) or "not noted"
        for key in ("versions", "hardware"):
            for name, value in made.get(key, {}).items():
                pairs[name] = ", ".join(value) or "none" if isinstance(value, list) else str(value)
        told[str(path)] = {key: printable(str(value)) for key, value in pairs.items()}
    for name, seeds in rows.items():
        options = flat_options(_without_seed(seeds[0].options))
        options["seed"] = ", ".join(str(one.options.seed) for one in seeds)
        told[f"Options of {name}"] = {k: printable(str(v)) for k, v in options.items()}
    return told
