import contextlib
import errno
import importlib.metadata
import importlib.util
import json
import os
import sys
import time

import pytest

from picnn_fast.training import run_folder
from picnn_fast.training.run_folder import (
    RunFolder,
    RunFolderError,
    replacing,
    write_atomically,
    write_json,
)
from tests.processes import start
from tests.training.kill import hold


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


def test_of_many_differences_five_are_shown_and_the_others_counted(tmp_path):
    then, now = ({f"o{i}": value for i in range(9)} for value in (0, 1))
    _write(_folder(tmp_path, **then))
    shown = "; ".join(f"o{i} 0, now 1" for i in range(5))
    with pytest.raises(RunFolderError, match=f"other options: {shown}; and 4 more. Replace"):
        _folder(tmp_path, **now).complete()
    few = {f"o{i}": int(i < 5) for i in range(9)}
    with pytest.raises(RunFolderError, match=f"other options: {shown}. Replace"):
        _folder(tmp_path, **few).complete()


def _read(config):
    """Of two options, one new; an older run may have had a third."""
    if "old" in config:
        raise ValueError("old: there is no such option")
    return {"new": "default", **config}


@pytest.mark.parametrize("complete", [True, False])
def test_an_option_that_is_new_had_its_default(tmp_path, complete):
    before = _folder(tmp_path)
    _write(before) if complete else _fail(before, "last.ckpt")
    for value in ("default", "other"):
        today = RunFolder(tmp_path / "run", "train", {"seed": 0, "new": value}, read=_read)
        if value == "other":
            with pytest.raises(RunFolderError, match=r"options: new 'default', now 'other'\. Rep"):
                today.complete() if complete else today.writing().__enter__()
        elif complete:
            assert today.complete()
        else:
            assert _fail(today) is not None
            assert (today.work / "last.ckpt").exists()


@pytest.mark.parametrize("complete", [True, False])
def test_a_run_with_options_of_an_earlier_version_is_told_in_a_line(tmp_path, complete):
    before = _folder(tmp_path, old=1, **{f"o{i}": i for i in range(40)})
    _write(before) if complete else _fail(before, "last.ckpt")
    today = RunFolder(tmp_path / "run", "train", {"seed": 0, "new": "default"}, read=_read)
    with pytest.raises(
        RunFolderError, match=r"made by an earlier picnn_fast.*--overwrite"
    ) as caught:
        today.complete() if complete else today.writing().__enter__()
    assert "o1" not in str(caught.value)
    assert today.earlier() is None
    _write(today, "new", overwrite=True)
    assert today.complete()


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
    process = start(hold, (str(folder.path),), tmp_path, "hold")
    try:
        deadline = time.monotonic() + 300
        while not (folder.work / "half.txt").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        process.kill()
        process.join()
    assert not folder.path.exists()
    with folder.writing() as work:
        assert (work / "half.txt").exists()
    assert folder.complete()


def test_a_lock_that_a_process_of_another_machine_left_holds_nobody_up(tmp_path):
    folder = _folder(tmp_path)
    folder.work.mkdir()
    (folder.work / ".lock").write_text("1\nanother-machine\n")
    _write(folder)
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
    made = record["provenance"]
    assert made["command"]
    assert made["versions"]["torch"] == importlib.metadata.version("torch")
    assert made["hardware"]["cores"] >= 1
    assert made["started"] <= made["finished"]


def test_a_run_that_goes_on_was_started_when_it_first_was(tmp_path, monkeypatch):
    folder = _folder(tmp_path)
    monkeypatch.setattr(run_folder, "provenance", lambda: {"started": "first"})
    _fail(folder, "last.ckpt")
    monkeypatch.setattr(run_folder, "provenance", lambda: {"started": "second"})
    with folder.writing():
        pass
    record = json.loads((folder.path / "run.json").read_text())
    assert record["provenance"]["started"] == "first"
    assert "finished" in record["provenance"]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_followed_and_stays_one(tmp_path, there):
    target, link = tmp_path / "disk" / "space", tmp_path / "run"
    target.parent.mkdir()
    if there:
        target.mkdir()
    link.symlink_to(target)
    folder = _folder(tmp_path)
    _write(folder, "old")
    _write(folder, "new", overwrite=True)
    assert link.is_symlink()
    assert (target / "result.txt").read_text() == "new"
    assert _folder(tmp_path).complete()
    assert [p.name for p in target.parent.iterdir()] == ["space"]


