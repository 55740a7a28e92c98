"""What the gateway adds: one image through it, over sanitizing it here and asking the hospital directly.

    python -m benchmarks.latency --victim artifacts/phantom/victim --artifact artifacts/phantom/zo-ds

Both send the same image to the same hospital as tensors, warm, one at a time and in turn. The goal is 1.10.
"""

import argparse
import sys
import time
from collections.abc import Callable
from statistics import median, quantiles

import httpx
import numpy as np
import torch
from tqdm import tqdm

from benchmarks import cli
from benchmarks.running import add_model_arguments, defended
from defense.artifact import load_artifact
from services.protocol import oip
from training.measure.results import align

_WARM_UP = 20


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_model_arguments(parser)
    parser.add_argument("--rounds", type=cli.positive_int, default=300, help="images each way (default 300)")
    parser.add_argument(
        "--max-delay-ms", type=float, default=0.0, help="of the gateway's batching (default 0, as its own)"
    )
    return cli.run(_measure, parser, None)


def _measure(arguments: argparse.Namespace) -> int:
    artifact = load_artifact(arguments.artifact)
    sanitizer = artifact.sanitizer.eval()
    image = np.random.default_rng(0).random((1, *artifact.manifest.input.dimensions), dtype=np.float32)

    def ask(http: httpx.Client, url: str, images: np.ndarray) -> None:
        body, headers = oip.encode_request([oip.Tensor(oip.INPUT, images)])
        response = http.post(f"{url}/predict", content=body, headers=headers).raise_for_status()
        oip.decode_response(response.content, oip.header_length(response.headers.get(oip.HEADER)))

    flags = ["--max-delay-ms", f"{arguments.max_delay_ms:g}"]
    seconds: dict[str, list[float]] = {"sanitize here, ask the hospital": [], "ask the gateway": []}
    with defended(arguments, flags) as urls, httpx.Client(timeout=60) as http, torch.inference_mode():

        def here() -> None:
            ask(http, urls.victim, sanitizer(torch.from_numpy(image)).numpy())

        def there() -> None:
            ask(http, urls.gateway, image)

        ways: dict[str, Callable[[], None]] = dict(zip(seconds, (here, there), strict=True))
        for _ in tqdm(range(arguments.rounds + _WARM_UP), "latency", unit="round"):
            for name, way in ways.items():
                begun = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - begun)
    base = median(next(iter(seconds.values()))[_WARM_UP:])
    lines = [["", "median", "90%", "ratio of medians"]]
    for name, taken in seconds.items():
        warm = taken[_WARM_UP:]
        cells = [f"{one * 1000:.2f} ms" for one in (median(warm), quantiles(warm, n=10)[-1])]
        lines.append([name, *cells, f"{median(warm) / base:.2f}"])
    print(align(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
