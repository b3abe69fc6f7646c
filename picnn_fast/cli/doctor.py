"""``picnn-fast doctor``."""

import argparse
import importlib
import importlib.metadata
import os
import platform
from collections.abc import Sequence

from picnn_fast._extras import install_command
from picnn_fast._terminal import counted
from picnn_fast._version import __version__

_TRAIN_PACKAGES = (
    "torchvision",
    "lightning",
    "torchmetrics",
    "tensorboard",
    "scikit-learn",
    "scipy",
    "h5py",
    "pyyaml",
    "rich",
    "jsonargparse",
    "argcomplete",
    "filelock",
    "safetensors",
    "fsspec",
)


def run(arguments: Sequence[str]) -> int:
    argparse.ArgumentParser(
        prog="picnn-fast doctor",
        description="Show versions, devices, which backend serves which operator, and why any is"
        " missing.",
    ).parse_args(arguments)
    import torch

    importlib.import_module("picnn_fast.functional")  # with which the operators are registered
    from picnn_fast.backends import build_info

    print(f"picnn_fast    {__version__}")
    print(f"python        {platform.python_version()} on {platform.platform()}")
    for package, part in (
        ("torch", None),
        ("numpy", None),
        ("triton", None),
        *((package, "train") for package in _TRAIN_PACKAGES),
        *((package, "report") for package in ("matplotlib", "captum", "plotly", "jinja2")),
    ):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed" + (f": {install_command(part)}" if part else "")
        print(f"{package:<14}{version}")

    print("\ndevices")
    capability = torch.backends.cpu.get_cpu_capability()
    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    used = f"{counted(cores, 'core')}, {counted(threads, 'thread')}"
    print(f"  cpu         {used}, {capability}")
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        memory = device.total_memory / 2**30
        print(f"  cuda:{i}      {device.name}, sm_{device.major}{device.minor}, {memory:.0f} GiB")
    if not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        print(f"  cuda        none (torch is built with {built})")

    info = build_info()
    print("\ncompiled extension")
    for key, value in (info["extension"] or {"": "none"}).items():
        shown = ", ".join(value) if isinstance(value, list) else value
        print(f"  {key:<20}{shown}")

    print("\nbackends")
    for backend, reason in info["backends"].items():
        print(f"  {backend:<12}{'available' if reason is None else f'missing: {reason}'}")

    print("\noperators")
    for operator, devices in info["operators"].items():
        served = ", ".join(f"{device}: {backend}" for device, backend in devices.items())
        print(f"  {operator:<32}{served}")
    return 0
