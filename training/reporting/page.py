"""The report: one HTML page that needs nothing else, made of files."""

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from defense.artifact import MANIFEST_FILE, Manifest, load_artifact
from defense.files import replace_file
from training.command.errors import UserError
from training.measure.results import Row, read_rows
from training.measure.scoring import ACCURACY, DICE, SMALL
from training.reporting import FILE_NAME
from training.reporting.figures import against_size, certified, image, learning
from training.reporting.tables import MISSING, attacks, corruptions, ladder, ledger, smallest
from training.victim.files import REPORT_NAME

_NOT_COVERED: Final = (
    "An attack larger than a certified radius, whatever the tables say of attacks that were tried: one that was not "
    "may be better.",
    "Oblivious attacks are made for the bare model by somebody who does not know of the gateway. They bound nothing. "
    "Where the table has no line of an insider, nobody who knows the defense has attacked it here.",
    "Changes that are not small ones of the pixels: other scanners and protocols, rotations, crops, artefacts, and "
    "images of a kind that the model was not made for.",
    "A certificate is about L2 distance between images at the model's resolution, in pixel values of [0, 1]; its "
    "equivalent when every pixel may change is small.",
    "What the model itself gets wrong. A defense keeps its answers; it does not make them right.",
    "Anybody who reaches the model without the gateway, a stolen key, and a stolen artifact.",
    "Clinical use. This is research software, not a medical device.",
)
_STYLE: Final = """
:root { color-scheme: light dark; --text: #1b1f24; --soft: #59636e; --line: #c8cfd6; --ground: #fff; }
@media (prefers-color-scheme: dark) { :root { --text: #e8ecf0; --soft: #a3adb8; --line: #3b444e; --ground: #14181d; } }
body { margin: 2rem auto; max-width: 60rem; padding: 0 1rem; font: 1rem/1.5 system-ui, sans-serif; color: var(--text);
  background: var(--ground); }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
table { border-collapse: collapse; margin: .5rem 0; } caption { text-align: left; color: var(--soft); }
th, td { border-bottom: 1px solid var(--line); padding: .2rem .6rem; text-align: right; }
th:first-child { text-align: left; }
td { white-space: nowrap; } small { color: var(--soft); } .wide { overflow-x: auto; } figure { margin: 1rem 0; }
img { max-width: 100%; background: #fff; } pre { overflow-x: auto; white-space: pre-wrap; }
@media print { body { margin: 0; max-width: none; color: #000; background: #fff; } h2 { break-after: avoid; }
  figure, table { break-inside: avoid; } details { display: block; } }
"""


def write_report(folder: Path, results: Path, out: Path | None = None) -> Path:
    """Writes the report of the artifacts in or below a folder; returns its file, by default `FILE_NAME` in the folder.

    Raises UserError if there is no artifact, or `results` is no results file.
    """
    artifacts = dict(_artifacts(folder))
    victim = _json(folder / "victim" / REPORT_NAME)
    if not artifacts:
        raise UserError(f"{folder} holds no artifact: name a folder in which training.demo or training.zo_fit wrote")
    task, datasets = _subject(artifacts, victim)
    rows = [row for row in read_rows(results) if row.task == task and row.dataset in datasets]
    metric = ACCURACY if task == "classification" else DICE
    out = out or folder / FILE_NAME
    title = f"Defense of a {'classifier' if task == 'classification' else 'segmenter'}: {', '.join(sorted(datasets))}"
    body = [
        f"<h1>{html.escape(title)}</h1>",
        *_defended(artifacts, victim, rows, metric),
        "<h2>The threat ladder</h2>",
        ladder(rows, metric) or MISSING,
        ladder(rows, SMALL),
        smallest(rows),
        *_folded("Each attack by itself", attacks(rows, metric)),
        corruptions(rows, metric),
        "<h2>Against the size of the attack</h2>",
        *against_size(rows, metric),
        "<h2>Certified</h2>",
        certified(rows, metric),
        "<h2>What the queries bought</h2>",
        learning(folder, artifacts),
        *ledger(artifacts),
        *_grid(folder),
        "<h2>What is not covered</h2>",
        "<ul>" + "".join(f"<li>{html.escape(one)}</li>" for one in _NOT_COVERED) + "</ul>",
        "<h2>To reproduce it</h2>",
        *_settings(artifacts),
    ]
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
        f"<body>{''.join(body)}</body></html>\n"
    )
    replace_file(out, page.encode())
    return out


