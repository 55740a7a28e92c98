"""Images a second through the gateway and through the same pipeline on other servers, at several concurrencies.

    python -m benchmarks.throughput --victim artifacts/phantom/victim --artifact artifacts/phantom/zo-ds

Every server stands in front of the same hospital and is sent the same PNG by clients that ask again as soon as they
have their answer, one server at a time, --repeats times in turn; the median counts, as ratio to the gateway's. Those of
`benchmarks.peers` that are not installed are left out.
"""

import argparse
import asyncio
import sys
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import httpx
import psutil

from benchmarks import cli
from benchmarks.load import Generator
from benchmarks.peers import PEERS
from benchmarks.running import add_model_arguments
from training.command.errors import UserError
from training.command.subprocesses import service
from training.measure.results import align

_WARM_UP_S = 3.0
_OURS = {"gateway": [], "gateway, torch": ["--runtime", "torch"]}


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_model_arguments(parser)
    add = parser.add_argument
    add("--clients", type=cli.positive_int, nargs="+", default=[1, 8, 64], help="at once (default 1 8 64)")
    add("--seconds", type=cli.positive_float, default=8.0, help="for each number of clients (default 8)")
    add("--repeats", type=cli.positive_int, default=3, help="how often each server runs (default 3)")
    return cli.run(_measure, parser, None)


def _measure(arguments: argparse.Namespace) -> int:
    image = (arguments.victim / "example.png").read_bytes()
    upload = httpx.Request("POST", "http://gateway", files={"file": image})
    body, headers = upload.read(), {"Content-Type": upload.headers["Content-Type"]}
    peers = [name for name in PEERS if find_spec(name) is not None]
    rates: dict[tuple[str, int], list[float]] = {}

    async def load(url: str, name: str) -> None:
        generator = Generator(url, body, headers, psutil.Process())
        try:
            await generator.closed(max(arguments.clients), _WARM_UP_S)
            for clients in arguments.clients:
                seen = await generator.closed(clients, arguments.seconds)
                if set(seen.statuses) != {200}:
                    raise UserError(f"{name} answered {dict(seen.statuses)}")
                rates.setdefault((name, clients), []).append(seen.in_time / arguments.seconds)
        finally:
            await generator.aclose()

    with TemporaryDirectory() as folder:
        log = Path(folder)
        with service("services.hospital", ["--model", str(arguments.victim)], log / "hospital.log") as victim:
            own = ["--artifact", str(arguments.artifact), "--victim-url", victim]
            for _ in range(arguments.repeats):
                for name, flags in _OURS.items():
                    with service("services.gateway", [*own, *flags], log / "gateway.log") as url:
                        asyncio.run(load(url, name))
                for name in peers:
                    with service("benchmarks.peers", [name, *own], log / f"{name}.log") as url:
                        asyncio.run(load(url, name))
    lines = [["", *(f"{clients} clients" for clients in arguments.clients)]]
    for name in [*_OURS, *peers]:
        mine = {clients: median(rates[name, clients]) for clients in arguments.clients}
        ratios = [f"{mine[clients] / median(rates['gateway', clients]):.2f}" for clients in arguments.clients]
        lines.append([name, *(f"{ratio} ({mine[n]:.0f}/s)" for ratio, n in zip(ratios, mine, strict=True))])
    print(align(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
