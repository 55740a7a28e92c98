"""How a comparison makes what it compares: one run of `zo_fit` after the other, each used again once it is there."""

import argparse
import logging
import time
from pathlib import Path

from defense.artifact import MANIFEST_FILE, load_artifact
from training import zo_fit
from training.command.errors import UserError
from training.command.provenance import settings_of
from training.comparison.methods import METHODS
from training.comparison.runs import Run
from training.fit.checkpoint import Journal

logger = logging.getLogger(__name__)

_UNBOUNDED = 10**9  # queries: a white box has no budget
_ASIDE = (zo_fit.MAY_CHANGE - {"steps", "keep_surrogate"}) | {"data", "pretrained"}
"""Settings of `zo_fit` in which a finished run may differ from the one that is wanted.

Data and artifacts are known by their content instead: by a fingerprint, and by their ids.
"""


def zo_flags(run: Run, arguments: argparse.Namespace) -> list[str]:
    """All flags of the `zo_fit` that a learned run is."""
    urls = arguments.victim_url or [f"in-process:{arguments.victim}"]
    size = ["--size", str(arguments.size)]
    for name in ("task", "channels"):  # None until the data have told
        if (value := getattr(arguments, name)) is not None:
            size += [f"--{name}", str(value)]
    split = ["--split-seed", str(arguments.split_seed), *(["--published-test"] if arguments.published_test else [])]
    bound = ["--max-queries", str(run.budget)]
    if run.steps:
        bound = ["--max-queries", str(_UNBOUNDED), "--steps", str(run.steps)]
    answers = ["--wire", arguments.wire, "--votes", str(arguments.votes)]
    if arguments.votes > 1:
        answers += ["--vote-noise", str(arguments.vote_noise)]
    if arguments.victim_mapping is not None:
        answers += ["--victim-mapping", str(arguments.victim_mapping)]
    return [
        *answers,
        *(flag for url in urls for flag in ("--victim-url", url)),
        *("--data", arguments.data, *size, *split, "--sigma", str(arguments.sigma), "--device", arguments.device),
        *("--pretrained", str(arguments.pretrained), "--seed", str(run.seed), "--out", str(arguments.out / run.place)),
        *METHODS[run.method].flags,
        *bound,
    ]


def check_flags(run: Run, arguments: argparse.Namespace) -> None:
    """Raises UserError where `zo_fit` does not know the flags of a learned run; it has said which."""
    try:
        zo_fit.build_parser().parse_args(zo_flags(run, arguments))
    except SystemExit as error:
        raise UserError(
            f"training.zo_fit does not know the flags of {run.method}: mend its entry in training/fit/presets.py"
        ) from error


def learn(run: Run, arguments: argparse.Namespace, fingerprint: str, connect: zo_fit.Connect) -> bool:
    """Trains what a run needs, or goes on with it, unless it is there.

    Args:
        run: A learned one.
        arguments: Those of `training.compare`.
        fingerprint: Of the data.
        connect: How the victim is reached.

    Returns:
        Whether it is there now; else `zo_fit` has said why not.

    Raises:
        UserError: It is there, and was made with other settings.
    """
    folder = arguments.out / run.place
    flags = zo_flags(run, arguments)
    if (folder / MANIFEST_FILE).exists():
        _refuse_other_settings(folder, flags, fingerprint)
        logger.info("%s: learned before", run)
        return True
    begun = time.monotonic()
    code = zo_fit.main([*flags, *(["--resume"] if Journal.total(folder) else [])], connect=connect)
    if code == 130:
        raise KeyboardInterrupt
    logger.info("%s: %s after %.0f s", run, "NOT learned, see above," if code else "learned", time.monotonic() - begun)
    return code == 0


def _refuse_other_settings(folder: Path, flags: list[str], fingerprint: str) -> None:
    made = load_artifact(folder).manifest.provenance
    parser = zo_fit.build_parser()
    wanted = settings_of(parser.parse_args(flags))
    names = ({*wanted} - _ASIDE) | ({"max_queries"} if wanted["steps"] is None else set())
    # An artifact that is older than a flag was made with what is the flag's default now.
    pairs = [(name, made.settings.get(name, parser.get_default(name)), wanted[name]) for name in sorted(names)]
    changes = [f"{name} was {old}, is {new}" for name, old, new in pairs if old != new]
    if made.data_fingerprint != fingerprint:
        changes.append("the data or its splits were others")
    if changes:
        raise UserError(f"{folder} was learned otherwise ({'; '.join(changes)}): move it away, or use another --out")
