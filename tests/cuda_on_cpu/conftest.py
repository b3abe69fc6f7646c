"""The CUDA kernels of all families, run as fibres on the CPU."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import Unavailable, fibre_kernels

# Ways to run threads and blocks that a device may take, by what cuda_on_cpu.h is told of them.
SCHEDULES = {
    "reversed": {"ORDER": "reversed"},
    "shuffled": {"ORDER": "shuffled:0"},
    "warps_one_by_one": {"WARPS": "one_by_one"},
    "warps_one_by_one_reversed": {"WARPS": "one_by_one", "ORDER": "reversed"},
    "memory_kept": {"MEMORY": "kept"},
    "memory_kept_shuffled": {"MEMORY": "kept", "ORDER": "shuffled:1"},
}


@pytest.fixture(params=SCHEDULES)
def schedule(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """What sets one of the SCHEDULES when it is called, until the test ends."""

    def choose() -> None:
        for mode, value in SCHEDULES[request.param].items():
            monkeypatch.setenv(f"PICNN_FAST_FIBRE_{mode}", value)

    return choose


@pytest.fixture(scope="session")
def kernels() -> dict[str, Callable[..., Any]]:
    try:
        return fibre_kernels()
    except Unavailable as error:
        pytest.skip(str(error))
