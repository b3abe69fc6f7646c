import numpy as np
import pytest
import torch
from PIL import Image

from picnn_fast.data import CUB200
from tests.data.trees import PARTS, write_lines

SPECIES = ["001.Black_footed_Albatross", "002.Laysan_Albatross"]
IMAGES = {
    1: f"{SPECIES[0]}/Black_Footed_Albatross_0001_796111.jpg",
    2: f"{SPECIES[0]}/Black_Footed_Albatross_0002_55.jpg",
    3: f"{SPECIES[1]}/Laysan_Albatross_0001_545.jpg",
}


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "CUB_200_2011"
    write_lines(root / "images.txt", IMAGES.items())
    write_lines(root / "classes.txt", enumerate(SPECIES, 1))
    write_lines(root / "image_class_labels.txt", [(1, 1), (2, 1), (3, 2)])
    write_lines(root / "train_test_split.txt", [(1, 0), (2, 1), (3, 1)])
    boxes = [(1, 10.0, 20.0, 40.0, 20.0), (2, 0.0, 0.0, 60.0, 50.0), (3, 5.0, 5.0, 90.0, 20.0)]
    write_lines(root / "bounding_boxes.txt", boxes)
    write_lines(root / "parts" / "parts.txt", enumerate(PARTS, 1))
    points = []
    for image in IMAGES:
        for part in range(1, 16):
            shown = part not in (3, 8)
            x, y = (10.0 + part, 20.0 + part) if shown else (0.0, 0.0)
            points.append((image, part, x, y, int(shown)))
    points[13] = (1, 14, 55.0, 30.0, 1)  # the tail is outside of the box of image 1
    write_lines(root / "parts" / "part_locs.txt", points)
    for image, name in IMAGES.items():
        path = root / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.zeros((50, 60, 3), np.uint8)
        pixels[:, :30] = 200
        picture = Image.fromarray(pixels)
        # A few of the photographs are grey.
        (picture.convert("L") if image == 3 else picture).save(path, quality=95)
    return root


def test_the_split_and_labels_are_those_of_the_tables(root):
    test, train = CUB200(root, "test", image_size=8), CUB200(root, "train", image_size=8)
    assert (len(test), len(train)) == (1, 2)
    assert train.classes == SPECIES
    assert [train.label(i) for i in range(2)] == [0, 1]
    assert [found.path.name for found in test._objects] == [IMAGES[1].split("/")[1]]


def test_the_box_is_cut_out_and_points_move_with_it(root):
    data = CUB200(root, "test", image_size=40)
    assert data.landmark_names == PARTS
    sample = data[0]
    assert sample.image.shape == (3, 40, 40)
    # The box is 10..50 x 20..40: x is kept, y stretched twice.
    for part, place in enumerate(sample.landmarks, 1):
        if part in (3, 8, 14):
            assert place.isnan().all(), part
        else:
            assert place.tolist() == [part, 2 * part]
    # The bright half ends at x = 30, column 20 of the crop.
    assert (sample.image[:, :, :18] > 0.7).all()
    assert (sample.image[:, :, 22:] < 0.1).all()
    assert sample.part_masks.shape == (0, 40, 40)
    assert sample.box.tolist() == [0, 0, 40, 40]


def test_a_box_beyond_the_photograph_is_cut_off(root):
    sample = CUB200(root, "train", image_size=22)[1]
    # 5..95 x 5..25 of 60 x 50 pixels: 5..60 are left; back is at (11, 21).
    torch.testing.assert_close(sample.landmarks[0], torch.tensor([6 * 22 / 55, 16 * 22 / 20]))
    assert sample.image.shape == (3, 22, 22)
    assert torch.equal(sample.image[0], sample.image[1])  # grey


def test_landmarks_are_chosen_by_name_and_in_order(root):
    data = CUB200(root, "test", image_size=40, landmark_names=["tail", "forehead", "back"])
    assert data.landmark_names == ["tail", "forehead", "back"]
    assert data[0].landmarks.nan_to_num(-1).tolist() == [[-1, -1], [6, 12], [1, 2]]


def test_the_object_is_its_box_or_where_half_of_the_annotators_saw_it(root):
    assert CUB200(root, "test", image_size=20)[0].object_mask.all()
    seen = np.zeros((50, 60), np.uint8)
    seen[:, 30:] = 204
    seen[:30, 30:] = 51  # one in five
    for name in IMAGES.values():
        path = (root / "segmentations" / name).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(seen).save(path)
    mask = CUB200(root, "test", image_size=20)[0].object_mask
    want = torch.zeros(20, 20, dtype=torch.bool)
    want[10:, 10:] = True
    assert torch.equal(mask, want)


