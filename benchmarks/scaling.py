"""What a second trainer process and a second victim bring: victim queries a second of `zo_fit`, over 1 and 1.

    python -m benchmarks.scaling --victim artifacts/phantom/victim --pretrained artifacts/phantom/pretrained

The victims are `benchmarks.paced`, each of --rate images a second. A run's start is taken off by running a few steps
and many, and dividing the difference in queries by the difference in time.
"""

import argparse
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import cli
from defense.artifact import load_artifact
from training.command.errors import UserError
from training.command.subprocesses import service
from training.measure.results import align


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--victim", type=Path, required=True, help="what training.victim_fit wrote")
    add("--pretrained", type=Path, required=True, help="what training.pretrain wrote")
    add("--data", default="phantom", help="as of zo_fit (default phantom)")
    add("--rate", type=cli.positive_float, default=800.0, help="images a second of each victim (default 800)")
    add("--steps", type=cli.positive_int, nargs=2, default=[2, 14], help="few and many (default 2 14)")
    add("--processes", type=cli.positive_int, nargs="+", default=[1, 2], help="trainers at one run (default 1 2)")
    add("--victims", type=cli.positive_int, nargs="+", default=[1, 2], help="replicas (default 1 2)")
    add("--flags", default="--sanitizer denoiser --batch 64 --directions 20", help="of zo_fit")
    return cli.run(_measure, parser, None)


def _measure(arguments: argparse.Namespace) -> int:
    lines, base = [["processes", "victims", "queries/s", "ratio"]], 0.0
    for processes in arguments.processes:
        for victims in arguments.victims:
            with ExitStack() as stack, TemporaryDirectory() as folder:
                paced = ["--model", str(arguments.victim), "--rate", f"{arguments.rate:g}"]
                logs = [Path(folder) / f"paced-{number}.log" for number in range(victims)]
                urls = [stack.enter_context(service("benchmarks.paced", paced, log)) for log in logs]
                (few, soon), (many, late) = (
                    _run(arguments, processes, urls, steps, Path(folder) / f"{steps}") for steps in arguments.steps
                )
            rate = (many - few) / (late - soon)
            base = base or rate
            lines.append([str(processes), str(victims), f"{rate:.0f}", f"{rate / base:.2f}"])
            print(align(lines[-1:]), flush=True)
    print(align(lines))
    return 0


def _run(arguments: argparse.Namespace, processes: int, urls: list[str], steps: int, out: Path) -> tuple[int, float]:
    """Queries spent, and seconds."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(start if processes > 1 else []), "-m", "training.zo_fit"]
    command += [flag for url in urls for flag in ("--victim-url", url)]
    command += ["--data", arguments.data, "--pretrained", str(arguments.pretrained), *arguments.flags.split()]
    command += ["--steps", str(steps), "--max-queries", "1000000", "--validation-images", "8", "--out", str(out)]
    begun = time.perf_counter()
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # as torchrun has it: a process stands for a machine
    ended = subprocess.run(command, capture_output=True, text=True, env=one_thread, check=False)
    seconds = time.perf_counter() - begun
    if ended.returncode:
        raise UserError(f"zo_fit ended with code {ended.returncode}: {ended.stderr[-2000:]}")
    return load_artifact(out).manifest.queries_spent, seconds


if __name__ == "__main__":
    sys.exit(main())
