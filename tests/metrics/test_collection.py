"""Our metrics in a ``torchmetrics.MetricCollection``: arguments find their metric by name."""

import pytest
import torch
from torchmetrics import MetricCollection

from picnn_fast.backbones import ReceptiveField
from picnn_fast.metrics import (
    FilterRemoval,
    GateSimilarity,
    InterClassCorrelation,
    LocationInstability,
    MaskLeakage,
    MutualInformationScore,
    PartInterpretability,
    PathwayAccuracy,
)

CLASSES, FILTERS, LANDMARKS, PARTS, SIDE = 3, 4, 2, 2, 32


def _metrics():
    field = ReceptiveField((8, 8), (8, 8), (4.0, 4.0), (4, 4), (SIDE, SIDE))
    return {
        "acc": PathwayAccuracy(CLASSES),
        "mis": MutualInformationScore(CLASSES),
        "coarse": MutualInformationScore(CLASSES, estimator="histogram", bins=4),
        "smooth": MutualInformationScore(CLASSES, n_neighbors=5),
        "leakage": MaskLeakage(CLASSES),
        "instability": LocationInstability(FILTERS, LANDMARKS, field, num_classes=CLASSES),
        "parts": PartInterpretability(FILTERS, PARTS, field, num_classes=CLASSES),
        "c_ic": InterClassCorrelation(torch.eye(FILTERS), CLASSES),
        "gate": GateSimilarity(torch.eye(CLASSES, FILTERS)),
        "removal": FilterRemoval(CLASSES, FILTERS, ownership=torch.eye(CLASSES, FILTERS)),
    }


def _batches(count=3, size=12):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        labels = torch.randint(CLASSES, (size,), generator=generator)
        maps = torch.rand(size, FILTERS, 4, 4, generator=generator) + labels[:, None, None, None]
        yield {
            "labels": labels,
            "logits": torch.randn(size, CLASSES, generator=generator),
            "activations": maps.mean((2, 3)),
            "maps": maps,
            "landmarks": SIDE * torch.rand(size, LANDMARKS, 2, generator=generator),
            "part_masks": torch.rand(size, PARTS, SIDE, SIDE, generator=generator) > 0.5,
            "masks": torch.randint(2, (1, size, FILTERS), generator=generator).float(),
            "classify": lambda maps, mask: (maps.mean((2, 3)) * mask)[:, :CLASSES],
        }


# What each takes of a batch, beside the labels.
TAKES = {
    "acc": ["logits"],
    "mis": ["activations"],
    "coarse": ["activations"],
    "smooth": ["activations"],
    "leakage": ["maps", "masks", "classify"],
    "instability": ["maps", "landmarks"],
    "parts": ["maps", "part_masks"],
    "c_ic": ["activations"],
    "gate": ["activations", "logits"],
    "removal": ["maps", "classify"],
}


def _alone(batches):
    """Each metric updated by itself, with what is its own."""
    metrics = _metrics()
    for batch in batches:
        for name, metric in metrics.items():
            metric.update(**{key: batch[key] for key in ["labels", *TAKES[name]]})
    return _numbers({name: metric.compute() for name, metric in metrics.items()})


def _numbers(values):
    """Means, and the standard errors of what rests on draws: NaN of a single one."""
    return {
        name: [x.item() for x in value] if isinstance(value, tuple) else [value.item()]
        for name, value in values.items()
    }


def _same(expected):
    return {name: pytest.approx(value, abs=0, nan_ok=True) for name, value in expected.items()}


def test_each_metric_takes_what_is_its_own_by_name():
    metrics = MetricCollection(_metrics())
    for batch in _batches():
        metrics.update(**batch)
    assert _numbers(metrics.compute()) == _same(_alone(_batches()))


def test_metrics_that_keep_the_same_samples_stay_apart():
    """Those of several estimators may share their states, not their values."""
    values = _alone(_batches())
    assert len({values[name][0] for name in ("mis", "coarse", "smooth")}) == 3


def test_a_step_gives_the_values_of_its_batch_and_keeps_all():
    metrics = MetricCollection(_metrics())
    for batch in _batches():
        assert _numbers(metrics(**batch)) == _same(_alone([batch]))
    assert _numbers(metrics.compute()) == _same(_alone(_batches()))


def test_a_reset_forgets_and_a_clone_has_samples_and_names_of_its_own():
    metrics = MetricCollection(_metrics(), prefix="train/")
    first, *others = _batches()
    metrics.update(**first)
    other = metrics.clone(prefix="val/")
    for batch in others:
        other.update(**batch)
    named = {f"train/{name}": value for name, value in _alone([first]).items()}
    assert _numbers(metrics.compute()) == _same(named)
    named = {f"val/{name}": value for name, value in _alone([first, *others]).items()}
    assert _numbers(other.compute()) == _same(named)
    metrics.reset()
    metrics.update(**others[0])
    named = {f"train/{name}": value for name, value in _alone(others[:1]).items()}
    assert _numbers(metrics.compute()) == _same(named)
