import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from picnn_fast.data import PartDataModule, VOCPart
from tests.data.trees import HEIGHT, WIDTH, annotate, block, structs, voc_list

CAT = {
    "head": block(10, 10, 30, 30),
    "leye": block(12, 12, 14, 14),
    "lear": block(10, 5, 14, 10),  # above the head
    "neck": block(30, 20, 36, 30),
    "torso": block(36, 20, 66, 40),
    "lfleg": block(36, 40, 42, 60),
    "lfpa": block(36, 60, 42, 65),
    "rbleg": block(60, 40, 66, 65),
    "tail": block(66, 20, 70, 40),
}
BIRD = {
    "head": block(20, 10, 30, 20),
    "beak": block(30, 12, 36, 16),
    "torso": block(20, 20, 60, 50),
    "lwing": block(24, 24, 50, 44),
    "lleg": block(40, 50, 44, 70),
    "lfoot": block(40, 70, 50, 74),
    "tail": block(60, 30, 80, 40),
}
HORSE = {
    "muzzle": block(5, 5, 15, 15),
    "torso": block(15, 15, 75, 45),
    "lfuleg": block(15, 45, 22, 60),
    "lfho": block(15, 60, 22, 64),
    "tail": block(75, 15, 80, 45),
}


def _union(parts):
    return np.maximum.reduce(list(parts.values()))


@pytest.fixture
def root(tmp_path):
    """Two training images and one test image; a person, and a cat too small to count."""
    person = ("person", 15, block(80, 0, 95, 60), {"head": block(80, 0, 90, 10)})
    small = ("cat", 8, block(85, 60, 99, 75), {"head": block(85, 60, 99, 75)})
    annotate(tmp_path, "2008_000001", [person, ("cat", 8, _union(CAT), CAT)])
    annotate(tmp_path, "2008_000002", [("bird", 3, _union(BIRD), BIRD), small])
    annotate(tmp_path, "2008_000003", [("horse", 13, _union(HORSE), HORSE)])
    annotate(tmp_path, "2008_000004", [person])
    for category in ("cow", "dog", "sheep"):
        voc_list(tmp_path, category, "train", _2008_000001=-1, _2008_000002=-1)
        voc_list(tmp_path, category, "val", _2008_000003=-1)
    voc_list(tmp_path, "cat", "train", _2008_000001=1, _2008_000002=0)
    voc_list(tmp_path, "cat", "val", _2008_000003=-1)
    voc_list(tmp_path, "bird", "train", _2008_000001=-1, _2008_000002=1)
    voc_list(tmp_path, "bird", "val", _2008_000003=-1)
    voc_list(tmp_path, "horse", "train", _2008_000001=-1, _2008_000002=-1)
    voc_list(tmp_path, "horse", "val", _2008_000003=1)
    return tmp_path


def _masks(data, sample):
    return dict(zip(data.part_names, sample.part_masks, strict=True))


def test_a_cat_is_cut_out_and_its_parts_are_merged(root):
    # The box of the cat is 60 x 60 pixels, so at 60 nothing is stretched.
    data = VOCPart(root, "train", image_size=60)
    assert data.part_names == ["head", "torso", "legs", "front legs", "back legs", "tail"]
    assert data.landmark_names == ["head", "neck", "torso"]
    assert [data.classes[data.label(i)] for i in range(len(data))] == ["cat", "bird"]
    sample = data[0]
    merged = {
        "head": ["head", "leye", "lear"],
        "torso": ["torso", "neck"],
        "front legs": ["lfleg", "lfpa"],
        "back legs": ["rbleg"],
        "tail": ["tail"],
        "legs": [],
    }
    for part, mask in _masks(data, sample).items():
        want = sum((CAT[name] for name in merged[part]), np.zeros((HEIGHT, WIDTH)))[5:65, 10:70]
        assert np.array_equal(mask.numpy(), want > 0), part
    assert np.array_equal(sample.object_mask.numpy(), _union(CAT)[5:65, 10:70] > 0)
    # Middles of the annotated boxes: of the head alone, without the ear.
    assert sample.landmarks.tolist() == [[10, 15], [23, 20], [41, 25]]
    assert sample.box.tolist() == [0, 0, 60, 60]
    # The photograph is white where the cat is.
    inside = sample.image.mean(0) > 0.5
    assert (inside == sample.object_mask).float().mean() > 0.98


