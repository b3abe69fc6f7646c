"""What every data set of DATA owes to a run: splits apart, and options by signature."""

import ast
import inspect
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from picnn_fast.data import DATA
from picnn_fast.data.loading import held_out
from tests.data.trees import (
    animal_tree,
    cifar100_tree,
    cifar_tree,
    cub_tree,
    folder_tree,
    imagenet_tree,
    shard_tree,
    stl_tree,
    tiny_tree,
    voc_tree,
)

TAKEN_BY_ALL = {
    "num_workers": None,
    "validation": 0.1,
    "validation_seed": 0,
    "augment": True,
}


TREES = {
    "folder": folder_tree,
    "cifar10": cifar_tree,
    "cifar100": cifar100_tree,
    "stl10": stl_tree,
    "tiny-imagenet": tiny_tree,
    "imagenet": imagenet_tree,
    "shards": shard_tree,
    "voc-part": voc_tree,
    "cub": cub_tree,
    "animal-part": animal_tree,
}
OPTIONS = {
    "digits": {},
    "folder": {"image_size": 8},
    "cifar10": {"image_size": 8},
    "cifar100": {"image_size": 8},
    "stl10": {"image_size": 8},
    "tiny-imagenet": {"image_size": 8},
    "imagenet": {"image_size": 8, "resize": 9},
    "shards": {"image_size": 8},
    "part-animals": {"image_size": 16, "train_images": 40, "test_images": 6},
    "voc-part": {"image_size": 8, "categories": ["cat", "dog"]},
    "cub": {"image_size": 8, "landmark_names": ["tail", "back"]},
    "animal-part": {"image_size": 8, "categories": ["fox", "goldfish"]},
}


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """The folder of each row that reads one, written when it is asked for."""
    written = {}

    def root(name):
        if name in TREES and name not in written:
            written[name] = TREES[name](tmp_path_factory.mktemp(name))
        return {"root": str(written[name])} if name in written else {}

    return root


@pytest.fixture(autouse=True)
def written_anew(monkeypatch):
    """Trees are not those whose checksums torchvision knows."""
    monkeypatch.setattr(
        "torchvision.datasets.cifar.check_integrity", lambda path, md5: Path(path).is_file()
    )


@pytest.fixture(params=DATA)
def make(request, roots):
    """Makes the data set of one row, small."""
    options = {**roots(request.param), **OPTIONS[request.param]}

    def build(**more):
        given = {"batch_size": 8, "seed": 0, "num_workers": 0, **options, **more}
        return DATA[request.param](**given)

    build.row = request.param
    build.takes_cache = "cache" in inspect.signature(DATA[request.param]).parameters
    return build


def _shown(data, loader, *, training):
    """What a network is given, in the order of the loader, image by image."""
    data.trainer = SimpleNamespace(training=training)
    seen = []
    for batch in loader:
        moved = data.on_before_batch_transfer(batch, 0)
        images, _ = data.on_after_batch_transfer(moved, 0)
        seen += [image.numpy().tobytes() for image in images]
    data.trainer = None
    return seen


def _split(data, split):
    images = getattr(data, f"{split}_set")
    loader = torch.utils.data.DataLoader(images, batch_size=8)
    return Counter(_shown(data, loader, training=False))


def test_validation_images_are_of_training_and_never_of_the_test_split(make):
    whole = make(validation=0.0, augment=False)
    data = make(validation=0.25, augment=False)
    assert whole.validation_set is None
    assert whole.val_dataloader() == []
    assert whole.validation_source == "none: validation is 0"
    train, validation, test = (_split(data, split) for split in ("train", "validation", "test"))
    assert train + validation == _split(whole, "train")
    assert test == _split(whole, "test")
    assert validation == Counter(_shown(data, data.val_dataloader(), training=False))
    # The digits hold a few identical scans.
    assert len(test & (train + validation)) <= (1 if make.row == "digits" else 0)
    held, images = validation.total(), len(whole.train_set)
    assert held == pytest.approx(images / 4, abs=data.num_classes)
    assert data.validation_source == f"{held} of the {images} training images, seed 0"


