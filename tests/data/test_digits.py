import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from picnn_fast.data import DigitsDataModule
from picnn_fast.data.loading import shift


def _ready(**options):
    return DigitsDataModule(**{"validation": 0.0, **options})


def test_split_is_fixed_stratified_and_whatever_the_seed():
    one, other = _ready(seed=0), _ready(seed=7)
    assert (len(one.train_set), len(one.test_set)) == (1437, 360)
    assert torch.equal(one.test_set.tensors[0], other.test_set.tensors[0])
    counts = one.test_set.tensors[1].bincount(minlength=10)
    assert counts.min() >= 34
    assert counts.max() <= 37
    train = {image.numpy().tobytes() for image in one.train_set.tensors[0]}
    # The set itself holds a few identical scans; the split adds none.
    assert sum(image.numpy().tobytes() in train for image in one.test_set.tensors[0]) <= 1


def test_images_are_grey_and_scaled_to_one():
    images, labels = _ready().train_set.tensors
    assert images.shape[1:] == (1, 8, 8)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert (images.min(), images.max()) == (0, 1)


def test_order_follows_seed_and_epoch():
    def order(seed, epoch):
        loader = _ready(seed=seed).train_dataloader()
        loader.sampler.set_epoch(epoch)
        return torch.cat([labels for _, labels in loader])

    assert torch.equal(order(0, 1), order(0, 1))
    assert not torch.equal(order(0, 1), order(0, 2))
    assert not torch.equal(order(0, 1), order(1, 1))


def test_every_training_image_comes_once_an_epoch():
    data = _ready(batch_size=100)
    seen = torch.cat([images for images, _ in data.train_dataloader()]).flatten(1)
    assert torch.equal(seen.sum().round(), data.train_set.tensors[0].sum().round())
    assert len(seen) == 1437


@given(seed=st.integers(0, 100), amount=st.integers(0, 3), size=st.integers(1, 6))
def test_shift_moves_each_image_whole(seed, amount, size):
    torch.manual_seed(seed)
    # Ink in the middle survives every shift; its place tells the shift.
    images = torch.zeros(5, 2, size + 2 * amount, size + 2 * amount)
    inner = torch.rand(5, 2, size, size) + 0.1
    stop = amount + size
    images[:, :, amount:stop, amount:stop] = inner
    moved = shift(images, amount)
    assert moved.shape == images.shape
    for before, after in zip(inner, moved, strict=True):
        rows, columns = after[0].nonzero().min(0).values.tolist()
        assert torch.equal(after[:, rows : rows + size, columns : columns + size], before)
        assert torch.isclose(after.sum(), before.sum())


def test_shifts_differ_between_images_and_repeat_with_the_seed():
    images = torch.zeros(64, 1, 8, 8)
    images[:, :, 4, 4] = 1
    torch.manual_seed(0)
    first = shift(images, 1)
    torch.manual_seed(0)
    assert torch.equal(first, shift(images, 1))
    assert len({image.argmax().item() for image in first}) == 9


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"validation": 1.0}, "validation"),
        ({"validation_seed": -1}, "validation_seed"),
        ({"batch_size": 0}, "batch_size"),
        ({"num_workers": -1}, "num_workers"),
        ({"seed": 1.5}, "seed"),
        ({"max_shift": 8}, "max_shift"),
    ],
)
def test_bad_options_are_refused_by_name(options, name):
    with pytest.raises(ValueError, match=f"^{name}: got"):
        DigitsDataModule(**options)
