"""Images in tar files: every one once an epoch, whoever reads, wherever they are."""

import functools
import http.server
import itertools
import os
import threading
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from picnn_fast.data import ShardsDataModule
from picnn_fast.data.shards import expand
from tests.data.trees import shard, shard_tree


def _module(root, **options):
    given = {"image_size": 8, "validation": 0, "num_workers": 0, "batch_size": 4, **options}
    return ShardsDataModule(root, **given)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "shards").mkdir()
    return shard_tree(tmp_path / "shards")


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("t-{08..11}.tar", ["t-08.tar", "t-09.tar", "t-10.tar", "t-11.tar"]),
        ("{a,b}-{0..1}", ["a-0", "a-1", "b-0", "b-1"]),
        ("t-{9..10}", ["t-9", "t-10"]),
    ],
)
def test_braces_stand_for_names(pattern, names):
    assert expand(pattern) == names


def test_images_and_labels_are_those_in_the_files(root):
    data = _module(
        root, test="test-{00..01}.tar", augment=False, image_size=12, test_crop="stretch"
    )
    assert (len(data.train_set), len(data.test_set), data.class_names) == (40, 6, ["0", "1"])
    assert data.test_set.pictures.labels == [0, 1, 0, 1, 0, 1]
    for number in range(40):
        want = np.random.default_rng((5, number)).integers(0, 256, (12, 9, 3)).astype(np.uint8)
        got = data.train_set.pictures.open(number, 8)
        assert np.array_equal(np.asarray(got), want)


def _order(data, epoch, rank=0, ranks=1):
    progress = SimpleNamespace(current=SimpleNamespace(processed=epoch))
    data.trainer = SimpleNamespace(
        training=True,
        world_size=ranks,
        global_rank=rank,
        fit_loop=SimpleNamespace(epoch_progress=progress),
    )
    loader = data.train_dataloader()
    data.trainer = None
    return [index for _, index in loader.sampler]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_image_is_read_once_an_epoch_by_one_process(root, ranks):
    for epoch in range(2):
        pieces = [_order(_module(root), epoch, rank, ranks) for rank in range(ranks)]
        assert Counter(itertools.chain(*pieces)) == Counter(range(40))
        assert {len(piece) for piece in pieces} == {40 // ranks}
    # Another order each epoch and seed, and the same again in a run that goes on.
    assert _order(_module(root), 1) == _order(_module(root), 1)
    assert _order(_module(root), 0) != _order(_module(root), 1) != _order(_module(root, seed=1), 1)


def test_images_that_do_not_divide_by_the_processes_are_told_of(root):
    with pytest.warns(UserWarning, match=r"2 of the training images, .* for 40 do not divide by 3"):
        pieces = [_order(_module(root), 0, rank, 3) for rank in range(3)]
    counts = Counter(itertools.chain(*pieces))
    assert set(counts) == set(range(40))
    assert sorted(counts.values())[-3:] == [1, 2, 2]


def test_a_process_reads_through_few_shards_at_a_time(root, tmp_path, monkeypatch):
    monkeypatch.setattr("picnn_fast.data.shards._WINDOW", 1)
    data = _module(root)
    shard_of = data.train_set.pictures.index.places[:, 0]
    passed = [number for number, _ in itertools.groupby(shard_of[_order(data, 0)])]
    assert sorted(passed) == [0, 1, 2, 3]  # each shard from its first image to its last
    pieces = [set(shard_of[_order(data, 0, rank, 4)]) for rank in range(4)]
    assert sum(map(len, pieces)) <= 4 + 3


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_that_read_share_an_epoch_out(root, workers):
    data = _module(root, num_workers=workers, augment=False, cache=0)
    loader = data.train_dataloader()
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        seen = Counter(image.numpy().tobytes() for images, _ in loader for image in images)
        assert seen == Counter(
            data.train_set.pixels(i).permute(2, 0, 1).numpy().tobytes() for i in range(40)
        )


def test_what_is_in_the_shards_is_kept_until_they_change(root, tmp_path, monkeypatch):
    index = tmp_path / "kept" / "index.npz"
    first = _module(root, index=index)
    with monkeypatch.context() as patch:
        patch.setattr("picnn_fast.data.shards._indexed", None)
        again = _module(root, index=index)
    assert torch.equal(again.test_set[2][0], first.test_set[2][0])
    assert again.train_set.pictures.labels == first.train_set.pictures.labels
    shard(root / "train-03.tar", [("x.png", np.zeros((9, 9, 3), np.uint8)), ("x.cls", 1)])
    assert len(_module(root, index=index).train_set) == 30
    index.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"index\.npz cannot be read as an index of shards"):
        _module(root, index=index)


