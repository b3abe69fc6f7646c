import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from picnn_fast.data import DATA, ImageFolderDataModule, read_image
from picnn_fast.data.preprocessing import as_numbers


@pytest.fixture
def root(tmp_path):
    for split, count in (("train", 3), ("test", 2)):
        for index, name in enumerate(("ant", "bee")):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                colour = (200 * index, 20 * i, 100)
                Image.new("RGB", (30, 20 + i), colour).save(folder / f"{i}.png")
    return tmp_path


def _batch(loader):
    return next(iter(loader))


def test_images_are_square_normalised_and_labelled_by_folder(root):
    data = ImageFolderDataModule(root, batch_size=8, image_size=16, num_workers=0, validation=0)
    data.setup()
    images, labels = _batch(data.test_dataloader())
    assert images.shape == (4, 3, 16, 16)
    assert images.dtype == torch.uint8  # a quarter of what is sent to a device
    assert images.is_contiguous(memory_format=torch.channels_last)
    images, labels = data.as_taken(images, labels)
    assert images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, IMAGENET(torch.stack([image for image, _ in data.test_set])))
    assert labels.tolist() == [0, 0, 1, 1]
    assert (data.class_names, data.num_classes, data.in_channels) == (["ant", "bee"], 2, 3)
    red = (200 / 255 - 0.485) / 0.229
    assert images[2, 0].sub(red).abs().max() < 1e-3
    images, _ = _batch(data.train_dataloader())
    assert images.shape == (6, 3, 16, 16)


def test_augmentation_is_in_training_alone_and_can_be_turned_off(root):
    Image.effect_noise((40, 40), 80).convert("RGB").save(root / "train" / "ant" / "0.png")

    def first(augment, seed):
        data = ImageFolderDataModule(
            root, image_size=8, augment=augment, num_workers=0, validation=0
        )
        data.setup()
        torch.manual_seed(seed)
        return data.train_set[0][0]

    assert torch.equal(first(True, 1), first(True, 1))
    assert not torch.equal(first(True, 1), first(True, 2))
    assert torch.equal(first(False, 1), first(False, 2))


def test_training_images_can_be_had_in_order_and_as_they_are_tested(root):
    data, plain = (
        ImageFolderDataModule(root, image_size=8, augment=augment, color_jitter=(0.9, 0, 0, 0))
        for augment in (True, False)
    )
    images, labels = (torch.cat(values) for values in zip(*data.train_images(), strict=True))
    images = as_numbers(images)
    assert labels.tolist() == [label for _, label in plain.train_set]
    assert torch.equal(images, torch.stack([image for image, _ in plain.train_set]))
    assert not torch.equal(images, torch.stack([image for image, _ in data.train_set]))


def test_ranks_share_the_training_images_and_none_is_read_twice(root):
    data = ImageFolderDataModule(root, image_size=8, validation=0)
    whole = torch.cat([images for images, _ in data.train_images()])
    shares = []
    for rank in range(3):
        data.trainer = SimpleNamespace(world_size=3, global_rank=rank)
        shares.append(torch.cat([images for images, _ in data.train_images()]))
    assert sum(map(len, shares)) == len(whole)
    for rank, share in enumerate(shares):
        assert torch.equal(share, whole[rank::3])