def test_images_are_normalised_as_the_options_say(make):
    if make.row == "digits":  # one grey value, scaled to [0, 1]
        return
    mean, std = (0.5, 0.25, 0.0), (0.5, 1.0, 2.0)
    made = [make(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)), make(mean=mean, std=std)]
    plain, normalised = (
        data.on_after_batch_transfer(next(iter(data.test_dataloader())), 0)[0] for data in made
    )
    shape = (3, 1, 1)
    wanted = (plain - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    torch.testing.assert_close(normalised, wanted)
    assert plain.min() >= 0
    assert plain.max() <= 1
    with pytest.raises(ValueError, match=r"^std: got \(1, 0, 1\), want values > 0"):
        make(std=(1, 0, 1))


def test_images_read_from_files_are_the_same_out_of_memory(make):
    data, plain = (
        make(augment=False),
        make(augment=False, **{"cache": 0} if make.takes_cache else {}),
    )
    for _ in range(2):  # the second time none is decoded
        got, want = (
            torch.cat([images for images, _ in one.test_dataloader()]) for one in (data, plain)
        )
        assert torch.equal(got, want)
    kept = [one for one in data.read_from_files() if one.shelf.get(0) is not None]
    assert len(kept) == make.takes_cache


def test_every_class_is_validated_on(make):
    data = make(validation=0.1)
    labels = {int(label) for _, label in data.validation_set}
    assert labels == {int(label) for _, label in data.train_set} == set(range(data.num_classes))


def test_validation_images_follow_from_their_own_seed_alone(make):
    first = make(augment=False)
    assert _split(make(augment=False), "validation") == _split(first, "validation")
    assert _split(make(augment=False, seed=5), "validation") == _split(first, "validation")
    others = [make(augment=False, validation_seed=seed) for seed in (1, 2, 3)]
    assert any(_split(other, "validation") != _split(first, "validation") for other in others)
    assert all(_split(other, "test") == _split(first, "test") for other in others)


def test_training_images_alone_are_augmented_unless_told_otherwise(make):
    data, still = make(validation=0.25), make(validation=0.25, augment=False)

    def draws(data, loader, training):
        seen = []
        for epoch in (1, 2):
            torch.manual_seed(epoch)
            batches = loader()
            if training:
                batches.sampler.set_epoch(epoch)
            seen.append(Counter(_shown(data, batches, training=training)))
        return seen

    one, other = draws(data, data.train_dataloader, True)
    assert one != other
    plain, again = draws(still, still.train_dataloader, True)
    assert plain == again
    assert one.total() == plain.total()
    assert one != plain
    for loader in ("val_dataloader", "test_dataloader"):
        one, other = draws(data, getattr(data, loader), False)
        plain, _ = draws(still, getattr(still, loader), False)
        assert one == other == plain


def test_an_order_is_the_same_when_a_run_goes_on(make):
    def order(data, epoch):
        progress = SimpleNamespace(current=SimpleNamespace(processed=epoch))
        data.trainer = SimpleNamespace(
            training=True,
            world_size=1,
            global_rank=0,
            fit_loop=SimpleNamespace(epoch_progress=progress),
        )
        loader = data.train_dataloader()
        data.trainer = None
        return list(loader.sampler)

    whole = make(seed=3)
    epochs = [order(whole, epoch) for epoch in range(3)]
    assert order(make(seed=3), 2) == epochs[2]
    assert epochs[0] != epochs[1] != epochs[2]
    assert order(make(seed=4), 2) != epochs[2]


def test_a_set_is_made_once(make):
    data = make()
    sets = data.train_set, data.validation_set, data.test_set
    data.setup("fit")
    assert (data.train_set, data.validation_set, data.test_set) == sets
    assert len(data.class_names) == data.num_classes
    image, _ = data.test_set[0]
    assert image.shape[0] == data.in_channels


def test_one_class_is_singled_out_in_every_split(make):
    data = make()
    data.single_out(data.class_names[1])
    for loader, images in (
        (data.val_dataloader(), data.validation_set),
        (data.test_dataloader(), data.test_set),
    ):
        seen = [data.on_before_batch_transfer(batch, 0)[1] for batch in loader]
        assert torch.cat(seen).tolist() == [int(label == 1) for _, label in images]


@pytest.mark.parametrize("name", DATA)
def test_every_row_takes_what_a_run_gives_and_documents_its_options(name):
    parameters = inspect.signature(DATA[name]).parameters
    assert {"batch_size", "seed"} <= parameters.keys()
    assert {key: parameters[key].default for key in TAKEN_BY_ALL} == TAKEN_BY_ALL
    assert ("root" in parameters) == (name in TREES)
    if name in TREES:
        assert next(iter(parameters)) == "root"
        assert parameters["root"].default is inspect.Parameter.empty
    section = DATA[name].__doc__.partition("Args:")[2].partition("Raises:")[0]
    documented = {line.strip().partition(": ")[0] for line in section.splitlines()}
    assert parameters.keys() <= documented
    for key, parameter in parameters.items():
        assert parameter.annotation is not inspect.Parameter.empty, key


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"validation": 1.0}, "validation"),
        ({"validation": True}, "validation"),
        ({"validation": float("nan")}, "validation"),
        ({"validation_seed": -1}, "validation_seed"),
        ({"num_workers": -1}, "num_workers"),
    ],
)
def test_bad_options_are_refused_by_name(make, options, name):
    with pytest.raises(ValueError, match=f"^{name}: got"):
        make(**options)


