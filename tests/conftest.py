import gc
import os
from collections.abc import Iterator

import pytest
import torch

# The models of the tests are so small that a second thread costs more than it brings, in the processes they start too.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


WITH_DEVICE = ("test_captured.py", "test_replay", "test_engine_cases", "test_rollouts.py", "test_model.py")
"""How the files begin whose tests run on ``--device``; those of the others stay on the CPU."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the tests of the engine and the models run, such as cuda")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cpu(reason): runs on the CPU alone, whatever --device says")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The one of ``--device``."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def _default_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Makes tensors without a device be on the one of ``--device``, in the files that are ready for it."""
    device = request.config.getoption("--device")
    if device == "cpu" or not request.path.name.startswith(WITH_DEVICE):
        yield
        return
    if (marker := request.node.get_closest_marker("cpu")) is not None:
        pytest.skip(f"on the CPU alone: {marker.args[0]}")
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> None:
    """What is imported by now is hidden from the garbage collector: each look through it takes a third of a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same numbers whichever tests run, in whatever order."""
    torch.manual_seed(0)