def test_changes_follow_from_seed_epoch_and_image_whoever_reads_it(root):
    """Not from torch's generator, nor from what was read before, nor from how many read."""
    for path in root.glob("train/*/*.png"):
        Image.effect_noise((40, 40), 80).convert("RGB").save(path)

    def epochs(seed, *numbers, workers=0, batch_size=4):
        loader = ImageFolderDataModule(
            root, batch_size, image_size=8, seed=seed, num_workers=workers, validation=0
        ).train_dataloader()
        for number in numbers:
            loader.sampler.set_epoch(number)
            yield [image for images, _ in loader for image in images]

    def same(one, other):
        return torch.equal(torch.stack(one), torch.stack(other))

    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = epochs(0, 1, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert not same(first, second)
    torch.manual_seed(6)
    # The same processes read one epoch after the other.
    assert all(map(same, epochs(0, 1, 2, workers=2), (first, second)))
    assert same(next(epochs(0, 2, batch_size=3)), second)
    assert not same(next(epochs(1, 1)), first)


@pytest.mark.parametrize(("batch_size", "batches"), [(5, [5]), (4, [4, 2]), (1, [1] * 6)])
def test_a_single_image_left_over_is_not_trained_on(root, batch_size, batches):
    data = ImageFolderDataModule(root, batch_size, image_size=8, num_workers=0, validation=0)
    data.setup()
    assert [len(labels) for _, labels in data.train_dataloader()] == batches
    assert sum(len(labels) for _, labels in data.test_dataloader()) == 4


def test_missing_folder_names_the_path_and_the_layout(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train is missing; want .*/train/<class>/<image>"):
        ImageFolderDataModule(tmp_path)
    (tmp_path / "train" / "ant").mkdir(parents=True)
    (tmp_path / "test").mkdir()
    with pytest.raises(FileNotFoundError, match="test holds no class folder"):
        ImageFolderDataModule(tmp_path)


def test_a_file_that_is_no_image_is_named(root):
    (root / "test" / "bee" / "1.png").unlink()
    (root / "test" / "bee" / "1.png").symlink_to(root / "gone.png")
    data = ImageFolderDataModule(root, image_size=8, num_workers=0)
    data.setup()
    with pytest.raises(OSError, match=r"test/bee/1\.png cannot be read as an image \(.*No such"):
        _batch(data.test_dataloader())


def test_classes_must_agree(root):
    (root / "test" / "cat").mkdir()
    with pytest.raises(ValueError, match="only one of them has cat"):
        ImageFolderDataModule(root)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"image_size": 0}, "image_size"),
        ({"resize": 100}, "resize"),
        ({"resize": 256, "test_crop": "stretch"}, "resize"),
        ({"crop": "left"}, "crop"),
        ({"test_crop": "none"}, "test_crop"),
        ({"padding": 4}, "padding"),
        ({"padding": -1, "crop": "random"}, "padding"),
        ({"color_jitter": (-1, 0, 0, 0)}, "color_jitter"),
        ({"validation": 1.5}, "validation"),
        ({"mean": (0.5,)}, "mean"),
        ({"std": (1, 0, 1)}, "std"),
    ],
)
def test_bad_options_are_refused_by_name(root, options, name):
    with pytest.raises(ValueError, match=f"^{name}: got"):
        ImageFolderDataModule(root, **options)


