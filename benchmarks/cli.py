"""What the benchmarks share: common arguments and one way to report errors."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from typing import get_args

from training.command.verb import KNOWN_ERRORS
from training.data.config import DataConfig, Task


def run(
    body: Callable[[argparse.Namespace], int],
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
) -> int:
    """Parses the arguments (`sys.argv[1:]` when None) and returns the exit code of `body`.

    A known error is one line on stderr and the code 2.
    """
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # one line a request would drown everything else
    try:
        return body(arguments)
    except KNOWN_ERRORS as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2


def data_config(arguments: argparse.Namespace) -> DataConfig:
    """What `add_data_arguments` parsed."""
    return DataConfig(**{name: getattr(arguments, name) for name in DataConfig.model_fields})


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --data, --task, --size, --channels, --published-test, --split-seed and --seed."""
    parser.add_argument(
        "--data",
        default="phantom",
        help="a folder (Training/<class>/* and Testing/<class>/*, or one folder a class; or images/* and masks/*), "
        "or 'phantom' (default)",
    )
    parser.add_argument(
        "--task",
        choices=get_args(Task),
        help="default: a folder tells it by its layout; of phantoms, classification",
    )
    parser.add_argument("--size", type=positive_int, default=64, help="images are resized to SIZE x SIZE (default 64)")
    parser.add_argument(
        "--channels", type=int, choices=(1, 3), help="1: grey (default to classify); 3: colour (default to segment)"
    )
    parser.add_argument(
        "--published-test",
        action="store_true",
        help="keep the Testing folder as the test split, and drop its near-duplicates from training "
        "(default: all images are split anew, by groups of near-duplicates)",
    )
    parser.add_argument(
        "--split-seed",
        type=int,
        default=0,
        help="which images go to which split, and which phantoms are drawn; keep it for all commands (default 0)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything else that is random (default 0)")


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Adds --device."""
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")


def positive_int(text: str) -> int:
    """Parses a whole number of at least 1 (an argparse type)."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def non_negative_int(text: str) -> int:
    """Parses a whole number of at least 0 (an argparse type)."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {value}")
    return value


def share(text: str) -> float:
    """Parses a number of at least 0 and below 1 (an argparse type)."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, got {text}")
    return value


def non_negative_float(text: str) -> float:
    """Parses a finite number of at least 0 (an argparse type)."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a finite number of at least 0, got {text}")
    return value


def positive_float(text: str) -> float:
    """Parses a finite number above 0 (an argparse type)."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a finite number above 0, got {text}")
    return value
