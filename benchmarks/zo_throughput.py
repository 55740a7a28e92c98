"""A zo_fit step over HTTP against the same step with the victim in process: the ratio, and where the time goes.

    python -m benchmarks.zo_throughput --model artifacts/phantom/victim \
        --artifact artifacts/phantom/pretrained/denoiser+autoencoder

Both run the same steps on the same random images, alternately, the victim with as many threads.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from benchmarks import cli
from defense.artifact import load_artifact
from defense.estimators import RandomGradientEstimator
from defense.victims import MeteredVictim, QueryLedger, Victim
from services.hospital.model import load_victim
from services.protocol.client import HTTPVictim
from training.command.subprocesses import service
from training.fit.config import FitConfig
from training.fit.trainer import Trainer
from training.victim.in_process import InProcessVictim


class Timed:
    """A victim that adds up the seconds spent waiting for its answers."""

    def __init__(self, victim: Victim) -> None:
        self._victim = victim
        self.seconds = 0.0

    def __call__(self, images: Tensor) -> Tensor:
        """The victim's answer."""
        begun = time.perf_counter()
        try:
            return self._victim(images)
        finally:
            self.seconds += time.perf_counter() - begun


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zo_throughput", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of the victim")
    parser.add_argument(
        "--artifact", type=Path, required=True, help="sanitizer to train, as training.pretrain wrote it"
    )
    parser.add_argument("--directions", type=cli.positive_int, default=20, help="q of RGE (default 20)")
    parser.add_argument("--batch", type=cli.positive_int, default=32, help="images a step (default 32)")
    parser.add_argument("--rounds", type=cli.positive_int, default=10, help="steps of each kind (default 10)")
    parser.add_argument("--threads", type=cli.positive_int, default=1, help="of the victim, either way (default 1)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return cli.run(_measure, build_parser(), argv)


def _measure(arguments: argparse.Namespace) -> int:
    model, config = load_victim(arguments.model)
    here = InProcessVictim(model, config.labels, torch.device("cpu"))
    flags = ["--model", str(arguments.model), "--threads", str(arguments.threads)]
    with (
        TemporaryDirectory() as folder,
        service("services.hospital", flags, Path(folder) / "hospital.log") as url,
        HTTPVictim([url]) as over_http,
    ):
        kinds = {"in process": Timed(_with_threads(here, arguments.threads)), "over HTTP": Timed(over_http)}
        trainers = {kind: _trainer(victim, arguments, Path(folder) / kind) for kind, victim in kinds.items()}
        total = dict.fromkeys(kinds, 0.0)
        for round_number in range(-1, arguments.rounds):
            for kind, trainer in trainers.items():
                waited, begun = kinds[kind].seconds, time.perf_counter()
                trainer.train_step()
                if round_number < 0:
                    kinds[kind].seconds = 0.0  # the first step warms up
                    continue
                total[kind] += time.perf_counter() - begun
                assert kinds[kind].seconds > waited
    slow, fast = total["over HTTP"], total["in process"]
    print(f"throughput over HTTP / in process: {fast / slow:.2f}")
    for kind, victim in kinds.items():
        share = victim.seconds / total[kind]
        print(f"{kind}: {share:.0%} of a step waits for the victim, {1 - share:.0%} is the trainer's own work")
    wire = kinds["over HTTP"].seconds - kinds["in process"].seconds
    print(f"the wire (encoding, sockets, batching, decoding) is {wire / slow:.0%} of a step over HTTP")
    return 0


def _with_threads(victim: Callable[[Tensor], Tensor], threads: int) -> Victim:
    """The victim, run with so many threads, whatever the trainer has."""

    def run(images: Tensor) -> Tensor:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return victim(images)
        finally:
            torch.set_num_threads(before)

    return run


def _trainer(victim: Victim, arguments: argparse.Namespace, folder: Path) -> Trainer:
    sanitizer = load_artifact(arguments.artifact).sanitizer.requires_grad_(True)
    shape = sanitizer.config.input.dimensions
    images = torch.rand(256, *shape, generator=torch.Generator().manual_seed(0))
    positions = tuple(victim(images[:1]).shape[2:])
    metered = MeteredVictim(victim, QueryLedger(), kind="probabilities", positions=positions)
    config = FitConfig(batch=arguments.batch, learning_rate=1e-6, validate_every=1, checkpoint_every=1)
    estimator = RandomGradientEstimator(arguments.directions, mu=0.005)
    return Trainer(sanitizer, metered, estimator, images, images[:1], config, folder, {})


if __name__ == "__main__":
    sys.exit(main())
