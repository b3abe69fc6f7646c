"""Data sets that are published as archives: their labels, their names, and where they are."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from picnn_fast.data import DATA
from tests.data.trees import (
    WNIDS,
    cifar_tree,
    folder_tree,
    imagenet_tree,
    stl_tree,
    tiny_tree,
    write_lines,
)


def test_cifar_is_read_as_torchvision_does(tmp_path, monkeypatch):
    cifar_tree(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"^root: .* is missing, or not whole; want"):
        DATA["cifar10"](tmp_path)  # its checksums are not those of the published files
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: True)
    data = DATA["cifar10"](tmp_path, num_workers=0, validation=0)
    assert data.class_names == ["airplane", "automobile"]
    for train, images in ((True, data.plain_train_set), (False, data.test_set)):
        published = datasets.CIFAR10(tmp_path, train=train)
        assert len(images) == len(published)
        for i, (image, label) in enumerate(published):
            assert images.label(i) == label
            assert torch.equal(images.pixels(i), torch.tensor(np.array(image)))
    assert data.train_set.change is not None


def test_stl_is_read_as_torchvision_does(tmp_path, monkeypatch):
    stl_tree(tmp_path)
    data = DATA["stl10"](tmp_path, num_workers=0, validation=0)
    assert data.class_names == ["airplane", "bird"]
    monkeypatch.setattr("torchvision.datasets.stl10.check_integrity", lambda path, md5: True)
    published = datasets.STL10(tmp_path, "test")
    for i, (image, label) in enumerate(published):
        assert data.test_set.label(i) == label
        assert torch.equal(data.test_set.pixels(i), torch.tensor(np.array(image)))
    (tmp_path / "stl10_binary" / "test_y.bin").write_bytes(b"\x01\x02\x0b\x01")
    with pytest.raises(ValueError, match=r"test_X\.bin cannot be read as images .*want 1 to 2"):
        DATA["stl10"](tmp_path)


@pytest.mark.parametrize(("name", "kind"), [("cifar10", "CIFAR10"), ("stl10", "STL10")])
def test_what_torchvision_can_fetch_is_fetched_when_asked(tmp_path, monkeypatch, name, kind):
    tree = {"cifar10": cifar_tree, "stl10": stl_tree}[name]
    monkeypatch.setattr(
        "torchvision.datasets.cifar.check_integrity", lambda path, md5: Path(path).is_file()
    )
    fetched = []

    def download(self):
        if not fetched:
            fetched.append(self.url)
            tree(tmp_path)

    def broken(self):
        raise RuntimeError("no route to host")

    with pytest.raises(FileNotFoundError, match=r"https?://.*\.tar\.gz.*or download true"):
        DATA[name](tmp_path / "none")
    monkeypatch.setattr(getattr(datasets, kind), "download", broken)
    with pytest.raises(FileNotFoundError, match=r"^root: .*\(no route to host\); want .*http"):
        DATA[name](tmp_path, download=True)
    monkeypatch.setattr(getattr(datasets, kind), "download", download)
    for _ in range(2):
        assert DATA[name](tmp_path, download=True).num_classes == 2
    assert len(fetched) == 1


def test_tiny_imagenet_is_named_and_tested_on_its_validation_images(tmp_path):
    data = DATA["tiny-imagenet"](tiny_tree(tmp_path), num_workers=0)
    assert data.class_names == ["goldfish", "European fire salamander"]
    assert data.test_set.pictures.labels == [0, 1, 0, 1, 0, 1]
    assert (len(data.train_set), len(data.validation_set)) == (36, 4)
    (tmp_path / "words.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"words\.txt is missing; want .*200\.zip"):
        DATA["tiny-imagenet"](tmp_path)


def test_imagenet_is_read_from_folders_or_from_what_kaggle_unpacks(tmp_path):
    options = {"num_workers": 0, "image_size": 8, "resize": 9}
    data = DATA["imagenet"](imagenet_tree(tmp_path / "folders"), **options)
    assert data.class_names == list(WNIDS)
    assert data.test_set.pictures.labels == [0, 0, 0, 1, 1, 1]
    assert data.preprocessing.resize == 9
    kaggle = tmp_path / "kaggle"
    images = kaggle / "ILSVRC" / "Data" / "CLS-LOC"
    folder_tree(images, WNIDS, [("train", 20)])
    (images / "val").mkdir()
    table = ["ImageId,PredictionString"]
    for i, wnid in enumerate([WNIDS[1], WNIDS[0], WNIDS[1]]):
        Image.new("RGB", (12, 9), (i, 0, 0)).save(images / "val" / f"ILSVRC2012_val_{i:08}.JPEG")
        table.append(f"ILSVRC2012_val_{i:08},{wnid} 1 2 3 4 {wnid} 5 6 7 8")
    (kaggle / "LOC_val_solution.csv").write_text("\n".join(table) + "\n")
    write_lines(kaggle / "LOC_synset_mapping.txt", [(wnid, "crane, bird") for wnid in WNIDS])
    data = DATA["imagenet"](kaggle, **options)
    assert data.class_names == [f"crane ({wnid})" for wnid in WNIDS]
    assert data.test_set.pictures.labels == [1, 0, 1]
    assert data.test_set[2][0].shape == (3, 8, 8)
    with pytest.raises(FileNotFoundError, match=r"train is missing; want .*https://image-net\.org"):
        DATA["imagenet"](tmp_path)
