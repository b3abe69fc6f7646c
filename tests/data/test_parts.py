from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from picnn_fast.data import PartAnimals, PartDataModule, PartDataset, PartSample
from picnn_fast.data.parts import bounding_boxes, centres, flip_left_right


@pytest.fixture(scope="module")
def animals():
    return {split: PartAnimals(split, size=14, image_size=24) for split in ("train", "test")}


def _module(animals, **options):
    return PartDataModule(animals["train"], animals["test"], **{"batch_size": 4, **options})


def test_batches_are_images_and_labels_without_the_work_of_parts(animals, monkeypatch):
    def fail(*_):
        raise AssertionError("read the parts of a sample")

    monkeypatch.setattr(PartAnimals, "__getitem__", fail)
    data = _module(animals)
    images, labels = zip(*data.test_dataloader(), strict=True)
    assert torch.equal(
        torch.cat(images), torch.stack([animals["test"].image(i) for i in range(14)])
    )
    assert torch.cat(labels).tolist() == [animals["test"].label(i) for i in range(14)]
    labels = torch.cat([labels for _, labels in data.train_dataloader()])
    assert labels.dtype == torch.int64
    assert sorted(labels.tolist()) == sorted(i % 6 for i in range(14))


def test_module_says_what_the_sets_hold(animals):
    data = _module(animals)
    assert (data.class_names, data.num_classes) == (animals["train"].classes, 6)
    assert data.in_channels == 3


@pytest.mark.parametrize("split", ["train", "test"])
def test_part_loader_gives_collated_samples_in_order(animals, split):
    batches = list(_module(animals).part_loader(split))
    assert all(isinstance(batch, PartSample) for batch in batches)
    assert [len(batch.label) for batch in batches] == [4, 4, 4, 2]
    third = animals[split][9]
    for name, value in third._asdict().items():
        batched = getattr(batches[2], name)[1]
        assert torch.equal(batched.nan_to_num(-1), torch.as_tensor(value).nan_to_num(-1)), name
    assert batches[0].part_masks.dtype == torch.bool
    assert batches[0].label.dtype == torch.int64


def test_a_loader_process_reads_the_same_samples(animals):
    first = next(iter(_module(animals, num_workers=1).part_loader()))
    assert torch.equal(first.part_masks, next(iter(_module(animals).part_loader())).part_masks)


def test_every_split_has_its_parts(animals):
    data = _module(animals, validation=0.3)
    for split, images in (("train", data.train_set), ("validation", data.validation_set)):
        batches = list(data.part_loader(split))
        assert torch.equal(
            torch.cat([batch.image for batch in batches]), torch.stack([x for x, _ in images])
        )
        assert torch.cat([b.label for b in batches]).tolist() == [y for _, y in images]
        assert data.part_sets[split].part_names == animals["train"].part_names
        assert data.part_sets[split].source(0) == data.part_sets[split]._indices[0]
    assert len(data.train_set) + len(data.validation_set) == len(animals["train"])
    assert _module(animals, validation=0).part_sets.keys() == {"train", "test"}


@given(seed=st.integers(0, 100), count=st.integers(0, 9), width=st.integers(1, 4))
def test_flip_turns_some_images_whole(seed, count, width):
    torch.manual_seed(seed)
    images = torch.rand(count, 3, 2, width)
    flipped = flip_left_right(images)
    for before, after in zip(images, flipped, strict=True):
        assert torch.equal(after, before) or torch.equal(after, before.flip(-1))


def test_flips_are_even_odds_and_repeat_with_the_seed():
    images = torch.rand(400, 1, 1, 2)
    torch.manual_seed(0)
    first = flip_left_right(images)
    torch.manual_seed(0)
    assert torch.equal(first, flip_left_right(images))
    assert 160 < (first != images).any(-1).sum() < 240


