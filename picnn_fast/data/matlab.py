"""Structures of MATLAB files, read by a process that a damaged file may kill.

The libraries that read these files trust them: one wrong bit may end the process or take all
memory. So one process beside this one reads them all, within bounds, and is started anew where a
file has ended it.
"""

import atexit
import json
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from picnn_fast._extras import extra
from picnn_fast.data import matlab_reader
from picnn_fast.data.matlab_reader import KINDS, is_hdf5

# What this process can import the other can too, after what comes with Python.
_START = (
    "import runpy, sys; sys.path += sys.argv[2:]; runpy.run_path(sys.argv[1], run_name='__main__')"
)


class _Reader:
    """The process that reads, and what is said to it."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START, matlab_reader.__file__, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pipesize=2**20,  # else an answer of some MB passes in many small pieces
            # Threads of a library that is not used for what they are for take address space.
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        )
        try:
            self._message()
        except EOFError as error:
            status = self._process.wait()
            raise ImportError(
                f"the process that reads MATLAB files does not start (status {status})"
            ) from error

    @property
    def usable(self) -> bool:
        """Whether it was started by this very process, and is alive."""
        return self.owner == os.getpid() and self._process.poll() is None

    def ask(self, path: Path, name: str) -> bytes:
        """The answer to a request.

        Raises:
            ValueError: the reader has ended.
        """
        assert self._process.stdin is not None
        request = json.dumps({"path": os.path.abspath(path), "name": name}) + "\n"
        try:
            self._process.stdin.write(request.encode())
            self._process.stdin.flush()
            return self._message()
        except (BrokenPipeError, EOFError) as error:
            status = self._process.wait()
            how = signal.Signals(-status).name if status < 0 else f"status {status}"
            raise ValueError(f"it ends the process that reads it, with {how}") from error

    def _message(self) -> bytes:
        return self._take(int.from_bytes(self._take(8), "little"))

    def _take(self, size: int) -> bytes:
        assert self._process.stdout is not None
        taken = self._process.stdout.read(size)
        if len(taken) < size:
            raise EOFError
        return taken

    def end(self) -> None:
        if self.owner == os.getpid():
            self._process.kill()
            self._process.communicate()


_reader: _Reader | None = None
_lock = threading.Lock()


def read_struct(path: Path, name: str) -> Any:
    """A variable of a MATLAB file; fields of structures are attributes.

    Files of version 7.3 hold a list of structures as a structure of lists.

    Args:
        path: of the file, of any version from 5 to 7.3.
        name: of the variable.

    Raises:
        ImportError: the library that reads this version is not installed.
        ValueError: the file cannot be read, and why.
    """
    global _reader
    with extra("train"):
        if is_hdf5(path):
            import h5py  # noqa: F401
        else:
            import scipy  # noqa: F401
    with _lock:
        if _reader is None or not _reader.usable:
            _reader = _Reader()
        try:
            answer = _reader.ask(path, name)
        except BaseException:  # whatever it was about to answer is no answer to what comes next
            _end()
            raise
    line, _, arrays = answer.partition(b"\n")
    tree = json.loads(line)
    if "error" in tree:
        raise ValueError(tree["error"])
    return _value(tree, arrays)


@atexit.register
def _end() -> None:
    global _reader
    if _reader is not None:
        _reader.end()
        _reader = None


def _value(tree: dict[str, Any], arrays: bytes) -> Any:
    if "fields" in tree:
        fields = {name: _value(field, arrays) for name, field in tree["fields"].items()}
        return SimpleNamespace(**fields)
    if "items" in tree:
        found = np.empty(len(tree["items"]), object)
        for place, item in enumerate(tree["items"]):
            found[place] = _value(item, arrays)
        return found.reshape(tree["shape"])
    if "text" in tree:
        return tree["text"]
    dtype, count = np.dtype(tree["dtype"]), math.prod(tree["shape"])
    if dtype.kind not in KINDS:
        raise ValueError(f"its reader answers with values of type {dtype}")
    if count * dtype.itemsize == 0:
        return np.zeros(tree["shape"], dtype)
    found = np.frombuffer(arrays, dtype, count, tree["start"])
    return found.reshape(tree["shape"], order=tree["order"])