def test_a_link_that_leads_to_itself_is_refused(tmp_path):
    (tmp_path / "run").symlink_to("run")
    with pytest.raises(RunFolderError, match=r"^output: got .*run', want a folder"):
        _folder(tmp_path)


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EXDEV, errno.EPERM])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_cannot_give_way_is_refused_before_the_run(
    tmp_path, monkeypatch, number, overwrite
):
    folder = _folder(tmp_path)
    if overwrite:
        _write(folder)
    else:
        folder.path.mkdir()

    def fixed(source, target):
        raise OSError(number, os.strerror(number), str(source), None, str(target))

    monkeypatch.setattr(run_folder.os, "rename", fixed)
    with pytest.raises(RunFolderError, match=r"run.* cannot be replaced .*; choose a folder in it"):
        folder.writing(overwrite=overwrite).__enter__()
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_the_folder_one_is_in_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    _write(RunFolder(".", "train", {}))
    assert (tmp_path / "run" / "result.txt").read_text() == "done"


def test_files_that_come_meanwhile_are_not_lost_and_nor_is_the_run(tmp_path):
    folder = _folder(tmp_path)
    writing = folder.writing()
    (writing.__enter__() / "result.txt").write_text("done")
    folder.path.mkdir()
    (folder.path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunFolderError, match=r"not there when .* in .*partial"):
        writing.__exit__(None, None, None)
    assert (folder.path / "thesis.tex").exists()
    assert (folder.work / "result.txt").read_text() == "done"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("saved", [None, "last.ckpt", "std/last.ckpt"])
def test_a_full_disk_is_told_with_the_last_checkpoint(tmp_path, number, saved):
    folder = _folder(tmp_path)
    kept = "there is no checkpoint yet" if saved is None else rf"the last checkpoint is .*{saved}"
    writing = folder.writing()
    work = writing.__enter__()
    if saved is not None:
        (work / saved).parent.mkdir(exist_ok=True)
        (work / saved).touch()
    full = OSError(number, os.strerror(number))
    with pytest.raises(RunFolderError, match=rf"^output: no space left in .*; {kept}\.") as caught:
        writing.__exit__(OSError, full, None)
    assert "\n" not in str(caught.value)


def test_an_error_of_another_kind_stays_what_it_is(tmp_path):
    with pytest.raises(PermissionError), _folder(tmp_path).writing():
        raise PermissionError(errno.EACCES, "Permission denied")


