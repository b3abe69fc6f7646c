import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from picnn_fast.training import run_folder
from picnn_fast.training.run_folder import RunFolder, RunFolderError, write_atomically


def _folder(tmp_path, **config):
    return RunFolder(tmp_path / "run", "train", {"seed": 0, **config})


def _write(folder, text="done", **options):
    with folder.writing(**options) as work:
        (work / "result.txt").write_text(text)


def _fail(folder, name="half.txt", **options):
    """A run that breaks off; the files it found when it began."""
    found = None
    with contextlib.suppress(KeyboardInterrupt), folder.writing(**options) as work:
        found = {path.name for path in work.iterdir() if path.suffix == ".txt"}
        (work / name).write_text("half")
        raise KeyboardInterrupt
    return found


def test_appears_only_when_complete(tmp_path):
    folder = _folder(tmp_path)
    with folder.writing() as work:
        (work / "result.txt").write_text("done")
        assert not folder.path.exists()
    assert folder.complete()
    assert (folder.path / "result.txt").read_text() == "done"
    assert not folder.work.exists()


def test_interrupted_run_goes_on_with_what_it_had(tmp_path):
    folder = _folder(tmp_path)
    _fail(folder)
    assert not folder.path.exists()
    with folder.writing() as work:
        assert (work / "half.txt").read_text() == "half"
    assert folder.complete()


def test_interrupted_run_with_other_options_is_refused_with_the_difference(tmp_path):
    _fail(_folder(tmp_path, epochs=3), "last.ckpt")
    other = _folder(tmp_path, epochs=5)
    with pytest.raises(RunFolderError, match=r"epochs 3, now 5.*--overwrite.*--output"):
        other.writing().__enter__()
    assert (other.work / "last.ckpt").exists()


def test_what_broke_off_before_a_checkpoint_does_not_block_other_options(tmp_path):
    _fail(_folder(tmp_path, epochs=3))
    other = _folder(tmp_path, epochs=5)
    assert _fail(other) == set()
    _write(other)
    assert other.complete()


def test_folders_that_cannot_be_made_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=r"^output: .* cannot be used: Not a directory"):
        RunFolder(tmp_path / "file" / "run", "train", {}).writing().__enter__()
    with pytest.raises(RunFolderError, match=r"^output: got '/'"):
        RunFolder("/", "train", {})
    with pytest.raises(RunFolderError, match="output: got '', want a folder"):
        RunFolder("", "train", {})


def test_complete_run_with_other_options_is_refused_with_the_difference(tmp_path):
    _write(_folder(tmp_path, lr=0.1))
    with pytest.raises(RunFolderError, match=r"lr 0\.1, now 0\.2.*--overwrite.*--output"):
        _folder(tmp_path, lr=0.2).complete()
    with pytest.raises(RunFolderError, match="a train run, not a demo run"):
        RunFolder(tmp_path / "run", "demo", {}).complete()


def test_overwrite_keeps_the_old_run_until_the_new_one_is_complete(tmp_path):
    _write(_folder(tmp_path, lr=1), "old")
    new = _folder(tmp_path, lr=2)
    _fail(new, overwrite=True)
    assert (new.path / "result.txt").read_text() == "old"
    _write(new, "new", overwrite=True)
    assert (new.path / "result.txt").read_text() == "new"
    assert new.complete()
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_overwrite_starts_anew_but_its_own_interrupted_run_goes_on(tmp_path):
    folder = _folder(tmp_path)
    _fail(folder)
    assert _fail(folder, "second.txt", overwrite=True) == set()
    assert _fail(folder, "third.txt", overwrite=True) == {"second.txt"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_someone_else_is_never_touched(tmp_path, overwrite):
    folder = _folder(tmp_path)
    folder.path.mkdir()
    (folder.path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunFolderError, match="not made by picnn-fast"):
        _write(folder, overwrite=overwrite)
    assert (folder.path / "thesis.tex").read_text() == "years of work"


def test_an_empty_folder_is_taken(tmp_path):
    folder = _folder(tmp_path)
    folder.path.mkdir()
    _write(folder)
    assert folder.complete()


def test_two_processes_do_not_share_a_folder(tmp_path):
    with (
        _folder(tmp_path).writing(),
        pytest.raises(RunFolderError, match="another process"),
    ):
        _folder(tmp_path).writing().__enter__()


def test_killed_process_lets_go_of_the_folder(tmp_path):
    folder = _folder(tmp_path)
    code = (
        "import sys, time; from picnn_fast.training.run_folder import RunFolder\n"
        "with RunFolder(sys.argv[1], 'train', {'seed': 0}).writing() as work:\n"
        "    (work / 'half.txt').write_text('half'); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(folder.path)])
    try:
        deadline = time.monotonic() + 300
        while not (folder.work / "half.txt").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not folder.path.exists()
    with folder.writing() as work:
        assert (work / "half.txt").exists()
    assert folder.complete()


def test_file_is_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    write_atomically(path, "old")

    def full_disk(handle):
        raise OSError("no space left")

    monkeypatch.setattr(run_folder.os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["metrics.json"]


def test_record_tells_what_made_the_run(tmp_path):
    folder = _folder(tmp_path, epochs=2)
    _write(folder)
    record = json.loads((folder.path / "run.json").read_text())
    assert record["config"] == {"seed": 0, "epochs": 2}
    assert record["kind"] == "train"
