"""A folder for a run's results that appears under its name only when it is complete.

Everything is written into a hidden sibling, ``runs/.demo.partial`` for ``runs/demo``, which is
renamed at the end. A run that was interrupted leaves the sibling behind, and goes on in it.
"""

import contextlib
import errno
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from picnn_fast import checks
from picnn_fast._extras import extra
from picnn_fast._files import TEMPORARY, replacing, write_atomically
from picnn_fast._version import __version__
from picnn_fast.training.provenance import now, provenance

with extra("train"):
    from filelock import BaseFileLock, FileLock, Timeout

RECORD = "run.json"  # also what it was made with, see provenance
_LOCK = ".lock"
_KEYS: dict[str, type] = {"kind": str, "config": dict, "overwrite": bool, "goes_on": bool}
_MOST_SHOWN = 5  # options that differ
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class RunFolderError(RuntimeError):
    """The output folder cannot be used as asked; the message says why and what to do."""


def write_json(path: Path, content: Any) -> None:
    """``content`` as indented JSON, written atomically."""
    write_atomically(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_record(folder: Path) -> dict[str, Any]:
    """What a run noted about itself in its folder; empty where there is no such note."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


class RunFolder:
    """The folder of one run.

    A link is followed: the run appears where it leads to.

    Args:
        path: where the complete run appears.
        kind: command that makes it, e.g. "train".
        config: its options, JSON values; equal options mean the same run.
        free: options of which another value makes no other run, nested ones as "data.num_workers".
        growing: numbers of which a larger value goes on with the run that had the smaller one, and
            mappings that go on with a run that had fewer members.
        read: what a run noted as its config to what it is today, with the defaults of options that
            are new; a TypeError or ValueError where it cannot be said.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "run"
        >>> folder = RunFolder(path, "train", {"seed": 0})
        >>> with folder.writing() as work:
        ...     _ = (work / "result.txt").write_text("done")
        ...     path.exists()
        False
        >>> folder.complete(), (path / "result.txt").read_text()
        (True, 'done')
    """

    def __init__(
        self,
        path: str | Path,
        kind: str,
        config: dict[str, Any],
        *,
        free: Collection[str] = (),
        growing: Collection[str] = (),
        read: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    ) -> None:
        # Resolved, so that names such as "." and "runs/../x" have a name and a parent, and the
        # run is moved to where a link leads, not over the link.
        self.path = Path(os.path.realpath(path))
        if not str(path) or not self.path.name or self.path.is_symlink():
            raise RunFolderError(f"output: got {str(path)!r}, want a folder that can be made")
        self.work = self.path.with_name(f".{self.path.name}.partial")
        self._replaced = self.path.with_name(f".{self.path.name}.replaced")
        self.kind = kind
        self.config = config
        self.free = free
        self.growing = growing
        self.read = read

    def complete(self) -> bool:
        """Whether the run is there, complete, with these very options.

        Raises:
            RunFolderError: the folder holds something else.
        """
        if not self._occupied():
            return False
        record = self._record(self.path)
        if record is None:
            raise RunFolderError(
                f"output: {self.path} exists and was not made by picnn-fast;"
                " choose another folder with --output"
            )
        self._same(record, self.path)
        if self._grown(record):
            return False
        # What a kill has left of the run that this one replaced.
        shutil.rmtree(self._replaced, ignore_errors=True)
        return True

    def earlier(self) -> dict[str, Any] | None:
        """The options of the smaller run that this one goes on with, None where there is none."""
        for folder in (self.work, self.path) if self._trained() else (self.path,):
            record = self._record(folder)
            if record is not None and not self._differing(record):
                config: dict[str, Any] = record["config"]
                return config if self._grown(record) else None
        return None

    def goes_on(self, *, overwrite: bool = False) -> bool:
        """Whether the work folder that ``writing`` will hand out holds a checkpoint."""
        record = self._record(self.work)
        if record is not None and self._kept(record, overwrite):
            return self._trained()
        return not overwrite and self.earlier() is not None and any(self.path.rglob("*.ckpt"))

    @contextlib.contextmanager
    def writing(self, *, overwrite: bool = False) -> Iterator[Path]:
        """The work folder, renamed to ``path`` when the block ends without an exception.

        A work folder left behind by the same run is handed out again with what it holds; one of
        another run is emptied if that run had written no checkpoint (``*.ckpt``) yet. Where this
        run goes on with a complete one, it holds a copy of that one.

        Args:
            overwrite: start anew, and replace what is at ``path`` once the new run is complete.
                A run started so and interrupted goes on like any other.

        Raises:
            TypeError: ``overwrite`` is no bool.
            RunFolderError: another run is complete or partial here, or is writing right now; the
                folder is not one of picnn-fast's, is another user's or cannot be replaced at the
                end; or no space is left in it.
        """
        if checks.boolean("overwrite", overwrite):
            if self._occupied() and self._record(self.path) is None:
                raise RunFolderError(
                    f"output: {self.path} was not made by picnn-fast and is not overwritten;"
                    " choose another folder with --output"
                )
        elif self.complete():
            raise RunFolderError(f"output: {self.path} is complete; redo it with --overwrite")
        try:
            self.work.mkdir(parents=True)
        except FileExistsError:
            self._check_owner(self.work)
        except OSError as error:
            raise self._unusable(error) from error
        with self._locked() as lock:
            try:
                self._restore()
                self._check_replaceable()
                self._prepare(overwrite)
                yield self.work
                lock.release()  # a folder that holds an open file is not renamed everywhere
                self._finish()
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                raise self._full(error) from error

    def _occupied(self) -> bool:
        try:
            return self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir()))
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: OSError) -> RunFolderError:
        return RunFolderError(
            f"output: {self.path} cannot be used: {error.strerror} ({error.filename});"
            " choose another folder with --output"
        )

    def _full(self, error: OSError) -> RunFolderError:
        saved = max(self.work.rglob("*.ckpt"), key=lambda p: p.stat().st_mtime, default=None)
        kept = "there is no checkpoint yet" if saved is None else f"the last checkpoint is {saved}"
        return RunFolderError(
            f"output: no space left in {self.work} ({error.strerror}); {kept}. The same command"
            " goes on once there is space"
        )

    def _check_owner(self, folder: Path) -> None:
        """In a folder that many may write to, another user may have put this one there."""
        found = folder.lstat()
        # Some file systems give every file to one user, whoever makes it.
        with tempfile.TemporaryFile(dir=folder.parent) as ours:
            owner = os.fstat(ours.fileno()).st_uid
        if stat.S_ISDIR(found.st_mode) and found.st_uid == owner:
            return
        problem = "another user's" if stat.S_ISDIR(found.st_mode) else "no folder"
        raise RunFolderError(
            f"output: {folder} is {problem}; remove it, or choose another folder with --output"
        )

    def _check_replaceable(self) -> None:
        """A folder that is there already has to give way at the end: a mount point does not."""
        if not self.path.exists() or os.name == "nt":
            return
        try:
            os.rename(self.path, self.work)  # which is not empty, so that this never succeeds
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                return
            mounted = ", a mount point" if error.errno in (errno.EBUSY, errno.EXDEV) else ""
            raise RunFolderError(
                f"output: {self.path}{mounted}, cannot be replaced by a finished run"
                f" ({error.strerror}); choose a folder in it with --output"
            ) from error

    def _record(self, folder: Path) -> dict[str, Any] | None:
        """What a run noted about itself, None where there is no such note."""
        record = read_record(folder)
        if record.get("program") != "picnn_fast":
            return None
        record = {"goes_on": False, **record}  # earlier versions had no such key
        damaged = [key for key, kind in _KEYS.items() if not isinstance(record.get(key), kind)]
        if damaged:
            raise RunFolderError(
                f"output: {folder / RECORD} is damaged, it tells no {' and no '.join(damaged)};"
                f" remove {folder}, or choose another folder with --output"
            )
        with contextlib.suppress(TypeError, ValueError):
            return {**record, "config": self.read(record["config"]), "known": True}
        return {**record, "known": False}

    def _differing(self, record: dict[str, Any]) -> list[str]:
        if record["kind"] != self.kind:
            return [f"a {record['kind']} run, not a {self.kind} run"]
        if not record["known"]:
            return ["it was made by an earlier picnn_fast, whose options were others"]
        then, now = flat_options(record["config"]), flat_options(self.config)
        grown = self._grown(record)
        return [
            f"{key} {then.get(key)!r}, now {now.get(key)!r}"
            for key in sorted(then.keys() | now.keys())
            if then.get(key) != now.get(key) and key not in self.free and key not in grown
        ]

    def _grown(self, record: dict[str, Any]) -> list[str]:
        """The numbers that are larger than those of a run, and the options of new members."""
        then, now = flat_options(record["config"]), flat_options(self.config)
        members = tuple(f"{key}." for key in self.growing)
        numbers = [
            key
            for key in self.growing
            if isinstance(then.get(key), int | float) and then[key] < now[key]
        ]
        return numbers + [key for key in now if key.startswith(members) and key not in then]

    def _same(self, record: dict[str, Any], folder: Path) -> None:
        differing = self._differing(record)
        if differing:
            state = "an interrupted run" if folder == self.work else "a complete run"
            if len(differing) > _MOST_SHOWN:
                rest = len(differing) - _MOST_SHOWN
                differing = [*differing[:_MOST_SHOWN], f"and {rest} more"]
            raise RunFolderError(
                f"output: {folder} holds {state} with other options: {'; '.join(differing)}."
                " Replace it with --overwrite, or choose another folder with --output"
            )

    @contextlib.contextmanager
    def _locked(self) -> Iterator[BaseFileLock]:
        # The kernel lets go of the lock when the process dies, however it dies.
        lock = FileLock(self.work / _LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise RunFolderError(
                f"output: another process is writing {self.work}; wait for it,"
                " or choose another folder with --output"
            ) from error
        except OSError as error:  # a link, which is not followed
            raise self._unusable(error) from error
        try:
            yield lock
        finally:
            lock.release()
            with contextlib.suppress(OSError):
                if [entry.name for entry in self.work.iterdir()] == [_LOCK]:  # refused
                    (self.work / _LOCK).unlink()
                    self.work.rmdir()

    def _restore(self) -> None:
        """A kill while a run was replaced has left it under another name."""
        if not os.path.lexists(self._replaced):
            return
        self._check_owner(self._replaced)
        if self._occupied():
            shutil.rmtree(self._replaced)
        else:
            os.rename(self._replaced, self.path)

    def _prepare(self, overwrite: bool) -> None:
        self._sweep()
        record = self._record(self.work)
        if record is not None and not self._kept(record, overwrite):
            self._clear()
            record = None
        if record is not None:
            self._same(record, self.work)
            begun = {"provenance": record["provenance"]} if "provenance" in record else {}
            self._note(record["overwrite"], record["goes_on"], **begun)
            return
        if any(entry.name != _LOCK for entry in self.work.iterdir()) and not overwrite:
            raise RunFolderError(
                f"output: {self.work} holds files but no {RECORD}; remove it, or use --overwrite"
            )
        self._clear()
        goes_on = not overwrite and self.earlier() is not None
        self._note(overwrite, goes_on)
        if goes_on:
            self._copy_complete()

    def _sweep(self) -> None:
        """A kill while a file was written has left it under a name of its own."""
        for leftover in list(self.work.rglob(f".*{TEMPORARY}")):
            leftover.unlink()

    def _kept(self, record: dict[str, Any], overwrite: bool) -> bool:
        """Whether an interrupted run is more than something to clear away."""
        if overwrite:
            return bool(record["overwrite"]) and not self._differing(record)
        # What broke off before the first checkpoint is nothing to keep.
        other = self._differing(record) or record["goes_on"] or record["overwrite"]
        return self._trained() or not other

    def _note(self, overwrite: bool, goes_on: bool, **made: Any) -> None:
        write_json(
            self.work / RECORD,
            {
                "program": "picnn_fast",
                "version": __version__,
                "kind": self.kind,
                "overwrite": overwrite,
                "goes_on": goes_on,
                "config": self.config,
                **({"provenance": provenance()} | made),
            },
        )

    def _copy_complete(self) -> None:
        """The complete run to go on with, its checkpoints last: they tell that all was copied."""
        for entry in sorted(self.path.iterdir(), key=lambda entry: entry.suffix == ".ckpt"):
            target = self.work / entry.name
            if entry.is_dir():
                shutil.copytree(entry, target)
            elif entry.name != RECORD:
                with replacing(target) as file, entry.open("rb") as source:
                    shutil.copyfileobj(source, file)

    def _trained(self) -> bool:
        return any(self.work.rglob("*.ckpt"))

    def _clear(self) -> None:
        # The record goes first: without it nothing that is left is taken for a run.
        (self.work / RECORD).unlink(missing_ok=True)
        for entry in self.work.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != _LOCK:
                entry.unlink()

    def _finish(self) -> None:
        record = self._record(self.work)
        assert record is not None
        begun = record.get("provenance", {})
        self._note(record["overwrite"], record["goes_on"], provenance={**begun, "finished": now()})
        self._sweep()
        (self.work / _LOCK).unlink(missing_ok=True)
        occupied = self._occupied()
        if occupied and not (record["overwrite"] or record["goes_on"]):
            raise RunFolderError(
                f"output: {self.path} holds files that were not there when the run began; its"
                f" result is in {self.work}"
            )
        if occupied:
            os.rename(self.path, self._replaced)
        elif self.path.exists() and os.name == "nt":  # where nothing is renamed to what is there
            self.path.rmdir()
        os.rename(self.work, self.path)
        shutil.rmtree(self._replaced, ignore_errors=True)


def flat_options(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options by their whole names, as on the command line."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        nested = isinstance(value, dict)
        flat |= flat_options(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat
