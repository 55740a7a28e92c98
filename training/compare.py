r"""Compares defenses at equal numbers of victim queries, and prints and plots what they certify.

    python -m training.compare --victim-url http://127.0.0.1:8000 --data DIR --pretrained artifacts/pretrained \
        --budgets 40000,100000 --seeds 0,1,2 --out artifacts/compare
    python -m training.compare --victim artifacts/victim --data DIR --pretrained artifacts/pretrained \
        --methods noise,mse,zo-ds,fo-ds --out OUT
    python -m training.compare --out OUT --summary

The methods are those of `training.comparison.methods`. `training.zo_fit` trains what needs it, one run a method, budget
and seed; every run is certified on the same images under the same noise. The same command continues an interrupted
comparison, and several processes may share one OUT. The summary (results.json, table.md, certified.png, queries.png)
covers everything finished in OUT.
"""

import sys
from collections.abc import Sequence
from functools import partial

from services.protocol.client import HTTPVictim
from training.command.verb import run
from training.comparison.bench import compare, print_plan
from training.comparison.config import CompareConfig
from training.comparison.summary import summarize
from training.victim.config import Connect


def main(
    argv: Sequence[str] | None = None, *, connect: Connect = HTTPVictim, prog: str = "python -m training.compare"
) -> int:
    """Runs the command.

    Args:
        argv: The arguments; `sys.argv[1:]` when None.
        connect: Makes the client of a victim's URLs; tests pass one without sockets.
        prog: The program, as messages name it.

    Returns:
        The exit code: 0 when all runs are finished, 2 when one could not be learned.
    """
    return run(partial(_compare, connect=connect), CompareConfig, argv, prog=prog)


def _compare(config: CompareConfig, connect: Connect) -> int:
    if config.summary:
        summarize(config)
        return 0
    if config.dry_run:
        print_plan(config)
        return 0
    if failed := compare(config, connect):
        print(f"not learned, for the reasons above: {', '.join(map(str, failed))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