@pytest.mark.parametrize(
    ("flip", "training", "flips"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_training_alone_flips_unless_told_otherwise(animals, flip, training, flips):
    torch.manual_seed(0)
    data = _module(animals, flip=flip, mean=(0, 0, 0), std=(1, 1, 1))
    data.trainer = SimpleNamespace(training=training)
    images, labels = torch.rand(40, 3, 2, 5), torch.arange(40)
    after, kept = data.on_after_batch_transfer((images, labels), 0)
    assert torch.equal(kept, labels)
    assert torch.equal(after, images) != flips


@pytest.mark.parametrize("training", [True, False])
def test_training_images_alone_are_shifted_and_black_comes_in(animals, training):
    torch.manual_seed(0)
    data = _module(animals, flip=False, max_shift=2, mean=(0.5, 0.5, 0.5), std=(1, 1, 1))
    data.trainer = SimpleNamespace(training=training)
    after, _ = data.on_after_batch_transfer((torch.ones(40, 3, 6, 6), torch.arange(40)), 0)
    assert set(after.unique().tolist()) == ({-0.5, 0.5} if training else {0.5})
    black = (after < 0).any(1).float().sum((1, 2))
    assert black.max() == (6 * 6 - 4 * 4 if training else 0)


def test_every_batch_is_normalised_and_labels_are_kept(animals):
    data = _module(animals, mean=(0.5, 0, 0.25), std=(1, 2, 0.5))
    images, labels = torch.rand(5, 3, 2, 2), torch.arange(5)
    after, kept = data.on_after_batch_transfer((images, labels), 0)
    assert torch.equal(kept, labels)
    red, green, blue = images.unbind(1)
    want = torch.stack([red - 0.5, green / 2, 2 * blue - 0.5], dim=1)
    torch.testing.assert_close(after, want)
    assert torch.equal(data.normalise(images), after)


def test_order_follows_the_seed(animals):
    def order(seed):
        return torch.cat([labels for _, labels in _module(animals, seed=seed).train_dataloader()])

    assert torch.equal(order(1), order(1))
    assert not torch.equal(order(1), order(2))


@given(
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    bits=st.lists(st.integers(0, 2**25 - 1), max_size=4),
)
def test_boxes_and_centres_agree_with_a_loop(height, width, bits):
    masks = torch.zeros(len(bits), height, width, dtype=torch.bool)
    for mask, number in zip(masks, bits, strict=True):
        for place in range(height * width):
            mask[place // width, place % width] = bool(number >> place & 1)
    boxes = bounding_boxes(masks)
    middles = centres(boxes)
    assert boxes.shape == (len(bits), 4)
    for mask, box, middle in zip(masks, boxes, middles, strict=True):
        rows = [row for row in range(height) if mask[row].any()]
        columns = [column for column in range(width) if mask[:, column].any()]
        if not rows:
            assert box.isnan().all()
            assert middle.isnan().all()
            continue
        edges = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        assert box.tolist() == edges
        assert middle.tolist() == [(edges[0] + edges[2]) / 2, (edges[1] + edges[3]) / 2]


class _Empty(PartDataset):
    def __init__(self, like):
        self.classes, self.part_names = like.classes, like.part_names
        self.landmark_names, self.image_size = like.landmark_names, like.image_size

    def __len__(self):
        return 0

    def __getitem__(self, index):
        raise IndexError(index)

    image = label = __getitem__


def test_sets_that_do_not_fit_are_refused(animals):
    train = animals["train"]
    with pytest.raises(TypeError, match=r"^train_set: got list, want a PartDataset"):
        PartDataModule([], train)
    with pytest.raises(ValueError, match=r"^test_set: got no sample"):
        PartDataModule(train, _Empty(train))
    larger = PartAnimals("test", size=2, image_size=25)
    with pytest.raises(ValueError, match=r"^test_set: got image_size 25, want 24 like train_set"):
        PartDataModule(train, larger)
    for name in ("classes", "part_names", "landmark_names"):
        other = PartAnimals("test", size=2, image_size=24)
        setattr(other, name, ["x"])
        with pytest.raises(ValueError, match=rf"^test_set: got {name} \['x'\]"):
            PartDataModule(train, other)


def test_a_data_set_must_give_all_that_is_read():
    class Half(PartDataset):
        def __len__(self):
            return 1

    with pytest.raises(TypeError, match="abstract"):
        Half()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"seed": -1}, "seed"),
        ({"validation": -0.1}, "validation"),
        ({"validation_seed": 0.5}, "validation_seed"),
        ({"mean": (0.5,)}, "mean"),
        ({"std": (1, 0, 1)}, "std"),
    ],
)
def test_bad_options_are_refused_by_name(animals, options, name):
    with pytest.raises(ValueError, match=f"^{name}: got"):
        _module(animals, **options)


def test_unknown_split_is_refused(animals):
    with pytest.raises(ValueError, match=r"^split: got 'val'"):
        _module(animals).part_loader("val")
    with pytest.raises(ValueError, match=r"^split: got 'validation', want one of 'train', 'test'"):
        _module(animals).part_loader("validation")  # there are no validation images
