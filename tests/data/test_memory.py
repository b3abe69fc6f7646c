"""Decoded images are kept once for all processes, within a bound, and change no image."""

import copy
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from picnn_fast.data import ImageFolderDataModule
from picnn_fast.data.memory import ImageMemory, free_memory, image_memory


@pytest.fixture
def root(tmp_path):
    noise = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 3)):
        for name in ("ant", "bee"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = noise.integers(0, 256, (20 + i, 30, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


def _module(root, **options):
    return ImageFolderDataModule(root, 5, image_size=16, validation=0, **options)


def _epoch(loader, number=None):
    if number is not None:
        loader.sampler.set_epoch(number)
    return torch.cat([images for images, _ in loader])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("crop", ["random-resized", "random", "none"])
def test_images_are_decoded_once_whoever_reads_them(root, crop, workers):
    options = {"crop": crop, "num_workers": workers}
    data, plain = _module(root, **options), _module(root, **options, cache=0)
    train, test = data.train_dataloader(), data.test_dataloader()
    order = plain.train_dataloader()
    want = [_epoch(order, 0), _epoch(order, 1), _epoch(plain.test_dataloader())]
    assert torch.equal(_epoch(train, 0), want[0])
    assert torch.equal(_epoch(test), want[2])
    shutil.rmtree(root)
    assert torch.equal(_epoch(train, 1), want[1])
    assert torch.equal(_epoch(test), want[2])
    with pytest.raises(OSError, match=r"png cannot be read as an image"):
        plain.test_set[0]


def test_what_does_not_fit_is_read_from_its_file(root):
    data, plain = _module(root, num_workers=0, cache=5e-6), _module(root, num_workers=0, cache=0)
    for epoch in range(2):
        images = [_epoch(module.train_dataloader(), epoch) for module in (data, plain)]
        assert torch.equal(*images)
    shelf = data.train_set.shelf
    kept = [shelf.get(i) is not None for i in range(12)]
    assert 0 < sum(kept) < 12
    assert 0 < shelf.memory.taken <= 5000
    for index, is_kept in enumerate(kept):
        if is_kept:
            want = np.asarray(data.train_set.pictures.open(index, 1))
            assert np.array_equal(shelf.get(index), want)


def test_processes_of_one_machine_share_the_bound():
    assert image_memory(1e-3, 4).size == 250_000
    assert image_memory(0, 1).size == 0
    free = free_memory()
    assert 0 < free < 2**50
    assert image_memory(None, 2).size == pytest.approx(free / 8, rel=0.5)


def test_more_than_the_system_grants_is_none():
    memory = ImageMemory(2**62)
    assert memory.size == 0
    shelf = memory.shelf(3)
    assert not shelf.keep(0, np.ones((2, 2, 3), np.uint8))
    assert shelf.get(0) is None


def test_a_copy_for_another_process_keeps_nothing(root):
    data = _module(root, num_workers=0)
    want = _epoch(data.test_dataloader())
    for other in (pickle.loads(pickle.dumps(data.test_set)), copy.deepcopy(data.test_set)):
        assert other.shelf.get(0) is None
        assert torch.equal(other.pixels(0).permute(2, 0, 1), want[0])


@pytest.mark.parametrize("cache", [-1, float("nan")])
def test_a_bad_bound_is_refused_by_name(root, cache):
    with pytest.raises(ValueError, match=r"^cache: got"):
        _module(root, cache=cache)