def _artifacts(folder: Path) -> Iterator[tuple[str, Manifest]]:
    for path in sorted(folder.rglob(MANIFEST_FILE)):
        place = path.parent
        yield (place.relative_to(folder).as_posix() if place != folder else folder.name), load_artifact(place).manifest


def _json(path: Path) -> dict[str, object]:
    if not path.exists():
        return {}
    found: dict[str, object] = json.loads(path.read_bytes())
    return found


def _subject(artifacts: Mapping[str, Manifest], victim: Mapping[str, object]) -> tuple[str, set[str]]:
    config = victim.get("config")
    told = config.get("task") if isinstance(config, dict) else None
    settings = [one.provenance.settings.get("task") for one in artifacts.values()]
    task = next((str(one) for one in (told, *settings) if one), "classification")
    return task, {one.provenance.data for one in artifacts.values()}


def _defended(
    artifacts: Mapping[str, Manifest], victim: Mapping[str, object], rows: Sequence[Row], metric: str
) -> Iterator[str]:
    yield "<h2>What was defended</h2><ul>"
    test = victim.get("test")
    if isinstance(test, dict):
        score = {name: test[name] for name in ("accuracy", "dice") if name in test}
        told = ", ".join(f"{name} {100 * value:.1f}%" for name, value in score.items())
        yield f"<li>A model with {victim.get('parameters'):,} parameters; on its test images: {told}.</li>"
    for name, manifest in artifacts.items():
        how = f"{manifest.queries_spent:,} queries" if manifest.queries_spent else "without a query"
        yield (
            f"<li><b>{html.escape(name)}</b>: {html.escape(_method(manifest))}, {how}, noise level "
            f"{manifest.sigma:g}, artifact {manifest.id}</li>"
        )
    yield "</ul>"
    if rows:
        images = sorted({(row.split, row.n) for row in rows if row.metric == metric})
        told = ", ".join(f"{n} ({split})" for split, n in images)
        yield f"<p><small>Images: {told}. Beside each number its 95% interval, by bootstrap over images.</small></p>"


def _folded(title: str, content: str) -> Iterator[str]:
    if content:
        yield f"<details><summary>{html.escape(title)}</summary>{content}</details>"


def _method(manifest: Manifest) -> str:
    made_by = manifest.provenance
    kind = made_by.estimator.get("kind") if isinstance(made_by.estimator, dict) else None
    return f"{made_by.method} by {kind}" if kind else made_by.method


def _grid(folder: Path) -> Iterator[str]:
    path = folder / "grid.png"
    if path.exists():
        yield "<h2>A few images</h2>"
        yield image(path.read_bytes(), "image/png", "clean, attacked and sanitized images, and the model's answers")


def _settings(artifacts: Mapping[str, Manifest]) -> Iterator[str]:
    for name, manifest in artifacts.items():
        told = {
            "estimator": manifest.provenance.estimator,
            "settings": manifest.provenance.settings,
            "versions": manifest.provenance.versions,
            "data": f"{manifest.provenance.data} ({manifest.provenance.data_fingerprint})",
            "architecture": manifest.architecture.model_dump(mode="json"),
            "weights": manifest.weights_sha256,
        }
        shown = html.escape(json.dumps(told, indent=1))
        yield from _folded(name, f"<pre>{shown}</pre>")