def _striped(path, width=60, height=20):
    """Red, green and blue thirds from left to right."""
    image = Image.new("RGB", (width, height))
    for third, colour in enumerate(((255, 0, 0), (0, 255, 0), (0, 0, 255))):
        image.paste(colour, (third * width // 3, 0, (third + 1) * width // 3, height))
    image.save(path)


def _seen(root, split="test", **options):
    plain = {"mean": (0, 0, 0), "std": (1, 1, 1), "num_workers": 0, "validation": 0}
    data = ImageFolderDataModule(root, image_size=20, **plain, **options)
    data.setup()
    return {"test": data.test_set, "train": data.train_set}[split][0][0]


def test_testing_crops_the_middle_or_stretches_the_whole(root):
    _striped(root / "test" / "ant" / "0.png")
    middle = _seen(root)
    assert middle.mean((1, 2)).tolist() == pytest.approx([0, 1, 0], abs=0.05)
    whole = _seen(root, test_crop="stretch")
    assert whole.mean((1, 2)).tolist() == pytest.approx([1 / 3] * 3, abs=0.05)
    wider = _seen(root, resize=40)  # the middle half of the height, a sixth of the width
    assert wider[1].mean() == pytest.approx(1, abs=0.05)


def test_training_crops_as_it_is_told(root):
    _striped(root / "train" / "ant" / "0.png")
    torch.manual_seed(0)
    assert torch.equal(
        _seen(root, "train", crop="none", flip=False), _seen(root, "train", augment=False)
    )
    starts = set()
    for seed in range(8):
        torch.manual_seed(seed)
        starts.add(_seen(root, "train", crop="random", flip=False).argmax(0)[10].sum().item())
    assert len(starts) > 3
    torch.manual_seed(0)
    padded = [_seen(root, "train", crop="random", padding=30, flip=False) for _ in range(8)]
    assert any((image.sum(0) == 0).any() for image in padded)


def test_flips_and_colours_change_when_asked_alone(root):
    _striped(root / "train" / "ant" / "0.png", 20)
    still = _seen(root, "train", crop="none", flip=False)
    for options in ({"flip": True}, {"flip": False, "color_jitter": (0.4, 0.4, 0.4, 0.1)}):
        torch.manual_seed(1)
        images = [_seen(root, "train", crop="none", **options) for _ in range(6)]
        assert any(not torch.equal(image, still) for image in images)
    assert torch.equal(still, _seen(root, "train", crop="none", flip=False))


@pytest.mark.parametrize("name", ["validation", "val"])
def test_a_folder_of_validation_images_is_taken(root, name):
    for kind in ("ant", "bee"):
        (root / name / kind).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(root / name / "bee" / "x.png")
    (root / name / "ant" / "x.png").symlink_to(root / name / "bee" / "x.png")
    data = ImageFolderDataModule(root, image_size=8, num_workers=0)
    data.setup()
    assert (len(data.train_set), len(data.validation_set), len(data.test_set)) == (6, 2, 4)
    assert data.validation_source == f"the 2 images in {root / name}"
    assert not {path for path, _ in data.validation_set.pictures.files} & {
        path for path, _ in data.test_set.pictures.files
    }


@pytest.mark.parametrize("name", ["validation", "val"])
def test_no_validation_is_none_beside_a_folder_for_it_too(root, name):
    shutil.copytree(root / "test", root / name)
    data = ImageFolderDataModule(root, image_size=8, validation=0)
    assert (data.validation_set, data.val_dataloader(), len(data.train_set)) == (None, [], 6)
    assert data.validation_source == "none: validation is 0"


@pytest.mark.parametrize("share", [0.5, 0.05, 0.11])
def test_a_share_to_hold_out_beside_a_folder_of_validation_images_is_refused(root, share):
    shutil.copytree(root / "test", root / "val")
    message = rf"^validation: got {share} beside {root / 'val'}, want 0\.1, .* or 0 for none"
    with pytest.raises(ValueError, match=message):
        ImageFolderDataModule(root, image_size=8, validation=share)


def test_two_folders_of_validation_images_are_refused(root):
    for name in ("validation", "val"):
        (root / name).mkdir()
    with pytest.raises(ValueError, match=r"^root: .* holds both validation and val, want one"):
        ImageFolderDataModule(root)


NUMBERS = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
IMAGENET = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@pytest.mark.parametrize(
    ("options", "train", "test"),
    [
        (
            {"resize": 256, "crop": "random", "color_jitter": (0.4, 0.4, 0.4, 0.1)},
            [
                v2.Resize(256),
                v2.RandomCrop(224),
                v2.RandomHorizontalFlip(),
                v2.ColorJitter(0.4, 0.4, 0.4, 0.1),
            ],
            [v2.Resize(256), v2.CenterCrop(224)],
        ),
        (
            {"test_crop": "stretch"},
            [v2.RandomResizedCrop(224, scale=(0.5, 1)), v2.RandomHorizontalFlip()],
            [v2.Resize((224, 224))],
        ),
        (
            {"image_size": 32, "crop": "random", "padding": 4},
            [v2.Resize(32), v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()],
            [v2.Resize(32), v2.CenterCrop(32)],
        ),
    ],
    ids=["published", "ours, stretched", "cifar"],
)
def test_the_pipelines_that_the_docstring_names_are_those(root, options, train, test):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 40, 3), np.uint8)
    image = Image.fromarray(pixels)
    for split in ("train", "test"):
        image.save(root / split / "ant" / "0.png")
    data = ImageFolderDataModule(root, num_workers=0, validation=0, **options)
    for images, transform in ((data.train_set, train), (data.test_set, test)):
        for seed in range(3):
            torch.manual_seed(seed)
            want = v2.Compose([*transform, *NUMBERS])(image)
            torch.manual_seed(seed)
            shown, label = images[0]
            assert torch.equal(shown, want)
            taken, _ = data.as_taken(shown[None], torch.tensor([label]))
            assert torch.equal(taken[0], IMAGENET(want))


