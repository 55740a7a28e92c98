"""What the gateway's modes cost: victim queries, and latency as a ratio to one deterministic pass.

    python -m benchmarks.gateway_modes --victim artifacts/phantom/victim --artifact artifacts/phantom/zo-ds

One client asks for one image at a time, in every mode in turn. "direct" is the hospital itself, without a gateway.
"""

import argparse
import sys
import time
from statistics import median

import httpx
from tqdm import tqdm

from benchmarks import cli
from benchmarks.running import add_model_arguments, defended
from training.measure.results import align


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_model_arguments(parser)
    add = parser.add_argument
    add("--rounds", type=cli.positive_int, default=20, help="requests of each kind (default 20)")
    add("--smooth-n", type=cli.positive_int, default=100, help="copies that vote (default 100)")
    add("--certify-n", type=cli.positive_int, default=1000, help="copies that certify (default 1000)")
    return cli.run(_measure, parser, None)


def _measure(arguments: argparse.Namespace) -> int:
    image = (arguments.victim / "example.png").read_bytes()
    modes = ["sanitize", "smooth", "certify"]
    copies = ["--smooth-n", str(arguments.smooth_n), "--certify-n", str(arguments.certify_n)]
    with defended(arguments, ["--modes", ",".join(modes), *copies]) as urls, httpx.Client(timeout=600) as http:
        asked = {"direct": f"{urls.victim}/predict", **{mode: f"{urls.gateway}/predict?mode={mode}" for mode in modes}}
        seconds: dict[str, list[float]] = {name: [] for name in asked}
        queries = {"direct": 1}
        for _ in tqdm(range(arguments.rounds + 1), "gateway_modes", unit="round"):
            for name, address in asked.items():
                begun = time.perf_counter()
                answer = http.post(address, files={"file": image}).raise_for_status()
                seconds[name].append(time.perf_counter() - begun)
                if name != "direct":
                    queries[name] = answer.json()["evidence"]["queries"]
    one = median(seconds["sanitize"][1:])  # the first round warms up
    lines = [["mode", "victim queries", "latency / sanitize", "per query"]]
    for name, taken in seconds.items():
        ratio = median(taken[1:]) / one
        lines.append([name, f"{queries[name]:,}", f"{ratio:.1f}", f"{ratio / queries[name]:.2f}"])
    print(align(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
