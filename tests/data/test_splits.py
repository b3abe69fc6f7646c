"""The images of a split, in order."""

import pytest
import torch
from PIL import Image

from picnn_fast.data import DATA, Batches, ImageFolderDataModule, read_image, shown_image


def test_digits_come_in_order_whatever_the_batches():
    data = DATA["digits"](batch_size=50, seed=3)
    for split, samples in (("train", data.train_set), ("test", data.test_set)):
        batches = Batches(data, split)
        images, labels = (torch.cat(column) for column in zip(*batches, strict=True))
        assert len(batches) == -(-len(samples) // 50)
        assert batches.num_images == len(samples) == len(labels)
        for i in (0, 7, len(samples) - 1):
            assert torch.equal(images[i], samples[i][0])
            assert labels[i] == samples[i][1]
            assert torch.equal(shown_image(data, split, i), images[i])
        assert batches.part_names == []


def test_part_masks_come_along_and_images_are_normalised_but_shown_as_they_are():
    data = DATA["part-animals"](
        batch_size=4, image_size=16, train_images=12, test_images=6, validation=0.3
    )
    for split in ("train", "test"):
        samples = data.part_sets[split]
        batches = Batches(data, split)
        assert batches.part_names == samples.part_names
        images, labels, masks = (torch.cat(column) for column in zip(*batches, strict=True))
        assert len(labels) == len(samples)
        for i in range(len(samples)):
            assert torch.equal(shown_image(data, split, i), samples[i].image)
            torch.testing.assert_close(images[i], (samples[i].image - data.mean) / data.std)
            assert torch.equal(masks[i], samples[i].part_masks)
            assert labels[i] == samples[i].label
    data.single_out("cow")
    labels = torch.cat([batch[1] for batch in Batches(data)])
    assert labels.tolist() == [int(sample.label == data.category) for sample in samples]


def test_training_images_of_a_folder_are_not_augmented(tmp_path):
    for split in ("train", "test"):
        for shade, name in enumerate(("ant", "bee")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(3):
                shaded = Image.linear_gradient("L").resize((40, 40)).rotate(90 * (shade + i))
                shaded.convert("RGB").save(tmp_path / split / name / f"{i}.png")
    data = ImageFolderDataModule(tmp_path, 4, image_size=32, validation=0, num_workers=0)
    for split in ("train", "test"):
        images, _ = (torch.cat(column) for column in zip(*Batches(data, split), strict=True))
        for i in range(6):
            path = getattr(data, f"{split}_set").pictures.files[i][0]
            taken, shown = read_image(data, path)
            assert torch.equal(images[i], taken)
            assert torch.equal(shown_image(data, split, i), shown)
            assert 0 <= shown.min() <= shown.max() <= 1


def test_wrong_arguments_are_refused_by_name():
    data = DATA["digits"]()
    with pytest.raises(ValueError, match="split: got 'valid', want one of 'train', 'test'"):
        Batches(data, "valid")
    with pytest.raises(ValueError, match="index: got -1"):
        shown_image(data, "test", -1)
    with pytest.raises(IndexError):
        shown_image(data, "test", 360)