@pytest.fixture
def url(root):
    """The shards behind a server of this machine, which counts what it was asked for."""
    asked = Counter()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            asked[self.path] += 1
            super().do_GET()

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=root)
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def test_shards_at_a_url_are_fetched_once_when_they_are_needed(root, url, tmp_path):
    address, asked = url
    names = {"train": "train-{00..03}.tar", "test": "test-{00..01}.tar"}
    names["index"] = tmp_path / "index.npz"
    first = _module(address, **names, keep=tmp_path / "first")
    assert set(asked.values()) == {1}
    assert len(asked) == 6
    plain = _module(root)
    assert torch.equal(first.test_set[4][0], plain.test_set[4][0])
    # Another machine that shares the index fetches what it reads.
    other = _module(address, **names, keep=tmp_path / "other")
    assert torch.equal(other.test_set[4][0], plain.test_set[4][0])
    assert torch.equal(other.test_set[5][0], plain.test_set[5][0])
    assert sorted(asked.values()) == [1, 1, 1, 1, 1, 2]
    assert [path.name for path in (tmp_path / "other").glob("*.tar")] == ["test-01.tar"]
    with pytest.raises(ValueError, match=r"^keep: got None with shards at http"):
        _module(address, **names)
    with pytest.raises(ValueError, match=r"^train: got 'train-\*\.tar' at a URL, want names with"):
        _module(address, keep=tmp_path / "first")
    names["train"] = "train-{00..04}.tar"
    with pytest.raises(ValueError, match=r"train-04\.tar cannot be read as a shard"):
        _module(address, **names, keep=tmp_path / "first")


PICTURE = np.zeros((9, 9, 3), np.uint8)


@pytest.mark.parametrize(
    ("samples", "options", "said"),
    [
        ([("a.png", PICTURE)], {}, "train-00.tar cannot be read .*image a has no label"),
        ([("a.png", PICTURE), ("a.cls", b"cat")], {}, "train-00.tar .*invalid literal"),
        ([("a.png", PICTURE), ("a.cls", -1)], {}, "train-00.tar .*a label is -1"),
        ([("a.txt", b"")], {}, "^train: the shards of .* hold no image"),
        (
            [("a.png", PICTURE), ("a.cls", 2)],
            {"classes": True},
            "^classes: got 2 names .* a label 2",
        ),
    ],
)
def test_shards_that_are_not_as_they_should_be_are_named(tmp_path, samples, options, said):
    shard(tmp_path / "train-00.tar", samples)
    shard(tmp_path / "test-00.tar", [("a.png", PICTURE), ("a.cls", 0)])
    if options:
        (tmp_path / "names.txt").write_text("cat\ndog\n")
        options = {"classes": tmp_path / "names.txt"}
    with pytest.raises(ValueError, match=said):
        _module(tmp_path, **options)


def test_damaged_images_and_shards_and_missing_ones_are_named(root):
    with pytest.raises(
        FileNotFoundError, match=r"^train: .*train-04\.tar is missing; want tar files"
    ):
        _module(root, train="train-{00..09}.tar")
    with pytest.raises(FileNotFoundError, match=r"^test: .*val-\*\.tar is missing"):
        _module(root, test="val-*.tar")
    shard(root / "test-00.tar", [("birds/a.jpg", b"no image"), ("birds/a.cls", 0)])
    data = _module(root)
    with pytest.raises(
        OSError, match=r"^birds/a\.jpg in .*test-00\.tar cannot be read as an image"
    ):
        data.test_set[0]
    os.truncate(root / "train-02.tar", 2000)
    with pytest.raises(ValueError, match=r"train-02\.tar cannot be read as a tar file"):
        _module(root)


def test_names_of_classes_are_read(root, tmp_path):
    (tmp_path / "names.txt").write_text("ant\nbee\n")
    assert _module(root, classes=tmp_path / "names.txt").class_names == ["ant", "bee"]
