"""Pytest as it would be where there is a GPU, and no Captum; in a process of its own."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch


def run_pytest(arguments: list[str]) -> None:
    modules: dict[str, Any] = sys.modules
    modules["captum"] = None
    torch.cuda.is_available = lambda: True
    os.chdir(Path(__file__).parents[2])
    sys.exit(pytest.main(arguments))