def test_a_crop_is_stretched_to_a_square_and_its_annotations_with_it(root):
    data = VOCPart(root, "train", image_size=30, categories=["bird"])
    assert data.part_names == ["head", "torso", "legs", "tail"]
    sample = data[0]
    # The box is 20..80 x 10..74: 60 x 64 pixels.
    head = sample.landmarks[0]
    torch.testing.assert_close(head, torch.tensor([5 * 30 / 60, 5 * 30 / 64]))
    assert sample.landmarks[1].isnan().all()  # no neck
    masks = _masks(data, sample)
    rows, columns = masks["torso"].nonzero().T
    assert [columns.min(), columns.max() + 1] == [0, 20]
    assert (rows.min() - 10 * 30 / 64).abs() <= 1
    assert (rows.max() + 1 - 40 * 30 / 64).abs() <= 1
    assert masks["head"].any(0).nonzero().max() + 1 == 8  # to the tip of the beak
    assert masks["legs"].any()
    assert masks["tail"].any()


def test_a_square_is_cut_out_about_an_animal_with_black_beyond_the_photograph(root):
    wide = {"head": block(0, 30, 20, 40), "torso": block(20, 20, 90, 50)}
    annotate(root, "2008_000002", [("bird", 3, _union(wide), wide)])
    # Its box is 0..90 x 20..50, so the square is 0..90 x -10..80: ten rows above the photograph.
    sample = VOCPart(root, "train", image_size=90, categories=["bird"], crop="square")[0]
    assert sample.image.shape == (3, 90, 90)
    shown = np.zeros((90, 90), bool)
    shown[10:] = _union(wide)[:80, :90] > 0
    assert np.array_equal(sample.object_mask.numpy(), shown)
    inside = sample.image.mean(0) > 0.5
    assert (inside == sample.object_mask).float().mean() > 0.97
    assert not sample.image[:, :10].any()
    assert sample.box.tolist() == [0, 30, 90, 60]
    assert sample.landmarks[0].tolist() == [10, 45]
    half = VOCPart(root, "train", image_size=45, categories=["bird"], crop="square")[0]
    assert half.box.tolist() == [0, 15, 45, 30]
    assert torch.equal(half.object_mask, sample.object_mask[1::2, 1::2])


def test_seven_tenths_of_the_photographs_of_both_lists_are_drawn_to_train_on(tmp_path):
    for place in range(20):
        annotate(tmp_path, f"2008_{place:06}", [("cat", 8, _union(CAT), CAT)] * 2)
    for half, places in (("train", range(10)), ("val", range(10, 20))):
        voc_list(tmp_path, "cat", half, **{f"_2008_{place:06}": 1 for place in places})

    def names(split, seed=0):
        options = {"image_size": 8, "categories": ["cat"], "partition": "70/30", "seed": seed}
        return [found.path.stem for found in VOCPart(tmp_path, split, **options)._objects]

    train, test = names("train"), names("test")
    assert (len(train), len(test)) == (28, 12)  # both cats of a photograph
    assert set(train).isdisjoint(test)
    assert {name[-2:] < "10" for name in train} == {True, False}
    assert names("train") == train
    assert names("train", 1) != train
    (tmp_path / "VOCdevkit" / "VOC2010" / "ImageSets").rename(tmp_path / "elsewhere")
    assert (len(names("train")), len(names("test"))) == (28, 12)


def test_a_horse_has_no_tail_among_its_parts_and_no_head_means_no_landmark(root):
    data = VOCPart(root, "test", image_size=32)
    assert len(data) == 1
    masks = _masks(data, data[0])
    assert masks["head"].any()  # the muzzle
    assert masks["front legs"].any()
    assert not masks["tail"].any()
    assert data[0].landmarks[0].isnan().all()
    assert data[0].landmarks[2].isfinite().all()


def test_an_animal_may_have_no_annotated_part(root):
    annotate(root, "2008_000003", [("horse", 13, _union(HORSE), {})])
    sample = VOCPart(root, "test", image_size=32)[0]
    assert not sample.part_masks.any()
    assert sample.landmarks.isnan().all()
    assert sample.object_mask.any()


def test_small_objects_count_when_asked_for(root):
    data = VOCPart(root, "train", min_area=100, categories=["cat"], image_size=8)
    assert len(data) == 2
    assert data[1].object_mask.all()


def test_labels_follow_the_order_of_the_categories(root):
    data = VOCPart(root, "train", categories=["cat", "bird"], image_size=8)
    assert data.classes == ["cat", "bird"]
    assert [data.label(i) for i in range(2)] == [0, 1]


def test_without_the_lists_the_split_is_drawn_by_the_seed(tmp_path):
    for place in range(20):
        annotate(tmp_path, f"2008_{place:06}", [("cat", 8, _union(CAT), CAT)])

    def names(split, seed):
        data = VOCPart(tmp_path, split, seed=seed, image_size=8)
        return {found.path.stem for found in data._objects}

    train, test = names("train", 0), names("test", 0)
    assert (len(train), len(test)) == (18, 2)
    assert train.isdisjoint(test)
    assert names("train", 0) == train
    assert names("train", 1) != train


