import os

import pytest
import torch

# The models of the tests are so small that a second thread costs more than it brings, in the processes they start too.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same numbers whichever tests run, in whatever order."""
    torch.manual_seed(0)
