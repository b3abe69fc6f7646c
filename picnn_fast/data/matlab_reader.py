"""Reads MATLAB files in a process of its own, which damaged ones may kill; run as a script.

For each line of JSON on the standard input, ``{"path": …, "name": …}``, it writes one message to
the standard output: its length in 8 bytes, and a line of JSON that says where in the bytes after
it the arrays are. Nothing of it can do more than be wrong, whatever the file has made of this
process. An empty message comes first, once it is ready.
"""

import contextlib
import json
import sys
import time
from typing import Any, BinaryIO

import numpy as np

# Bounds on the reader; an annotation takes a few MB and some 10 ms.
MEMORY = 4 * 2**30  # bytes of address space
SECONDS = 60  # of work on one file
# Of an array: truth values, numbers, bytes and text.
KINDS = "biufcSU"


def _tree(value: Any, arrays: bytearray) -> Any:
    """What loadmat gives, as JSON that refers to ``arrays``."""
    if hasattr(value, "_fieldnames"):
        return {"fields": {name: _tree(getattr(value, name), arrays) for name in value._fieldnames}}
    if isinstance(value, np.ndarray) and value.dtype == object:
        return {"shape": value.shape, "items": [_tree(item, arrays) for item in value.flat]}
    if isinstance(value, str):
        return {"text": value}
    array = np.asarray(value)
    if array.dtype.kind not in KINDS:
        raise ValueError(f"it holds a value of type {type(value).__name__}")
    # As it lies in memory: MATLAB's arrays go down their columns.
    order = "F" if array.flags.fnc else "C"
    start = len(arrays)
    arrays += array.tobytes("A")
    return {"dtype": array.dtype.str, "shape": array.shape, "start": start, "order": order}


def _tree_hdf5(file: Any, item: Any, arrays: bytearray) -> Any:
    """The same of a file of MATLAB 7.3, where a list of structures is a structure of lists."""
    if not hasattr(item, "dtype"):
        return {"fields": {name: _tree_hdf5(file, item[name], arrays) for name in item}}
    # An empty array is written as its two sizes.
    value = np.zeros(0) if item.attrs.get("MATLAB_empty") else item[()]
    if value.dtype == object:
        items = [_tree_hdf5(file, file[reference], arrays) for reference in value.flat]
        return {"shape": value.shape, "items": items}
    return _tree(value, arrays)


def _read(path: str, name: str, arrays: bytearray) -> Any:
    if is_hdf5(path):
        import h5py

        with h5py.File(path, "r") as file:
            return _tree_hdf5(file, file[name], arrays)
    from scipy.io import loadmat

    return _tree(loadmat(path, squeeze_me=True, struct_as_record=False)[name], arrays)


def is_hdf5(path: Any) -> bool:
    """Of MATLAB 7.3: an HDF5 file behind a header of 512 bytes."""
    with open(path, "rb") as file:
        return file.read(520)[512:] == b"\x89HDF\r\n\x1a\n"


def _limit(name: str, value: int) -> None:
    """Bound what this process may take; on Windows there is no such thing."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        resource.setrlimit(kind, (value, hard))


def _serve(requests: BinaryIO, answers: BinaryIO) -> None:
    _send(answers)
    for line in requests:
        request = json.loads(line)
        _limit("RLIMIT_CPU", int(time.process_time()) + SECONDS)
        arrays = bytearray()
        try:
            tree = _read(request["path"], request["name"], arrays)
        except MemoryError:
            tree = {"error": f"it asks for more than {MEMORY >> 30} GiB of memory"}
        except Exception as error:
            tree = {"error": str(error) or type(error).__name__}
        _send(answers, json.dumps(tree).encode() + b"\n", arrays)


def _send(answers: BinaryIO, *parts: bytes | bytearray) -> None:
    answers.write(sum(map(len, parts)).to_bytes(8, "little"))
    for part in parts:
        answers.write(part)
    answers.flush()


if __name__ == "__main__":
    _limit("RLIMIT_AS", MEMORY)
    _limit("RLIMIT_CORE", 0)
    # What a library prints must not come between the messages.
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    _serve(sys.stdin.buffer, answers)
