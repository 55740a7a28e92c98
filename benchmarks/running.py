"""What the benchmarks of the running gateway share: hospital and gateway as processes, and the arguments for it."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import cli
from training.command.subprocesses import service


@dataclass(frozen=True)
class Urls:
    """Where the hospital (victim) and the gateway in front of it are."""

    victim: str
    gateway: str


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what is to run."""
    parser.add_argument("--victim", type=Path, required=True, help="what training.victim_fit wrote")
    parser.add_argument("--artifact", type=Path, required=True, help="the sanitizer")


def add_image_arguments(parser: argparse.ArgumentParser, images: int) -> None:
    """Adds which images of the data are used, `images` of them by default."""
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="images to use (default test)")
    parser.add_argument("--images", type=cli.positive_int, default=images, help=f"how many (default {images})")


@contextmanager
def defended(arguments: argparse.Namespace, flags: Sequence[str] = ()) -> Iterator[Urls]:
    """Runs both services as long as the context lasts, with more flags for the gateway; their logs go with them."""
    with TemporaryDirectory() as folder:
        log = Path(folder)
        with service("services.hospital", ["--model", str(arguments.victim)], log / "hospital.log") as victim:
            own = ["--artifact", str(arguments.artifact), "--victim-url", victim]
            with service("services.gateway", [*own, *flags], log / "gateway.log") as gateway:
                yield Urls(victim, gateway)
