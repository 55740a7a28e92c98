"""What can compute the sanitizer, side by side: time an image as ratio to PyTorch's, and how far the answers are apart.

    python -m benchmarks.runtimes --artifact artifacts/phantom/zo-ds

All take the same images in turn. "agrees" is what the gateway demands of a runtime:
`services.gateway.compilers.TOLERANCE`.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

from benchmarks import cli
from defense.artifact import load_artifact
from services.device import resolve_device
from services.gateway.compilers import KINDS, TOLERANCE, disagreement, load_runtime, open_runtime
from services.protocol.errors import ServiceError
from training.measure.results import align


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--artifact", type=Path, required=True, help="the sanitizer")
    add("--batches", type=cli.positive_int, nargs="+", default=[1, 8, 64], help="images at once (default 1 8 64)")
    add("--rounds", type=cli.positive_int, default=15, help="batches of each size (default 15)")
    return cli.run(_measure, parser, None)


def _measure(arguments: argparse.Namespace) -> int:
    artifact = load_artifact(arguments.artifact)
    sanitizer, shape, device = artifact.sanitizer, artifact.manifest.input.dimensions, resolve_device("auto")
    runtimes, left_out = [], []
    for kind in tqdm(KINDS, "opening"):
        try:
            runtimes.append(open_runtime(kind, sanitizer, shape, device))
        except ServiceError as error:
            left_out.append(str(error))
    seconds: dict[tuple[str, int], list[float]] = {}
    with torch.inference_mode():
        for _ in tqdm(range(arguments.rounds + 1), "rounds"):  # the first one warms up
            for size in arguments.batches:
                images = torch.rand(size, *shape)
                for runtime in runtimes:
                    begun = time.perf_counter()
                    runtime.run(images)
                    seconds.setdefault((runtime.kind, size), []).append(time.perf_counter() - begun)
    medians = {key: median(taken[1:]) for key, taken in seconds.items()}
    lines = [["", *(f"batch {size}" for size in arguments.batches), "apart * 255", "agrees"]]
    for runtime in runtimes:
        ratios = [f"{medians[runtime.kind, size] / medians['torch', size]:.2f}" for size in arguments.batches]
        apart = disagreement(runtime, sanitizer, shape, device)
        lines.append([runtime.kind, *ratios, f"{apart * 255:.4f}", "yes" if apart <= TOLERANCE else "no"])
    print(align(lines))
    for told in left_out:
        print(told)
    print(f"--runtime auto takes {load_runtime('auto', sanitizer, shape, device).kind} here")
    return 0


if __name__ == "__main__":
    sys.exit(main())
