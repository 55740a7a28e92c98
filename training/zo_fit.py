"""Learns a sanitizer for a model nobody may open, from queries alone: ZO-DS and ZO-AE-DS (Zhang et al., ICLR 2022).

    python -m training.zo_fit --victim-url http://127.0.0.1:8000 --data phantom --sigma 0.25 --out artifacts/defense
    python -m training.zo_fit --victim-url URL --data DIR --preset surrogate --max-queries 100000 --out OUT
    python -m training.zo_fit --victim-url URL --data DIR --estimator cge --out OUT --resume
    torchrun --nproc-per-node 2 -m training.zo_fit --victim-url URL ...

The victim is a URL: no weights, no gradients, no labels. --victim-url may be repeated: queries spread over replicas.
"""

import json
import sys
from collections.abc import Sequence
from functools import partial

from services.protocol.client import HTTPVictim
from training.command.team import joined
from training.command.verb import run
from training.data.datasets import load_data, settled
from training.fit.config import RunConfig
from training.fit.run import fit
from training.victim.config import Connect


def main(
    argv: Sequence[str] | None = None, *, connect: Connect = HTTPVictim, prog: str = "python -m training.zo_fit"
) -> int:
    """Runs the command.

    Args:
        argv: The arguments; `sys.argv[1:]` when None.
        connect: Makes the victim's client; tests pass one without sockets.
        prog: The program, as messages name it.

    Returns:
        The exit code: 0 when an artifact was written.
    """
    return run(partial(_fit, connect=connect), RunConfig, argv, prog=prog)


def _fit(config: RunConfig, connect: Connect) -> int:
    options = config.client_options()
    with joined() as team:
        splits = load_data(config)
        with connect(config.victim_url, **options) as victim:
            artifact = fit(
                settled(config),
                victim,
                splits,
                out=config.out,
                pretrained=config.pretrained,
                resume=config.resume,
                keep_surrogate=config.keep_surrogate,
                device=config.device,
                team=team,
            )
        if team.is_first:
            manifest = artifact.manifest
            spent = f"{manifest.queries_spent} {json.dumps(manifest.queries)}"
            print(f"wrote {config.out} (artifact {manifest.id}); queries spent: {spent}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