@pytest.mark.parametrize(
    "lost",
    [
        "classes.txt",
        "images.txt",
        "image_class_labels.txt",
        "train_test_split.txt",
        "bounding_boxes.txt",
        "parts/parts.txt",
        "parts/part_locs.txt",
        f"images/{IMAGES[1]}",
    ],
)
def test_a_missing_file_is_named_with_what_to_get(root, lost):
    (root / lost).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{lost} is missing; want .*Birds-200-2011"):
        CUB200(root, "test")


def test_tables_written_on_another_system_are_read(root):
    before = CUB200(root, "train", image_size=8)
    for path in (*root.glob("*.txt"), *(root / "parts").glob("*.txt")):
        text = "\ufeff" + path.read_text() + "\n"
        path.write_bytes(text.replace("\n", "\r\n").encode())
    after = CUB200(root, "train", image_size=8)
    assert (after.classes, after.landmark_names) == (before.classes, before.landmark_names)
    assert [s.label for s in after] == [s.label for s in before]
    for one, other in zip(after, before, strict=True):
        assert torch.equal(one.landmarks.nan_to_num(-1), other.landmarks.nan_to_num(-1))


def test_a_missing_mask_is_named(root):
    (root / "segmentations").mkdir()
    with pytest.raises(FileNotFoundError, match=r"Black_Footed_Albatross_0001_796111.png"):
        CUB200(root, "test")


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ("classes.txt", "one Albatross\n"),
        ("images.txt", "1\n"),
        ("image_class_labels.txt", "1 1 1\n"),
        ("bounding_boxes.txt", "1 2 3 4\n"),
        ("bounding_boxes.txt", "1 a b c d\n"),
        ("bounding_boxes.txt", ""),
        ("parts/part_locs.txt", "1 16 0 0 1\n"),
    ],
)
@pytest.mark.filterwarnings("ignore:loadtxt")
def test_a_damaged_table_is_named(root, table, text):
    (root / table).write_text(text)
    with pytest.raises(ValueError, match=rf"{table} cannot be read as"):
        CUB200(root, "test")


@pytest.mark.parametrize(
    ("table", "rows"),
    [
        ("train_test_split.txt", [(1, 0), (2, 1)]),
        ("bounding_boxes.txt", [(2, 0, 0, 9, 9)]),
        ("image_class_labels.txt", [(1, 3), (2, 1), (3, 1)]),
    ],
)
def test_tables_that_do_not_fit_are_refused(root, table, rows):
    write_lines(root / table, rows)
    with pytest.raises(ValueError, match="cannot be read as images that the other tables hold"):
        CUB200(root, "test")


def test_a_damaged_photograph_or_mask_is_named(root):
    (root / "segmentations" / SPECIES[0]).mkdir(parents=True)
    mask = (root / "segmentations" / IMAGES[1]).with_suffix(".png")
    mask.write_bytes(b"no image")
    data = CUB200(root, "test", image_size=8)
    with pytest.raises(ValueError, match=rf"{mask.name} cannot be read as a mask"):
        data[0]
    Image.new("L", (9, 9)).save(mask)
    with pytest.raises(ValueError, match=rf"{mask.name} cannot be read as a mask"):
        data[0]
    (root / "images" / IMAGES[1]).write_bytes(b"no image")
    with pytest.raises(ValueError, match="cannot be read as an image"):
        data.image(0)


def test_a_box_outside_of_the_photograph_is_refused(root):
    write_lines(root / "bounding_boxes.txt", [(1, 70, 0, 9, 9), (2, 0, 0, 9, 9), (3, 0, 0, 9, 9)])
    with pytest.raises(ValueError, match="lies outside of its"):
        CUB200(root, "test").image(0)


def test_a_split_without_images_is_refused(root):
    write_lines(root / "train_test_split.txt", [(1, 1), (2, 1), (3, 1)])
    with pytest.raises(ValueError, match=r"^split: got 'test', of which .* holds no object"):
        CUB200(root, "test")


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"split": "val"}, ValueError, "split"),
        ({"image_size": -1}, ValueError, "image_size"),
        ({"landmark_names": ["head"]}, ValueError, "landmark_names"),
        ({"landmark_names": []}, ValueError, "landmark_names"),
        ({"landmark_names": "tail"}, TypeError, "landmark_names"),
    ],
)
def test_bad_options_are_refused_by_name(root, options, error, name):
    with pytest.raises(error, match=f"^{name}: got"):
        CUB200(root, **options)
