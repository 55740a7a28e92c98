"""Writes what is known of a defense as one self-contained HTML file.

    python -m training.report artifacts/phantom --results artifacts/results.json

It holds what was defended, the threat ladder, scores against the size of the attack and the certified radius, learning
against queries, the ledger by purpose, settings and versions, and what is not covered. Sources are the results, and the
artifacts and the victim's report below the folder; what was not measured is named. No network is used.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field
from pydantic_settings import CliPositionalArg

from services.settings import Config
from training.command.verb import run
from training.reporting import FILE_NAME
from training.reporting.page import write_report


class ReportConfig(Config):
    """Writes a report of a defense."""

    folder: CliPositionalArg[Path] = Field(description="where artifacts are, such as artifacts/phantom")
    results: Path = Field(Path("artifacts/results.json"), description="rows")
    out: Path | None = Field(None, description=f"the file (default FOLDER/{FILE_NAME})")


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m training.report") -> int:
    """Runs the verb."""
    return run(_write, ReportConfig, argv, prog=prog)


def _write(config: ReportConfig) -> int:
    print(f"wrote {write_report(config.folder, config.results, config.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
