"""Looks at a model in seconds: is it reached, what does it answer, how exactly and how fast, and what to type next.

    python -m training.check_victim --victim-url http://127.0.0.1:8000 --data path/to/images
    python -m training.check_victim --victim-url https://HOST/predict --victim-mapping mapping.toml --wire image

Spends about a hundred queries; nothing is written.
"""

import logging
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from pydantic import Field, PositiveFloat
from torch import Tensor

from defense.errors import DefenseError
from services.protocol.client import HTTPVictim
from services.protocol.errors import ServiceError
from training.command.verb import run
from training.data.config import PHANTOM, DataConfig
from training.data.datasets import settled
from training.data.folders import read_some
from training.data.phantoms import brain_phantoms, polyp_phantoms
from training.victim.check import IMAGES, QUERIES, VictimCheck, check_victim, hint
from training.victim.config import Connect, VictimConfig

_QUERIES = {"surrogate": 100_000, "surrogate-dense": 16_000}  # that README recommends


class CheckConfig(VictimConfig, DataConfig):
    """Looks at a model in seconds: is it reached, what does it answer, and what to type next."""

    patience: PositiveFloat = Field(5.0, description="seconds to wait for a victim that is away")


def main(
    argv: Sequence[str] | None = None, *, connect: Connect = HTTPVictim, prog: str = "python -m training.check_victim"
) -> int:
    """Runs the command.

    Args:
        argv: The arguments; `sys.argv[1:]` when None.
        connect: Makes the victim's client; tests pass one without sockets.
        prog: The program, as messages name it.

    Returns:
        The exit code: 0 where a defense can be learned, 1 where something is wrong with the victim.
    """
    return run(partial(_check, connect=connect), CheckConfig, argv, prog=prog)


def _check(config: CheckConfig, connect: Connect) -> int:
    config = settled(config)
    images = _images(config)
    shape = " x ".join(map(str, images.shape[1:]))
    options = config.client_options()
    print(f"asking {', '.join(config.victim_url)} about {QUERIES} images of {shape} ({config.data})")
    try:
        with _warnings_withheld(), connect(config.victim_url, **options) as victim:
            found = check_victim(victim, images)
    except (ServiceError, DefenseError) as error:
        print(f"PROBLEM: {error}\nwhat may help: {hint(error)}")
        return 1
    print("\n".join(found.lines()), f"queries spent: {found.queries}", sep="\n")
    if not found.is_usable:
        return 1
    print(f"next:\n  {_next(config, found)}")
    return 0


@contextmanager
def _warnings_withheld() -> Iterator[None]:
    """Keeps the client's warnings back: what goes wrong is said once, with what may help."""
    client = logging.getLogger("services")
    before = client.level
    client.setLevel(logging.ERROR)
    try:
        yield
    finally:
        client.setLevel(before)


def _images(config: CheckConfig) -> Tensor:
    task, channels = config.task, config.channels
    assert task is not None  # settled
    assert channels is not None
    if config.data != PHANTOM:
        return read_some(Path(config.data), task, config.size, channels, IMAGES)
    draw = polyp_phantoms if task == "segmentation" else brain_phantoms
    images, _ = draw(IMAGES, size=config.size, seed=config.split_seed)
    return images[:, :1] if channels == 1 else images.expand(-1, channels, -1, -1)


def _next(config: CheckConfig, found: VictimCheck) -> str:
    words = ["python", "-m", "training.zo_fit"]
    for url in config.victim_url:
        words += ["--victim-url", url]
    if config.victim_mapping is not None:
        words += ["--victim-mapping", str(config.victim_mapping)]
    if config.wire != "tensor":
        words += ["--wire", config.wire]
    words += ["--data", config.data, "--size", str(config.size), "--channels", str(config.channels)]
    words += ["--preset", found.preset, "--max-queries", str(_QUERIES[found.preset]), "--out", "artifacts/defense"]
    return shlex.join(words)


if __name__ == "__main__":
    sys.exit(main())
