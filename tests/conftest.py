"""Fixtures that every kind of test may use, and which tests are slow."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

UNIT = Path(__file__).parent / "unit"
SMOKE = Path(__file__).parent / "e2e" / "test_smoke.py"

# Models here are tiny: a second thread would cost more in waiting than it saves in work.
torch.set_num_threads(1)
# Gateways of the tests start at once: others take seconds to be compiled, and have tests of their own.
os.environ.setdefault("GATEWAY_RUNTIME", "torch")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cpu-limit", type=float, metavar="S", help="fail tests not marked slow that compute for over S s"
    )


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not item.path.is_relative_to(UNIT) and item.path != SMOKE:
            item.add_marker("slow")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Holds fast unit tests to the limit, in processor time of this process and of those it waited for.

    Wall-clock time would fail tests on a machine that is busy. Processor time still depends on the machine's speed, so
    that only `.ci/run` sets the limit, and tests over half of it are marked slow. Fixtures are not counted: those of a
    module or session would be put down to whichever test comes first.
    """
    before = sum(os.times()[:4])
    yield
    limit = item.config.getoption("--cpu-limit")
    is_fast = item.path != SMOKE and item.get_closest_marker("slow") is None
    if limit and is_fast and (spent := sum(os.times()[:4]) - before) > limit:
        pytest.fail(f"took {spent:.1f} s of processor time: mark it slow, or make it faster", pytrace=False)


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