def test_lists_written_on_another_system_are_read(root):
    for path in (root / "VOCdevkit" / "VOC2010" / "ImageSets" / "Main").iterdir():
        text = "\ufeff" + path.read_text() + "\n"
        path.write_bytes(text.replace("\n", "\r\n").encode())
    assert len(VOCPart(root, "train", image_size=8)) == 2


def test_a_module_trains_on_it(root):
    train, test = (VOCPart(root, split, image_size=16) for split in ("train", "test"))
    data = PartDataModule(train, test, batch_size=2)
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (2, 3, 16, 16)
    assert sorted(labels.tolist()) == [0, 1]
    assert next(iter(data.part_loader("train"))).part_masks.shape == (2, 6, 16, 16)


@pytest.mark.parametrize(
    "lost",
    [
        "Annotations_Part",
        "Annotations_Part/2008_000001.mat",
        "VOCdevkit/VOC2010/JPEGImages/2008_000002.jpg",
        "VOCdevkit/VOC2010/ImageSets/Main/dog_train.txt",
    ],
)
def test_a_missing_file_is_named_with_what_to_get(root, lost):
    (root / lost).rename(root / "elsewhere")
    with pytest.raises(FileNotFoundError, match=rf"{lost} is missing; want .*PASCAL-Part"):
        VOCPart(root)


@pytest.mark.parametrize(
    ("damaged", "kind"),
    [
        ("Annotations_Part/2008_000001.mat", "an annotation of parts"),
        ("VOCdevkit/VOC2010/ImageSets/Main/cat_train.txt", "lines of an image"),
    ],
)
def test_a_damaged_file_is_named(root, damaged, kind):
    (root / damaged).write_bytes((root / damaged).read_bytes()[:-9])
    with pytest.raises(ValueError, match=rf"{damaged} cannot be read as {kind}"):
        VOCPart(root)


def test_a_damaged_photograph_is_named(root):
    data = VOCPart(root, image_size=8)
    path = data._objects[0].path
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match=rf"{path.name} cannot be read as an image"):
        data.image(0)


@pytest.mark.parametrize("size", [(30, 30), (WIDTH + 1, HEIGHT), (2 * WIDTH, 2 * HEIGHT)])
def test_a_photograph_of_another_size_than_the_masks_is_refused(root, size):
    data = VOCPart(root, image_size=8)
    Image.new("RGB", size).save(data._objects[0].path)
    for read in (data.image, data.__getitem__):
        with pytest.raises(ValueError, match=r"its pixels are .*, its annotations for \(100, 80\)"):
            read(0)


@pytest.mark.parametrize(
    ("objects", "problem"),
    [
        ([("cat", 8, block(0, 0, 60, 60), {"fin": block(0, 0, 9, 9)})], "has the part 'fin'"),
        ([("cat", 8, block(0, 0, 60, 60), {"head": np.ones((3, 3))})], "different sizes"),
        ([("cat", 8, np.ones(()), {})], "a mask of shape"),
    ],
)
def test_annotations_of_another_kind_are_refused(root, objects, problem):
    rows = [(c, i, m, structs(p.items(), ["part_name", "mask"])) for c, i, m, p in objects]
    anno = structs(
        [("x", structs(rows, ["class", "class_ind", "mask", "parts"]))], ["imname", "objects"]
    )
    savemat(root / "Annotations_Part" / "2008_000001.mat", {"anno": anno})
    with pytest.raises(ValueError, match=problem):
        VOCPart(root)


def test_a_split_without_an_animal_is_refused(root):
    with pytest.raises(ValueError, match=r"^split: got 'test', of which .* holds no object"):
        VOCPart(root, "test", categories=["cat"])


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"split": "val"}, ValueError, "split"),
        ({"image_size": 0}, ValueError, "image_size"),
        ({"min_area": -1}, ValueError, "min_area"),
        ({"seed": None}, TypeError, "seed"),
        ({"categories": ["cat", "fox"]}, ValueError, "categories"),
        ({"categories": ["cat", "cat"]}, ValueError, "categories"),
        ({"categories": []}, ValueError, "categories"),
        ({"categories": "cat"}, TypeError, "categories"),
        ({"crop": "circle"}, ValueError, "crop"),
        ({"partition": "train"}, ValueError, "partition"),
    ],
)
def test_bad_options_are_refused_by_name(root, options, error, name):
    with pytest.raises(error, match=f"^{name}: got"):
        VOCPart(root, **options)