def _files(images):
    return [path for path, _ in images.pictures.files]


@pytest.mark.parametrize("name", ["validation", "val"])
def test_a_folder_of_validation_images_is_the_test_split_where_there_is_none(root, name):
    (root / "test").rename(root / name)
    data = ImageFolderDataModule(root, image_size=8, validation=0.34)
    assert [path.startswith(str(root / name)) for path in _files(data.test_set)] == [True] * 4
    assert all(path.startswith(str(root / "train")) for path in _files(data.validation_set))
    assert (len(data.train_set), len(data.validation_set)) == (4, 2)
    assert data.validation_source == (
        f"2 of the 6 training images, seed 0; the test split is {root / name}"
    )


@pytest.fixture
def unsplit(tmp_path):
    for index, name in enumerate(("ant", "bee", "cat")):
        (tmp_path / name).mkdir()
        for i in range(10):
            Image.new("RGB", (8, 8), (80 * index, 20 * i, 9)).save(tmp_path / name / f"{i}.png")
    return tmp_path


def test_class_folders_without_a_split_are_split_once_for_all(unsplit):
    data = ImageFolderDataModule(unsplit, image_size=8)
    assert data.class_names == ["ant", "bee", "cat"]
    splits = [_files(images) for images in (data.train_set, data.validation_set, data.test_set)]
    assert [len(files) for files in splits] == [21, 3, 6]
    assert len(set().union(*splits)) == 30
    assert [label for _, label in data.test_set.pictures.files] == [0, 0, 1, 1, 2, 2]
    assert data.validation_source == (
        "3 of the 24 training images, seed 0; the test split is 6 of the 30 images, drawn once"
    )
    for options in ({"seed": 3}, {"validation_seed": 3}, {"validation": 0.5}):
        other = ImageFolderDataModule(unsplit, image_size=8, **options)
        assert _files(other.test_set) == _files(data.test_set)


def test_a_folder_above_the_split_is_no_folder_of_classes(tmp_path):
    for name in ("birds", "cars"):
        (tmp_path / name / "train" / "ant").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name / "train" / "ant" / "0.png")
    with pytest.raises(FileNotFoundError, match=r"^root: .*/train is missing; want"):
        ImageFolderDataModule(tmp_path)


def test_a_file_as_root_is_named_as_such(root):
    (root / "birds.zip").touch()
    with pytest.raises(ValueError, match=r"^root: got .*birds\.zip, a file; want a folder"):
        ImageFolderDataModule(root / "birds.zip")


def test_a_class_without_an_image_is_named(root):
    for path in (root / "train" / "bee").iterdir():
        path.rename(path.with_suffix(".txt"))
    with pytest.raises(FileNotFoundError, match=r"^root: .*train/bee holds no image; want files"):
        ImageFolderDataModule(root)


def test_hidden_files_and_folders_of_tools_are_left_out(root):
    before = ImageFolderDataModule(root, image_size=8, validation=0)
    for place in (root / "train", root / "train" / "ant", root / "test"):
        for name in (".ipynb_checkpoints", "@eaDir", "__MACOSX"):
            (place / name).mkdir()
            Image.new("RGB", (8, 8)).save(place / name / "0.png")
    Image.new("RGB", (8, 8)).save(root / "train" / "bee" / "._0.png")
    (root / "train" / "bee" / "Thumbs.db").touch()
    after = ImageFolderDataModule(root, image_size=8, validation=0)
    assert after.class_names == before.class_names
    assert _files(after.train_set) == _files(before.train_set)
    assert _files(after.test_set) == _files(before.test_set)


def test_images_below_a_class_folder_count_and_upper_case_names_too(root):
    (root / "train" / "ant" / "more").mkdir()
    Image.new("RGB", (8, 8)).save(root / "train" / "ant" / "more" / "9.JPG")
    data = ImageFolderDataModule(root, image_size=8, validation=0)
    assert len(data.train_set) == 7


