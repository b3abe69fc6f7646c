"""What every data set of DATA owes to a run: splits apart, and options by signature."""

import inspect
from collections import Counter

import pytest
import torch
from PIL import Image

from picnn_fast.data import DATA
from picnn_fast.data.loading import held_out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 20), ("test", 3)):
        for index, name in enumerate(("ant", "bee")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                colour = (200 * index, 12 * i, 100 if split == "train" else 200)
                Image.new("RGB", (9, 9), colour).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(params=["digits", "folder", "part-animals"])
def make(request, folder):
    options = {
        "digits": {},
        "folder": {"root": str(folder), "image_size": 8, "num_workers": 0},
        "part-animals": {"image_size": 16, "train_images": 40, "test_images": 6},
    }[request.param]

    def build(**more):
        data = DATA[request.param](**{"batch_size": 8, "seed": 0, **options, **more})
        data.setup()
        return data

    return build


def _images(dataset):
    return [image.numpy().tobytes() for image, _ in dataset]


def test_validation_images_are_of_training_and_never_of_the_test_split(make):
    none, some = make(validation=0.0), make(validation=0.25)
    assert none.validation_set is None
    assert none.val_dataloader() == []
    assert none.validation_source == "none: validation is 0"
    images = len(none.train_set)
    held = len(some.validation_set)
    assert len(some.train_set) + held == images
    assert held == pytest.approx(images / 4, abs=none.num_classes)
    assert some.validation_source == f"{held} of the {images} training images, seed 0"
    plain = make(validation=0.25, **_unaugmented(some))
    together = Counter(_images(plain.train_set)) + Counter(_images(plain.validation_set))
    assert together == Counter(_images(make(validation=0.0, **_unaugmented(some)).train_set))
    loaded = torch.cat([images for images, _ in some.val_dataloader()])
    assert [image.numpy().tobytes() for image in loaded] == _images(some.validation_set)
    assert len(some.test_set) == len(none.test_set)


def _unaugmented(data):
    return {"augment": False} if "Folder" in type(data).__name__ else {}


def test_validation_images_follow_from_their_own_seed_alone(make):
    first, other_order, other_choice = make(), make(seed=5), make(validation_seed=1)
    assert _images(first.validation_set) == _images(other_order.validation_set)
    assert _images(first.validation_set) != _images(other_choice.validation_set)


def test_validation_images_are_not_augmented(make):
    data = make(validation=0.25)
    torch.manual_seed(0)
    first = _images(data.validation_set)
    torch.manual_seed(1)
    assert _images(data.validation_set) == first


@pytest.mark.parametrize("name", DATA)
def test_every_row_takes_what_a_run_gives_and_documents_its_options(name):
    parameters = inspect.signature(DATA[name]).parameters
    assert {
        "batch_size",
        "seed",
        "validation",
        "validation_seed",
        "num_workers",
    } <= parameters.keys()
    for option in parameters:
        assert f"{option}" in DATA[name].__doc__


def test_classes_are_held_out_alike_and_single_images_are_kept():
    labels = [0] * 40 + [1] * 10 + [2] * 2 + [3]
    kept, out = held_out(labels, 0.1, 0)
    assert Counter(labels[i] for i in out) == {0: 4, 1: 1, 2: 1}
    assert sorted(kept + out) == list(range(len(labels)))
    assert held_out(labels, 0.0, 0) == (list(range(len(labels))), [])
    assert held_out([0, 1, 2], 0.5, 0) == ([0, 1, 2], [])
