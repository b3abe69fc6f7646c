"""The index kept beside a checkpoint: made once, used while it is true, and made again."""

import dataclasses
import os

import pytest
import torch

from picnn_fast.data import DATA
from picnn_fast.models import make_interpretable
from picnn_fast.training import filter_index as kept
from picnn_fast.training.filter_index import index_path, kept_filter_index
from picnn_fast.training.options import Options

OPTIONS = Options(data={"name": "digits"}, method="picnn")


@pytest.fixture
def call(tmp_path, monkeypatch):
    """``call(**change)`` asks for the index; returns it, and whether it made a pass."""
    torch.manual_seed(0)
    network = make_interpretable("small-resnet", "picnn", num_classes=10, num_filters=6)
    checkpoint = tmp_path / "last.ckpt"
    torch.save(network.state_dict(), checkpoint)
    data = DATA["digits"](batch_size=200)
    passes = []
    make = kept.filter_index

    def counted(*arguments, **named):
        passes.append(1)
        return make(*arguments, **named)

    monkeypatch.setattr(kept, "filter_index", counted)

    def ask(options=OPTIONS, **named):
        passes.clear()
        index = kept_filter_index(checkpoint, network, options, data, **{"top": 3, **named})
        return index, bool(passes)

    ask.checkpoint = checkpoint
    return ask


def test_the_second_call_makes_no_pass_and_gives_the_same(call):
    first, made = call()
    assert made
    again, made = call()
    assert not made
    for name in ("images", "values", "boxes", "positions", "labels", "predicted"):
        for key in ("by_activation", "by_contribution"):
            ours, theirs = getattr(first, key), getattr(again, key)
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
    assert torch.equal(first.mutual_information, again.mutual_information)
    assert again.field == first.field
    assert again.num_images == 360


def test_each_split_has_an_index_of_its_own(call):
    assert call()[1]
    train, made = call(split="train")
    assert made
    assert train.num_images > 1000
    assert not call()[1]
    assert not call(split="train")[1]


@pytest.mark.parametrize(
    "change",
    [
        {"top": 4},
        {"options": dataclasses.replace(OPTIONS, seed=1)},
        {"options": dataclasses.replace(OPTIONS, data={"name": "digits", "validation": 0.2})},
    ],
    ids=["top", "seed", "data"],
)
def test_of_another_question_it_is_made_again(call, change):
    call()
    assert call(**change)[1]
    assert not call(**change)[1]
    assert call()[1]


def test_how_many_processes_read_images_makes_no_other_index(call):
    call()
    workers = dataclasses.replace(OPTIONS, data={"name": "digits", "num_workers": 1})
    assert not call(options=workers)[1]


def test_of_other_weights_it_is_made_again(call):
    call()
    state = torch.load(call.checkpoint, weights_only=True)
    name = next(name for name, value in state.items() if value.is_floating_point())
    state[name].view(-1)[0] += 1e-3
    torch.save(state, call.checkpoint)
    assert call()[1]
    assert not call()[1]


@pytest.mark.parametrize("harm", ["cut", "text", "another", "earlier"])
def test_a_damaged_file_is_made_again(call, harm):
    call()
    path = index_path(call.checkpoint)
    content = torch.load(path, weights_only=True)
    if harm == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    elif harm == "text":
        path.write_text("no index")
    elif harm == "another":
        torch.save([1, 2], path)
    else:  # of a version whose index held less
        del content["index"]["correlations"]
        torch.save(content, path)
    assert call()[1]
    assert not call()[1]


def test_an_interrupted_write_leaves_the_old_one(call, monkeypatch):
    call()
    path = index_path(call.checkpoint)
    before = path.read_bytes()

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            call(top=4)
    assert path.read_bytes() == before
    assert sorted(entry.name for entry in path.parent.iterdir()) == [path.name, "last.ckpt"]
    assert not call()[1]


def test_on_a_full_disk_it_warns_and_gives_the_index(call, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(UserWarning, match=r"cannot be kept in .*No space left on device"):
        assert call()[0].num_images == 360
    assert not index_path(call.checkpoint).exists()


def test_a_checkpoint_that_is_gone_is_told(call):
    call.checkpoint.unlink()
    with pytest.raises(FileNotFoundError):
        call()