def test_links_are_followed_but_not_in_circles(root, tmp_path_factory):
    ant = root / "train" / "ant"
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    Image.new("RGB", (8, 8)).save(elsewhere / "7.png")
    (ant / "itself").symlink_to(ant)
    (ant / "parent").symlink_to(root / "train")
    (ant / "above").symlink_to(root)
    (ant / "linked").symlink_to(elsewhere)
    (ant / "again").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(ant)
    (root / "test" / "bee").rename(elsewhere.parent / f"{elsewhere.name}-bee")
    (root / "test" / "bee").symlink_to(elsewhere.parent / f"{elsewhere.name}-bee")
    data = ImageFolderDataModule(root, image_size=8, validation=0)
    names = [path.removeprefix(f"{root}/train/") for path in _files(data.train_set)]
    own = [f"{name}/{i}.png" for name in ("ant", "bee") for i in range(3)]
    assert sorted(names) == sorted([*own, "ant/again/7.png"])
    assert len(data.test_set) == 4


def _wide(path, kind):
    """Two columns, of a quarter and of all of what the type holds."""
    if kind == "pgm":
        path.write_bytes(b"P5 2 1 65535\n" + np.array([16384, 65535], ">u2").tobytes())
    else:
        Image.fromarray(np.array([[16384, 65535]], np.uint16)).save(path)


@pytest.mark.parametrize("kind", ["png", "tif", "pgm"])
def test_grey_images_of_16_bits_are_scaled(root, kind):
    (root / "test" / "ant" / "0.png").unlink()
    _wide(root / "test" / "ant" / f"0.{kind}", kind)
    options = {"mean": (0, 0, 0), "std": (1, 1, 1), "num_workers": 0, "validation": 0}
    data = ImageFolderDataModule(root, image_size=1, test_crop="stretch", **options)
    (image,) = data.test_set[0][0].unique().tolist()
    assert image == pytest.approx((0.25 + 1) / 2, abs=0.01)


def test_numbers_of_no_known_range_are_refused_by_name(root):
    path = root / "test" / "ant" / "0.tif"
    for pixels in (np.ones((4, 4), np.float32), np.ones((4, 4), np.int32)):
        Image.fromarray(pixels).save(path)
        (root / "test" / "ant" / "0.png").unlink(missing_ok=True)
        data = ImageFolderDataModule(root, image_size=8, num_workers=0)
        with pytest.raises(OSError, match=r"0\.tif cannot be read as an image \(.*no known range"):
            data.test_set[0]


def test_a_file_is_read_as_test_images_are(root):
    data = ImageFolderDataModule(root, image_size=16, num_workers=0, mean=(0.5, 0.4, 0.3))
    path = root / "test" / "bee" / "1.png"
    taken, shown = read_image(data, path)
    image, label = data.test_set[3]
    assert torch.equal(taken, data.as_taken(image[None], torch.tensor([label]))[0][0])
    assert (shown - torch.tensor([200, 20, 100])[:, None, None] / 255).abs().max() < 1e-3
    with pytest.raises(FileNotFoundError):
        read_image(data, root / "none.png")


def test_without_a_way_of_its_own_a_file_is_resized_to_the_test_images_and_normalised(root):
    path = root / "test" / "bee" / "1.png"
    digits = DATA["digits"]()
    taken, shown = read_image(digits, path)
    assert taken.shape == (1, 8, 8)
    assert torch.equal(taken, shown)
    animals = DATA["part-animals"](image_size=16, train_images=6, test_images=6)
    taken, shown = read_image(animals, path)
    assert taken.shape == (3, 16, 16)
    assert torch.equal(taken, animals.normalise(shown[None])[0])


def test_images_much_smaller_than_what_is_made_of_them_are_told_of(root):
    for name, side in (("0.png", 32), ("1.jpg", 150)):
        Image.new("RGB", (side + 8, side)).save(root / "train" / "ant" / name)
    data = ImageFolderDataModule(root, num_workers=0, validation=0)
    assert data.remark == (
        "the first image has 32 pixels, which become 224, with 49 times the work:"
        " --data.image_size 32 leaves images as they are"
    )
    assert ImageFolderDataModule(root, image_size=32, validation=0).remark is None
    (root / "train" / "ant" / "0.png").unlink()
    assert ImageFolderDataModule(root, validation=0).remark is None