@pytest.mark.parametrize("name", TREES)
def test_a_home_folder_is_found(name, roots, monkeypatch):
    root = roots(name)["root"]
    parent, _, folder = root.rpartition("/")
    monkeypatch.setenv("HOME", parent)
    options = {**OPTIONS[name], "root": f"~/{folder}"}
    assert len(DATA[name](**options).test_set) > 0


def test_two_animals_of_one_photograph_are_never_split(roots):
    for seed in range(4):
        data = DATA["voc-part"](**roots("voc-part"), **OPTIONS["voc-part"], validation_seed=seed)
        sources = {
            split: Counter(samples.source(i) for i in range(len(samples)))
            for split, samples in data.part_sets.items()
        }
        assert sources["train"].keys().isdisjoint(sources["validation"])
        assert set(sources["train"].values()) == set(sources["validation"].values()) == {2}


def test_classes_are_held_out_alike_and_single_images_are_kept():
    labels = [0] * 40 + [1] * 10 + [2] * 2 + [3]
    kept, out = held_out(labels, 0.1, 0)
    assert Counter(labels[i] for i in out) == {0: 4, 1: 1, 2: 1}
    assert sorted(kept + out) == list(range(len(labels)))
    assert held_out(labels, 0.0, 0) == (list(range(len(labels))), [])
    assert held_out([0, 1, 2], 0.5, 0) == ([0, 1, 2], [])


def test_images_of_one_source_are_held_out_together():
    labels, sources = [0, 1, 0, 0, 0, 0], ["a", "a", "b", "b", "c", "c"]
    for seed in range(5):
        kept, out = held_out(labels, 0.4, seed, sources)
        assert len(out) == 2
        assert {sources[i] for i in kept}.isdisjoint(sources[i] for i in out)


def _imported_with(path):
    """The packages that a module imports as it is imported itself."""
    left = ast.parse(path.read_text(encoding="utf-8")).body
    while left:
        node = left.pop()
        if isinstance(node, ast.Import):
            yield from (name.name.partition(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            left += ast.iter_child_nodes(node)


def test_what_one_data_set_alone_needs_is_wanted_by_no_other():
    package = Path(inspect.getfile(DATA["folder"])).parents[1]
    for path in package.rglob("*.py"):
        assert not {"sklearn", "scipy", "h5py"} & set(_imported_with(path)), path


def test_an_option_that_is_true_or_false_is_nothing_else(make):
    options = inspect.signature(DATA[make.row]).parameters.values()
    names = [option.name for option in options if option.annotation is bool]
    assert "augment" in names
    for name in names:
        with pytest.raises(TypeError, match=rf"^{name}: got 'no', want True or False$"):
            make(**{name: "no"})


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [("digits", "sklearn.datasets", "sklearn"), ("animal-part", "scipy", "scipy")],
)
def test_a_data_set_whose_package_is_missing_says_what_to_install(
    roots, monkeypatch, name, module, package
):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{package}.* is not installed; .*pip install"):
        DATA[name](batch_size=4, seed=0, **roots(name), **OPTIONS[name])
