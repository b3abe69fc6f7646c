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
    data = ImageFolderDataModule(root, batch_size=8, image_size=16, num_workers=0)
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
        data = ImageFolderDataModule(root, image_size=8, augment=augment, num_workers=0)
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
        data = ImageFolderDataModule(root, image_size=8, seed=seed, num_workers=1)
        data.setup()
        loader = data.train_dataloader()
        loader.sampler.set_epoch(number)
        return _batch(loader)[0]

    reference = epoch(0, 1, 5)
    assert torch.equal(reference, epoch(0, 1, 6))
    assert not torch.equal(reference, epoch(0, 2, 5))


@pytest.mark.parametrize(("batch_size", "batches"), [(5, [5]), (4, [4, 2]), (1, [1] * 6)])
def test_a_single_image_left_over_is_not_trained_on(root, batch_size, batches):
    data = ImageFolderDataModule(root, batch_size, image_size=8, num_workers=0)
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
    [({"image_size": 0}, "image_size"), ({"mean": (0.5,)}, "mean"), ({"std": (1, 0, 1)}, "std")],
)
def test_bad_options_are_refused_by_name(root, options, name):
    with pytest.raises(ValueError, match=f"^{name}: got"):
        ImageFolderDataModule(root, **options)
