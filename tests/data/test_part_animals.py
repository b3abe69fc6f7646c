import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from picnn_fast.data import PartAnimals
from picnn_fast.data.part_animals import _BUILDS, CLASSES, _four_legged


@pytest.fixture(scope="module")
def animals():
    return PartAnimals("test", size=60, image_size=64)


def test_kinds_take_turns_and_fields_have_their_shapes(animals):
    assert [animals.label(i) for i in range(60)] == list(range(6)) * 10
    assert animals[-1].label == 5
    sample = animals[7]
    assert sample.image.shape == (3, 64, 64)
    assert sample.image.dtype == torch.float32
    assert torch.equal(sample.image, animals.image(7))
    assert sample.part_masks.shape == (len(animals.part_names), 64, 64)
    assert sample.part_masks.dtype == sample.object_mask.dtype == torch.bool
    assert sample.landmarks.shape == (len(animals.landmark_names), 2)
    assert sample.box.shape == (4,)
    with pytest.raises(IndexError):
        animals[60]


def test_images_use_the_range(animals):
    images = torch.stack([animals.image(i) for i in range(60)])
    assert images.min() >= 0
    assert images.max() <= 1
    assert images.std() > 0.15


def test_parts_make_up_the_object_and_do_not_overlap(animals):
    for sample in animals:
        assert torch.equal(sample.part_masks.sum(0), sample.object_mask.long())
        rows, columns = sample.object_mask.nonzero().T
        edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert sample.box.tolist() == [edge.item() for edge in edges]


def test_every_animal_shows_every_part_and_is_whole(animals):
    for sample in animals:
        shown = sample.part_masks.flatten(1).sum(1)
        assert (shown >= 4).all(), shown  # of 4096
        # Painting stays off the edge, so nothing is cut off.
        x0, y0, x1, y1 = sample.box.tolist()
        assert 0.6 * 64 <= max(x1 - x0, y1 - y0) <= 64


def test_a_landmark_is_the_middle_of_its_part(animals):
    names = animals.landmark_names
    for sample in animals:
        for name in ("head", "neck", "torso", "tail"):
            rows, columns = sample.part_masks[animals.part_names.index(name)].nonzero().T
            middle = torch.stack([columns.min() + columns.max(), rows.min() + rows.max()])
            assert torch.equal(sample.landmarks[names.index(name)], (middle + 1) / 2)
        front, hind = (sample.landmarks[names.index(f"{end} legs")] for end in ("front", "hind"))
        assert front.isnan().all() == (animals.classes[sample.label] == "bird")
        assert hind.isfinite().all()


def test_four_legs_go_down_from_the_torso_and_the_tail_is_opposite_the_head(animals):
    names = animals.landmark_names
    for sample in animals:
        if animals.classes[sample.label] == "bird":
            continue
        at = dict(zip(names, sample.landmarks, strict=True))
        # Turned by at most 20 degrees.
        assert at["front legs"][1] > at["torso"][1]
        assert at["hind legs"][1] > at["torso"][1]
        ahead = at["front legs"][0] - at["hind legs"][0]
        assert (at["head"][0] - at["torso"][0]) * ahead > 0
        assert (at["tail"][0] - at["torso"][0]) * ahead < 0


def test_samples_depend_on_seed_split_and_index_alone():
    def images(**options):
        return PartAnimals(image_size=32, **options)._images

    large = images(split="train", size=8)
    assert torch.equal(images(split="train", size=4), large[:4])
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002 (that it does not matter is the point)
    assert torch.equal(images(split="train", size=8), large)
    assert not torch.equal(images(split="test", size=8), large)
    assert not torch.equal(images(split="train", size=8, seed=1), large)
    assert len({image.numpy().tobytes() for image in large}) == 8


@pytest.mark.parametrize("image_size", [16, 33, 200])
def test_any_size_of_image_shows_the_same_kind_of_animal(image_size):
    sample = PartAnimals("train", size=3, image_size=image_size)[2]
    assert sample.image.shape == (3, image_size, image_size)
    assert 0.02 < sample.object_mask.float().mean() < 0.6


def test_directions_are_as_frequent():
    animals = PartAnimals("train", size=120, image_size=32)
    head, tail = (animals.landmark_names.index(name) for name in ("head", "tail"))
    ahead = torch.stack([s.landmarks[head, 0] - s.landmarks[tail, 0] for s in animals])
    assert 40 <= (ahead > 0).sum() <= 80


def test_colour_does_not_tell_the_kind():
    def histograms(split, size):
        animals = PartAnimals(split, size, image_size=64)
        levels = (animals._images // 32).long()
        cells = (levels[:, 0] * 8 + levels[:, 1]) * 8 + levels[:, 2]
        counts = torch.stack([image.flatten().bincount(minlength=512) for image in cells])
        return (counts / cells[0].numel()).numpy(), [animals.label(i) for i in range(size)]

    model = LogisticRegression(C=10, max_iter=300).fit(*histograms("train", 600))
    assert model.score(*histograms("test", 300)) < 0.25  # chance: 0.17


def test_parts_tell_the_kind():
    """What differs by design, measured on the masks: a horse's legs, a bird's two."""
    animals = PartAnimals("train", size=180, image_size=64)
    share = torch.zeros(len(CLASSES), len(animals.part_names))
    for sample in animals:
        share[sample.label] += sample.part_masks.flatten(1).sum(1) / sample.object_mask.sum() / 30
    head, neck, torso, legs, _ = share.T
    kind = CLASSES.index
    assert neck.argmax() == kind("horse")
    assert legs.argmin() == kind("bird")
    assert torso.argmin() != kind("sheep")
    assert head.min() > 0.04
    assert torso[kind("sheep")] > torso[kind("dog")] > torso[kind("horse")] * 0.8


def test_animals_of_a_kind_differ_in_proportions_and_pose():
    one, other = (_four_legged(np.random.default_rng(seed), _BUILDS["dog"]) for seed in (0, 1))
    assert len(one) == len(other)
    assert all(a.code == b.code and a[1:] != b[1:] for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"split": "val"}, ValueError, "split"),
        ({"size": 0}, ValueError, "size"),
        ({"size": 1.5}, TypeError, "size"),
        ({"image_size": 15}, ValueError, "image_size"),
        ({"seed": -1}, ValueError, "seed"),
    ],
)
def test_bad_options_are_refused_by_name(options, error, name):
    with pytest.raises(error, match=f"^{name}: got"):
        PartAnimals(**options)
