"""Fixtures that every kind of test may use."""

import os
from pathlib import Path

import pytest
import torch

# Models here are tiny: a second thread would cost more in waiting than it saves in work.
torch.set_num_threads(1)
# Gateways of the tests start at once: others take seconds to be compiled, and have tests of their own.
os.environ.setdefault("GATEWAY_RUNTIME", "torch")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder that holds the real data sets; the test is skipped where there is none."""
    folder = os.environ.get("ZO_GATEWAY_DATA")
    if not folder:
        pytest.skip("ZO_GATEWAY_DATA does not name a folder with the real data sets")
    return Path(folder)
