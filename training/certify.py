r"""python -m training.certify --url http://127.0.0.1:8080 --name zo-ae-ds --data DIR|phantom --sigma 0.25.

    python -m training.certify --url http://127.0.0.1:8080 --name zo-ae-ds --data phantom --sigma 0.25 \
        --n0 100 --n 10000 --alpha 0.001 --limit 100 --radii 0,0.25,0.5,0.75 --out artifacts/certify/zo-ae-ds.jsonl

Certifies what answers at the URL, a gateway or a bare victim, as the base classifier of randomised smoothing
(`defense.smoothing`). The Gaussian noise is added here and is not clipped; n0 + n queries an image.

The output is JSON lines: the settings, then each image as soon as it is certified, so that the same command continues a
stopped run. Certified accuracy at a radius is the share of images answered correctly with at least that radius;
abstentions count as wrong, also those of --stop-early. Rows in the results file do not hold sigma: certify a defense at
several sigmas under a --name for each.

With `torchrun --nproc-per-node N -m training.certify ...` N processes share the images; the certificates are the same.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from pydantic import Field, PositiveInt

from training.certificates.certification import certify_images
from training.certificates.config import CertificateConfig, settled_certificate
from training.certificates.files import settings_for
from training.certificates.summary import certificate_rows, certificate_table
from training.command.team import joined
from training.command.verb import run
from training.data.datasets import load_data
from training.measure.config import DefenseName, MeasureConfig
from training.measure.endpoints import Connect, connect, identify
from training.measure.results import write_rows
from training.measure.selection import chosen_images


class CertifyConfig(CertificateConfig, MeasureConfig):
    """Certifies what answers at a URL."""

    url: str = Field(description="where the base classifier answers: a gateway, or a bare victim")
    name: DefenseName = Field(description="name of the defense in the results")
    stop_early: bool = Field(False, description="spare the n samples where n0 samples show no hope")
    batch: PositiveInt = Field(1024, description="noisy images made at once")
    out: Path | None = Field(None, description="one line an image (default artifacts/certify/NAME.jsonl)")


def main(
    argv: Sequence[str] | None = None, *, connect: Connect = connect, prog: str = "python -m training.certify"
) -> int:
    """Runs the verb.

    Args:
        argv: The arguments, without the program's name.
        connect: Makes the client of a URL; tests pass one without sockets.
        prog: The program, as messages name it.
    """
    return run(partial(_certify, connect=connect), CertifyConfig, argv, prog=prog)


def _certify(config: CertifyConfig, connect: Connect) -> int:
    splits = load_data(config)
    indices, chosen = chosen_images(splits, config.split, config.limit, config.seed)
    config = settled_certificate(config, chosen)
    path = config.out or Path("artifacts/certify") / f"{config.name}.jsonl"
    with joined() as team, connect(config.url) as endpoint:
        identity = team.told(lambda: identify(endpoint, config.url, chosen.images[0], splits.labels))
        settings = settings_for(
            config,
            splits,
            split=config.split,
            seed=config.seed,
            stop_early=config.stop_early,
            name=config.name,
            artifact=identity.artifact,
        )
        lines = certify_images(endpoint, chosen, indices, path, settings, batch=config.batch, team=team)
        if not team.is_first:
            return 0
    print(certificate_table(lines, config.radii, settings))
    write_rows(config.results, certificate_rows(lines, config.radii, settings, identity.queries))
    print(f"Every image in {path}; rows added to {config.results}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
