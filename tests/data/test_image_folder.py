import pytest
import torch
from PIL import Image

from picnn_fast.data import ImageFolderDataModule


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


def test_workers_repeat_their_draws_with_seed_and_epoch(root):
    Image.effect_noise((40, 40), 80).convert("RGB").save(root / "train" / "ant" / "0.png")

    def epoch(seed, number, torch_seed):
        torch.manual_seed(torch_seed)
        data = ImageFolderDataModule(root, image_size=8, seed=seed, num_workers=1, validation=0)
        data.setup()
        loader = data.train_dataloader()
        loader.sampler.set_epoch(number)
        return _batch(loader)[0]

    reference = epoch(0, 1, 5)
    assert torch.equal(reference, epoch(0, 1, 6))
    assert not torch.equal(reference, epoch(0, 2, 5))


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
        ({"crop": "left"}, "crop"),
        ({"test_crop": "none"}, "test_crop"),
        ({"padding": 4}, "padding"),
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
