"""The CUDA kernels of all families, run as fibres on the CPU."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import Unavailable, fibre_kernels


@pytest.fixture(scope="session")
def kernels() -> dict[str, Callable[..., Any]]:
    try:
        return fibre_kernels()
    except Unavailable as error:
        pytest.skip(str(error))
