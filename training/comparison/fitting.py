"""How a comparison makes what it compares: one run of `fit` after the other, each used again once it is there."""

import logging
import sys
import time
from pathlib import Path

from defense.artifact import MANIFEST_FILE, load_artifact
from services.protocol.client import Endpoint
from training.command.errors import UserError
from training.command.verb import KNOWN_ERRORS
from training.comparison.config import CompareConfig
from training.comparison.runs import Run
from training.data.datasets import Splits
from training.fit.checkpoint import Journal
from training.fit.config import RunConfig
from training.fit.run import MAY_CHANGE, fit

logger = logging.getLogger(__name__)

_ASIDE = (MAY_CHANGE - {"steps", "keep_surrogate"}) | {"data", "pretrained"}
"""Settings in which a finished run may differ from the one that is wanted.

Data and artifacts are known by their content instead: by a fingerprint, and by their ids.
"""


def learn(run: Run, config: CompareConfig, splits: Splits, victim: Endpoint) -> bool:
    """Trains or continues what a run needs, unless it is there; returns whether it is there now (stderr says why not).

    Raises UserError if it was made with other settings.
    """
    folder = config.out / run.place
    wanted = config.learning(run, resume=Journal.total(folder) > 0)
    if (folder / MANIFEST_FILE).exists():
        _refuse_other_settings(folder, wanted, splits.fingerprint)
        logger.info("%s: learned before", run)
        return True
    begun = time.monotonic()
    try:
        fit(
            wanted,
            victim,
            splits,
            out=folder,
            pretrained=wanted.pretrained,
            resume=wanted.resume,
            device=wanted.device,
        )
    except KNOWN_ERRORS as error:
        print(f"{run}: error: {error}", file=sys.stderr)
        logger.info("%s: NOT learned, see above, after %.0f s", run, time.monotonic() - begun)
        return False
    logger.info("%s: learned after %.0f s", run, time.monotonic() - begun)
    return True


def _refuse_other_settings(folder: Path, wanted: RunConfig, fingerprint: str) -> None:
    made = load_artifact(folder).manifest.provenance
    settings = wanted.model_dump(mode="json")
    names = ({*settings} - _ASIDE) | ({"max_queries"} if wanted.steps is None else set())
    # An artifact that is older than a setting was made with what is the setting's default now.
    defaults = {name: field.default for name, field in RunConfig.model_fields.items()}
    pairs = [(name, made.settings.get(name, defaults[name]), settings[name]) for name in sorted(names)]
    changes = [f"{name} was {old}, is {new}" for name, old, new in pairs if old != new]
    if made.data_fingerprint != fingerprint:
        changes.append("the data or its splits were others")
    if changes:
        raise UserError(f"{folder} was learned otherwise ({'; '.join(changes)}): move it away, or use another --out")