def test_folders_are_locked_where_there_is_no_fcntl(monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    spec = importlib.util.spec_from_file_location("elsewhere", run_folder.__file__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_a_planted_link_in_place_of_the_lock_is_not_followed(tmp_path):
    folder, victim = _folder(tmp_path), tmp_path / "thesis.tex"
    victim.write_text("years of work")
    folder.work.mkdir()
    (folder.work / ".lock").symlink_to(victim)
    with pytest.raises(RunFolderError, match=r"^output: .*run cannot be used: .*\.lock"):
        folder.writing().__enter__()
    assert victim.read_text() == "years of work"


@pytest.mark.parametrize("name", [".run.partial", ".run.replaced"])
@pytest.mark.parametrize("planted", ["link", "file", "another user's"])
def test_a_folder_that_another_may_have_planted_is_refused(tmp_path, monkeypatch, name, planted):
    place, elsewhere = tmp_path / name, tmp_path / "elsewhere"
    elsewhere.mkdir()
    if planted == "link":
        place.symlink_to(elsewhere)
    elif planted == "file":
        place.touch()
    else:
        place.mkdir()
        if name == ".run.partial":
            write_json(place / "run.json", {"program": "picnn_fast"})
        mine = os.stat_result([0] * 4 + [place.stat().st_uid + 1] + [0] * 5)
        original = os.fstat
        monkeypatch.setattr(
            run_folder.os, "fstat", lambda fd: mine if original(fd).st_nlink == 0 else original(fd)
        )
        (place / "thesis.tex").write_text("years of work")
    with pytest.raises(RunFolderError, match=rf"{name} is (another user's|no folder)"):
        _folder(tmp_path).writing().__enter__()
    assert list(elsewhere.iterdir()) == []
    assert planted != "another user's" or (place / "thesis.tex").exists()


def test_what_a_kill_left_while_saving_is_swept_by_the_next_start(tmp_path):
    folder = _folder(tmp_path)
    _fail(folder, "last.ckpt")
    (folder.work / "csv").mkdir()
    saving = [replacing(folder.work / name) for name in ("last.ckpt", "csv/metrics.csv")]
    for file in saving:
        file.__enter__()
    left = {p.name for p in folder.work.rglob(".*")} - {".lock"}
    assert len(left) == 2
    with folder.writing() as work:
        assert [p.name for p in work.rglob(".*")] == [".lock"]
        saving.append(replacing(work / "metrics.json"))  # and by the end
        saving[-1].__enter__()
    assert {p.name for p in folder.path.rglob("*")} == {"last.ckpt", "csv", "run.json"}


def test_a_kill_while_a_run_is_replaced_loses_neither(tmp_path, monkeypatch):
    folder = _folder(tmp_path)
    _write(folder, "old")
    rename = os.rename

    def killed(source, target):
        if str(source) == str(folder.work):
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(run_folder.os, "rename", killed)
        _write(folder, "new", overwrite=True)
    assert not folder.path.exists()
    with folder.writing(overwrite=True) as work:
        assert (folder.path / "result.txt").read_text() == "old"
        assert (work / "result.txt").read_text() == "new"
    assert (folder.path / "result.txt").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_what_is_left_of_a_replaced_run_goes_with_the_next_look(tmp_path):
    folder = _folder(tmp_path)
    _write(folder)
    (tmp_path / ".run.replaced").mkdir()
    (tmp_path / ".run.replaced" / "half.txt").touch()
    assert folder.complete()
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
def test_files_are_readable_for_whom_the_umask_says(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_atomically(tmp_path / "metrics.json", "{}")
    finally:
        os.umask(before)
    assert (tmp_path / "metrics.json").stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize("key", ["kind", "config", "overwrite"])
@pytest.mark.parametrize("value", [None, 3])
def test_a_record_without_its_keys_is_told_in_a_line(tmp_path, key, value):
    folder = _folder(tmp_path)
    _write(folder)
    for place in (folder.path, folder.work):
        record = json.loads((place / "run.json").read_text())
        record[key] = value
        if value is None:
            del record[key]
        write_json(place / "run.json", record)
        with pytest.raises(RunFolderError, match=rf"run.json is damaged, it tells no {key};") as e:
            folder.writing().__enter__()
        assert "\n" not in str(e.value)
        write_json(place / "run.json", {**record, key: "train"})
        place.rename(folder.work)  # complete, then interrupted


def _longer(tmp_path, epochs, **config):
    config = {"epochs": epochs, "data": {"root": "a", "num_workers": 0}, **config}
    return RunFolder(
        tmp_path / "run", "train", config, free=["data.num_workers"], growing=["epochs"]
    )


def _complete(tmp_path, epochs):
    with _longer(tmp_path, epochs).writing() as work:
        (work / "csv").mkdir()
        for name in ("last.ckpt", "csv/metrics.csv", "metrics.json"):
            (work / name).write_text(f"of {epochs}")


def test_a_longer_run_goes_on_in_a_copy_of_the_shorter_one(tmp_path):
    _complete(tmp_path, 3)
    longer = _longer(tmp_path, 5)
    assert not longer.complete()
    assert longer.earlier()["epochs"] == 3
    for _ in range(2):  # also after an interruption
        with contextlib.suppress(KeyboardInterrupt), longer.writing() as work:
            assert (work / "last.ckpt").read_text() == "of 3"
            assert (work / "csv" / "metrics.csv").read_text() == "of 3"
            assert _longer(tmp_path, 3).complete()
            raise KeyboardInterrupt
    with longer.writing() as work:
        (work / "last.ckpt").write_text("of 5")
    assert longer.complete()
    assert longer.earlier() is None
    assert (longer.path / "last.ckpt").read_text() == "of 5"
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    with pytest.raises(RunFolderError, match="epochs 5, now 3"):
        _longer(tmp_path, 3).complete()


def test_a_run_that_had_no_checkpoint_yet_is_nothing_to_go_on_with(tmp_path):
    _fail(_longer(tmp_path, 3))
    assert _longer(tmp_path, 5).earlier() is None
    _complete(tmp_path, 3)
    _fail(_longer(tmp_path, 5), overwrite=True)
    with _longer(tmp_path, 5).writing() as work:
        assert (work / "last.ckpt").read_text() == "of 3"


def test_a_kill_before_the_shorter_run_is_copied_loses_nothing_of_it(tmp_path, monkeypatch):
    _complete(tmp_path, 3)

    def killed(source, target):
        target.write(source.read()[:2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(run_folder.shutil, "copyfileobj", killed)
        _longer(tmp_path, 5).writing().__enter__()
    with _longer(tmp_path, 5).writing() as work:
        assert (work / "last.ckpt").read_text() == "of 3"
        assert (work / "metrics.json").read_text() == "of 3"


def test_an_interrupted_run_takes_more_epochs_too_and_keeps_them(tmp_path):
    _fail(_longer(tmp_path, 3), "last.ckpt")
    _fail(_longer(tmp_path, 5), "second.txt")
    assert _longer(tmp_path, 7).earlier()["epochs"] == 5
    with pytest.raises(RunFolderError, match=r"an interrupted run .*epochs 5, now 3"):
        _longer(tmp_path, 3).writing().__enter__()


def test_options_that_change_nothing_may_differ(tmp_path):
    _complete(tmp_path, 3)
    assert _longer(tmp_path, 3, data={"root": "a", "num_workers": 4}).complete()
    with pytest.raises(RunFolderError, match=r"data.root 'a', now 'b'\."):
        _longer(tmp_path, 3, data={"root": "b", "num_workers": 4}).complete()
