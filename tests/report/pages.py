"""Reports to render in tests, with names that would break a page that does not escape them."""

import dataclasses

import torch

from picnn_fast.explain import PathwayGradCam
from picnn_fast.report.galleries import grad_cam_gallery, peak_gallery
from picnn_fast.report.html import Cell, Confusion, FigureRow, Network, Report

HOSTILE = ('<script>alert("x")</script>', "a 'quoted' & <b>bold</b> \"name\"", "</script><!--")


def draw(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def network(name="PICNN", classes=3, filters=12, names=None):
    """Its filter i stands for class i % K, by .9."""
    names = [f"class {i}" for i in range(classes)] if names is None else names
    owner = torch.arange(filters) % classes
    ownership = torch.full((classes, filters), 0.1 / max(classes - 1, 1))
    ownership[owner, torch.arange(filters)] = 0.9
    images = draw(2, 3, 16, 16)
    complete = 9 * torch.eye(classes, dtype=torch.int64) + 1
    without = {label: complete.clone() for label in (0, classes - 1)}
    for label, matrix in without.items():
        matrix[label] = 1
        matrix[label, (label + 1) % classes] = 10
    cam = PathwayGradCam(*draw(4, 2, 16, 16, seed=1))
    return Network(
        name=name,
        class_names=names,
        ownership=ownership,
        ownership_meaning="gate, learned: what is let through",
        grad_cam=grad_cam_gallery(images, cam, names[:2], names[1:3]),
        confusion=Confusion(
            complete=complete,
            without=without,
            removed=dict.fromkeys(without, 2),
            said="A class's filters are those of which it keeps more than half.",
        ),
        filters="no filters were asked for",
        peaks=peak_gallery(images, 16 * draw(2, 12, 2), names[:2]),
        localisation="the data has no masks of objects",
    )


def report(**changes):
    """A report of two runs; ``changes`` replace its fields."""
    history = [
        {"epoch": e, "train/loss": 2.0 / (e + 1), "train/a": 1.5 / (e + 1), "val/acc1": e / 4}
        for e in range(4)
    ]
    whole = Report(
        title="Two runs",
        summary=["Two networks were trained."],
        names=["PICNN", "STD"],
        figures=[
            FigureRow(
                heading="ACC1",
                meaning="accuracy by all filters",
                better="higher",
                reading="Chance is a third.",
                cells=[
                    Cell(text="0.994", detail="[0.981, 1.000]", best=True),
                    Cell(text="n/a", detail="STD has none"),
                ],
            )
        ],
        missing={"no performer": ["p", "Δ error"]},
        histories={"PICNN": [history, history], "STD": [history]},
        headings={"val/acc1": "ACC1"},
        networks=[network(), network("STD")],
        provenance={"runs/x": {"command": "picnn-fast train", "commit": "0" * 40}},
    )
    return dataclasses.replace(whole, **changes)


def hostile():
    """Every name that comes from the user's data is hostile."""
    one, two, three = HOSTILE
    history = [{"epoch": 0, "train/loss": 1.0, f"train/{two}": 1.0, f"val/{three}": 0.5}]
    cells = [Cell(text="n/a", detail=one)]
    row = FigureRow(heading="ACC1", meaning="m", better="higher", reading=two, cells=cells)
    return report(
        title=one,
        summary=list(HOSTILE),
        names=[two],
        figures=[row],
        missing={one: [three]},
        histories={two: [history]},
        networks=[network(two, names=list(HOSTILE))],
        provenance={three: {one: two}},
    )
