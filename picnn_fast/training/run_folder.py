"""A folder for a run's results that appears under its name only when it is complete.

Everything is written into a hidden sibling, ``runs/.demo.partial`` for ``runs/demo``, which is
renamed at the end. A run that was interrupted leaves the sibling behind, and goes on in it.
"""

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from picnn_fast._version import __version__

RECORD = "run.json"
_LOCK = ".lock"


class RunFolderError(RuntimeError):
    """The output folder cannot be used as asked; the message says why and what to do."""


def write_atomically(path: Path, text: str) -> None:
    """Write a file that other processes, and a crash, see whole or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_json(path: Path, content: Any) -> None:
    """``content`` as indented JSON, written atomically."""
    write_atomically(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


class RunFolder:
    """The folder of one run.

    Args:
        path: where the complete run appears.
        kind: command that makes it, e.g. "train".
        config: its options, JSON values; equal options mean the same run.

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

    def __init__(self, path: str | Path, kind: str, config: dict[str, Any]) -> None:
        # Absolute, so that names such as "." and "runs/../x" have a name and a parent.
        self.path = Path(os.path.abspath(path))
        if not str(path) or not self.path.name:
            raise RunFolderError(f"output: got {str(path)!r}, want a folder that can be made")
        self.work = self.path.with_name(f".{self.path.name}.partial")
        self.kind = kind
        self.config = config

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
        return True

    @contextlib.contextmanager
    def writing(self, *, overwrite: bool = False) -> Iterator[Path]:
        """The work folder, renamed to ``path`` when the block ends without an exception.

        A work folder left behind by the same run is handed out again with what it holds; one of
        another run is emptied if that run had written no checkpoint (``*.ckpt``) yet.

        Args:
            overwrite: start anew, and replace what is at ``path`` once the new run is complete.
                A run started so and interrupted goes on like any other.

        Raises:
            RunFolderError: another run is complete or partial here, or is writing right now, or
                the folder is not one of picnn-fast's.
        """
        if overwrite:
            if self._occupied() and self._record(self.path) is None:
                raise RunFolderError(
                    f"output: {self.path} was not made by picnn-fast and is not overwritten;"
                    " choose another folder with --output"
                )
        elif self.complete():
            raise RunFolderError(f"output: {self.path} is complete; redo it with --overwrite")
        try:
            self.work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unusable(error) from error
        with self._locked():
            self._prepare(overwrite)
            yield self.work
            self._finish(overwrite)

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

    def _record(self, folder: Path) -> dict[str, Any] | None:
        """What a run noted about itself, None where there is no such note."""
        try:
            record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        known = isinstance(record, dict) and record.get("program") == "picnn_fast"
        return record if known else None

    def _differing(self, record: dict[str, Any]) -> list[str]:
        if record["kind"] != self.kind:
            return [f"a {record['kind']} run, not a {self.kind} run"]
        then, now = _flat(record["config"]), _flat(self.config)
        return [
            f"{key} {then.get(key)!r}, now {now.get(key)!r}"
            for key in sorted(then.keys() | now.keys())
            if then.get(key) != now.get(key)
        ]

    def _same(self, record: dict[str, Any], folder: Path) -> None:
        differing = self._differing(record)
        if differing:
            state = "an interrupted run" if folder == self.work else "a complete run"
            raise RunFolderError(
                f"output: {folder} holds {state} with other options: {'; '.join(differing)}."
                " Replace it with --overwrite, or choose another folder with --output"
            )

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        # The kernel lets go of the lock when the process dies, however it dies.
        with open(self.work / _LOCK, "w", encoding="utf-8") as file:
            self._lock(file)
            yield

    def _lock(self, file: IO[str]) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunFolderError(
                f"output: another process is writing {self.work}; wait for it,"
                " or choose another folder with --output"
            ) from error

    def _prepare(self, overwrite: bool) -> None:
        record = self._record(self.work)
        if record is not None and overwrite:
            begun_so = record["overwrite"] and record["kind"] == self.kind
            if not begun_so or record["config"] != self.config:
                self._clear()
                record = None
        # What broke off before the first checkpoint is nothing to keep.
        if record is not None and self._differing(record) and not self._trained():
            self._clear()
            record = None
        if record is not None:
            self._same(record, self.work)
            return
        if any(entry.name != _LOCK for entry in self.work.iterdir()) and not overwrite:
            raise RunFolderError(
                f"output: {self.work} holds files but no {RECORD}; remove it, or use --overwrite"
            )
        self._clear()
        write_json(
            self.work / RECORD,
            {
                "program": "picnn_fast",
                "version": __version__,
                "kind": self.kind,
                "overwrite": overwrite,
                "config": self.config,
            },
        )

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

    def _finish(self, overwrite: bool) -> None:
        (self.work / _LOCK).unlink(missing_ok=True)
        if overwrite and self._occupied():
            replaced = self.path.with_name(f".{self.path.name}.replaced")
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(self.path, replaced)
            os.rename(self.work, self.path)
            shutil.rmtree(replaced)
        else:
            os.rename(self.work, self.path)


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options by their whole names, as on the command line."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        nested = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat
