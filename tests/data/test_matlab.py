"""Structures of MATLAB files, damaged ones included."""

import os
import random
import signal

import numpy as np
import pytest
import torch
from scipy.io import savemat

from picnn_fast.data import VOCPart, matlab
from picnn_fast.data.files import DamagedFileError
from picnn_fast.data.matlab import read_struct
from tests.data.trees import annotate, block, save_v73, structs

NAME = "2008_000001"


@pytest.fixture
def root(tmp_path):
    """Two annotated photographs; the file of the first is not compressed."""
    mask = block(0, 0, 60, 60)
    for name in (NAME, "2008_000002"):
        annotate(tmp_path, name, [("cat", 8, mask, {"head": mask})])
    named = structs([("head", mask)], ["part_name", "mask"])
    objects = structs([("cat", 8, mask, named)], ["class", "class_ind", "mask", "parts"])
    path = tmp_path / "Annotations_Part" / f"{NAME}.mat"
    savemat(path, {"anno": structs([(NAME, objects)], ["imname", "objects"])})
    return tmp_path


def _flipped(root, place, bit):
    path = root / "Annotations_Part" / f"{NAME}.mat"
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)
    return path


# Of a process that reads it these end scipy 1.17, the second by asking for all memory.
@pytest.mark.parametrize(("place", "bit"), [(224, 0), (163, 6), (236, 0), (257, 6)])
def test_a_damaged_file_is_named_and_ends_nothing_else(root, place, bit):
    path = _flipped(root, place, bit)
    with pytest.raises(DamagedFileError, match=rf"{path} cannot be read as .*; it may be dam") as e:
        VOCPart(root, image_size=8)
    assert "\n" not in str(e.value)
    other = read_struct(path.with_name("2008_000002.mat"), "anno")
    assert getattr(other.objects, "class") == "cat"


def test_one_wrong_bit_anywhere_ends_nothing_else(root):
    path = root / "Annotations_Part" / f"{NAME}.mat"
    whole, draw = path.read_bytes(), random.Random(0)
    outcomes = set()
    for _ in range(40):  # in the structures: most bits are of masks
        path.write_bytes(whole)
        _flipped(root, draw.randrange(128, 800), draw.randrange(8))
        try:
            read_struct(path, "anno")
            outcomes.add("read")
        except ValueError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_a_file_that_ends_the_reader_says_how(root, monkeypatch):
    fatal = (
        "import os, signal, sys; sys.stdout.buffer.write(bytes(8)); sys.stdout.flush();"
        " sys.stdin.readline(); os.kill(os.getpid(), signal.SIGSEGV)"
    )
    monkeypatch.setattr(matlab, "_reader", None)
    monkeypatch.setattr(matlab, "_START", fatal)
    with pytest.raises(DamagedFileError, match="it ends the process that reads it, with SIGSEGV"):
        VOCPart(root, image_size=8)


def test_a_reader_that_was_killed_between_two_files_is_started_anew(root):
    path = root / "Annotations_Part" / f"{NAME}.mat"
    read_struct(path, "anno")
    first = matlab._reader
    assert matlab._reader is first
    os.kill(first._process.pid, signal.SIGKILL)
    first._process.wait()
    read_struct(path, "anno")
    assert matlab._reader is not first


def test_one_reader_serves_many_files(root):
    read_struct(root / "Annotations_Part" / f"{NAME}.mat", "anno")
    first = matlab._reader
    for _ in range(3):
        assert len(VOCPart(root, image_size=8)) > 0
    assert matlab._reader is first


def test_an_interrupted_answer_is_not_taken_for_the_next(root, monkeypatch):
    path = root / "Annotations_Part" / f"{NAME}.mat"
    read_struct(path, "anno")

    def interrupted(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(matlab._Reader, "_message", interrupted)
        with pytest.raises(KeyboardInterrupt):
            read_struct(path, "no such variable")
    assert read_struct(path, "anno").imname == NAME


def test_a_reader_that_does_not_start_is_no_damage(root, monkeypatch):
    monkeypatch.setattr(matlab, "_reader", None)
    monkeypatch.setattr(matlab, "_START", "raise SystemExit(7)")
    with pytest.raises(ImportError, match=r"does not start \(status 7\)"):
        VOCPart(root, image_size=8)


def test_values_are_those_of_the_file(tmp_path):
    numbers = np.arange(6, dtype=np.int16).reshape(2, 3)
    rows = structs([("one", numbers, 1.5), ("two", np.zeros((0, 0)), True)], ["a", "b", "c"])
    savemat(tmp_path / "x.mat", {"x": rows, "alone": {"a": "word"}})
    first, second = read_struct(tmp_path / "x.mat", "x")
    assert (first.a, float(first.c), bool(second.c)) == ("one", 1.5, True)
    assert first.b.dtype == np.int16
    assert np.array_equal(first.b, numbers)
    assert second.b.size == 0
    assert read_struct(tmp_path / "x.mat", "alone").a == "word"
    with pytest.raises(ValueError, match="'y'"):
        read_struct(tmp_path / "x.mat", "y")


def test_a_list_of_structures_of_the_newest_version_is_a_structure_of_lists(tmp_path):
    save_v73(tmp_path / "x.mat", "truth", [{"place": np.array([[1.0], [2.0]])}, {"place": []}])
    found = read_struct(tmp_path / "x.mat", "truth").place.ravel()
    assert found[0].ravel().tolist() == [1, 2]
    assert found[1].size == 0


def test_what_a_reader_answers_is_never_an_object(monkeypatch, root):
    path = root / "Annotations_Part" / f"{NAME}.mat"
    answer = b'{"dtype": "|O", "shape": [1], "start": 0}\n' + bytes(8)
    monkeypatch.setattr(matlab._Reader, "ask", lambda self, path, name: answer)
    with pytest.raises(ValueError, match="answers with values of type object"):
        read_struct(path, "anno")


def test_a_loader_process_has_a_reader_of_its_own(root):
    data = VOCPart(root, image_size=8)
    first = matlab._reader
    shown = [sample.object_mask for sample in torch.utils.data.DataLoader(data, num_workers=1)]
    assert [mask[0].tolist() for mask in shown] == [s.object_mask.tolist() for s in data]
    assert matlab._reader is first
