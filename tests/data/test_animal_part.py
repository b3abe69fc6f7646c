"""Trees in the layout that the authors' code reads; in both versions of MATLAB's files."""

import sys

import pytest
import torch
from PIL import Image

from picnn_fast.data import AnimalPart
from tests.data.trees import FOX, GOLDFISH, animal_category, save_v7, save_v73


@pytest.fixture(params=[save_v7, save_v73])
def root(request, tmp_path):
    """Ten foxes, all with the same box, and ten goldfish."""
    boxes = [(31, 11, 90, 70)] * 10  # 60 x 60 pixels: 30..90 x 10..70
    # The middle of the first pixel is 0, that of the last one 224.
    heads = [(0, 224)] * 9 + [()]
    legs = [(112, 112), ()] * 4 + [(), (1, 2, 3, 4)]
    animal_category(tmp_path, FOX, boxes, heads, legs, request.param)
    small = [(1, 1, 49, 51)] * 5 + [(1, 1, 120, 90)] * 5
    animal_category(tmp_path, GOLDFISH, small, [(112, 112)] * 10, None, request.param)
    return tmp_path


def _both(root, **options):
    return [AnimalPart(root, split, **options) for split in ("train", "test")]


def test_boxes_are_cut_out_and_points_move_with_them(root):
    samples = [s for data in _both(root, categories=["fox"], image_size=120) for s in data]
    assert len(samples) == 10
    image = samples[0].image
    assert image.shape == (3, 120, 120)
    assert (image[0, :, :55] > 0.9).all()  # red up to x = 60 of the file
    assert (image[0, :, 65:] < 0.1).all()
    shown = [s.landmarks for s in samples]
    heads = [place[0].tolist() for place in shown if place[0].isfinite().all()]
    assert heads == [[119.0, 1.0]] * 9  # the middle of a pixel, at twice the size
    legs = [place[1].tolist() for place in shown if place[1].isfinite().all()]
    assert legs == [[60.0, 60.0]] * 4
    assert samples[0].part_masks.shape == (0, 120, 120)
    assert samples[0].object_mask.all()
    assert samples[0].box.tolist() == [0, 0, 120, 120]


def test_labels_and_names_follow_the_categories(root):
    data = AnimalPart(root, categories=["goldfish", "fox"], image_size=8)
    assert data.classes == ["goldfish", "fox"]
    assert data.landmark_names == ["head", "front legs"]
    assert data.part_names == []
    assert [data.label(i) for i in range(len(data))].count(1) == 9


def test_goldfish_have_no_legs_and_small_boxes_are_left_out(root):
    large = AnimalPart(root, categories=["goldfish"], image_size=8)
    every = AnimalPart(root, categories=["goldfish"], image_size=8, min_area=2499)
    assert len(every) == 9
    # The first five boxes are of 49 x 51 pixels.
    kept = [found for found in every._objects if int(found.path.stem) > 5]
    assert large._objects == kept
    for sample in large:
        assert sample.landmarks[0].tolist() == [4, 4]
        assert sample.landmarks[1].isnan().all()


def test_a_category_is_split_by_the_seed(root):
    def names(split, seed):
        data = AnimalPart(root, split, categories=["fox"], seed=seed, image_size=8)
        return [found.path.name for found in data._objects]

    train, test = names("train", 0), names("test", 0)
    assert (len(train), len(test)) == (9, 1)
    assert sorted(train + test) == [f"{place:05}.jpg" for place in range(1, 11)]
    assert names("train", 0) == train
    assert any(names("train", seed) != train for seed in (1, 2))


def test_places_of_parts_may_be_in_another_folder(root, tmp_path_factory):
    other = tmp_path_factory.mktemp("parts")
    (root / FOX).rename(other / FOX)
    with pytest.raises(FileNotFoundError, match=rf"{FOX}/truth_part01.mat is missing"):
        AnimalPart(root, categories=["fox"])
    assert len(AnimalPart(root, categories=["fox"], parts=other)) == 9


@pytest.mark.parametrize(
    "lost", [f"{FOX}_obj/img/data.mat", f"{FOX}/truth_part01.mat", f"{FOX}/truth_part02.mat"]
)
def test_a_missing_file_is_named_with_what_to_get(root, lost):
    (root / lost).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{lost} is missing; want the Animal-Part"):
        AnimalPart(root, categories=["fox"])


@pytest.mark.parametrize("damaged", [f"{FOX}_obj/img/data.mat", f"{FOX}/truth_part02.mat"])
def test_a_damaged_file_is_named(root, damaged):
    path = root / damaged
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    with pytest.raises(ValueError, match=rf"{damaged} cannot be read as"):
        AnimalPart(root, categories=["fox"])


def test_an_image_that_the_tables_leave_out_is_refused(root):
    images = root / f"{FOX}_obj" / "img" / "img"
    Image.new("RGB", (9, 9)).save(images / "00011.jpg")
    with pytest.raises(ValueError, match=r"data.mat cannot be read as boxes of the 11 images"):
        AnimalPart(root, categories=["fox"])


def test_truth_of_fewer_images_is_refused(tmp_path):
    animal_category(tmp_path, FOX, [(1, 1, 90, 70)] * 3, [(1, 1)] * 2, [(1, 1)] * 3)
    with pytest.raises(ValueError, match=r"truth_part01.mat .* in 3 images \(it holds 2\)"):
        AnimalPart(tmp_path, categories=["fox"])


def test_an_image_missing_between_others_is_named(root):
    images = root / f"{FOX}_obj" / "img" / "img"
    (images / "00003.jpg").rename(images / "00012.jpg")
    with pytest.raises(FileNotFoundError, match=r"00003.jpg is missing"):
        _both(root, categories=["fox"])


def test_without_h5py_the_newer_files_say_how_to_get_it(root, monkeypatch):
    if not (root / FOX / "truth_part01.mat").read_bytes().startswith(b"MATLAB 7.3"):
        assert AnimalPart(root, categories=["fox"])  # scipy reads the older ones
        return
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"h5py is not installed; it comes with: pip install"):
        AnimalPart(root, categories=["fox"])


def test_a_split_without_images_is_refused(tmp_path):
    animal_category(tmp_path, FOX, [(1, 1, 90, 70)], [(1, 1)], [(1, 1)])
    with pytest.raises(ValueError, match=r"^split: got 'test', of which .* holds no object"):
        AnimalPart(tmp_path, "test", categories=["fox"])


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"split": "val"}, ValueError, "split"),
        ({"image_size": 0}, ValueError, "image_size"),
        ({"min_area": -1}, ValueError, "min_area"),
        ({"seed": -1}, ValueError, "seed"),
        ({"categories": ["unicorn"]}, ValueError, "categories"),
        ({"categories": "fox"}, TypeError, "categories"),
    ],
)
def test_bad_options_are_refused_by_name(tmp_path, options, error, name):
    with pytest.raises(error, match=f"^{name}: got"):
        AnimalPart(tmp_path, **options)


def test_places_are_float32(root):
    sample = AnimalPart(root, categories=["fox"], image_size=8)[0]
    assert sample.landmarks.dtype == sample.box.dtype == sample.image.dtype == torch.float32
