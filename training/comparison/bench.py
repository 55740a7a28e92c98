"""How a comparison goes: run by run, each learned, measured and certified, and none that another process is at."""

import json
import logging
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from pydantic import JsonValue

from defense.artifact import MANIFEST_FILE, load_artifact
from services.device import resolve_device
from services.protocol.client import Endpoint
from training.certificates.certification import certify_images
from training.certificates.config import settled_certificate
from training.certificates.files import Settings, read_output, settings_for
from training.command.errors import UserError
from training.comparison.claims import claim, locked
from training.comparison.config import CompareConfig
from training.comparison.fitting import learn
from training.comparison.methods import METHODS
from training.comparison.runs import Record, Run, build_front, certificates_path, finished
from training.comparison.summary import CLAIM, summarize
from training.data.datasets import ImageSet, Splits, load_data, settled
from training.fit.checkpoint import Journal
from training.fit.pretraining import SANITIZERS, load_pretrained
from training.measure.endpoints import Defended, identify
from training.measure.results import NO_DEFENSE
from training.measure.scoring import main_score
from training.measure.selection import chosen_images
from training.victim.config import Connect
from training.victim.in_process import in_process, refuse_another_victim

logger = logging.getLogger(__name__)

_PATIENCE_S = 120.0


@dataclass(frozen=True)
class Bench:
    """What all runs of one command share.

    Attributes:
        shared: Settings of the certificates, without name and artifact.
        indices: Places of the `chosen` images in their split.
        endpoint: The bare victim.
        device: Where sanitizers run.
    """

    config: CompareConfig
    shared: Settings
    indices: list[int]
    chosen: ImageSet
    endpoint: Endpoint
    device: torch.device

    def measure(self, run: Run) -> None:
        """Measures the clean score of a run, and certifies what its file lacks."""
        begun = time.monotonic()
        out = self.config.out
        front, artifact = build_front(run, out, self.config.pretrained, self.device)
        made = None if artifact is None else artifact.manifest.id
        if (before := finished(out, run, len(self.indices))) and before.artifact == made:
            logger.info("%s: measured before", run)
            return
        defended = Defended(front, self.endpoint, self.device)
        clean = main_score(defended(self.chosen.images).argmax(dim=1), self.chosen.labels).tolist()
        Record(
            run=run,
            white_box=METHODS[run.method].white_box,
            victim="in process" if self.config.victim else "over HTTP",
            artifact=made,
            queries=0 if artifact is None else artifact.manifest.queries_spent,
            clean=list(zip(self.indices, clean, strict=True)),
        ).save(out)
        told = f"clean {100 * sum(clean) / len(clean):.1f}%"
        if run.method != NO_DEFENSE:
            settings = replace(self.shared, name=str(run), artifact=made)
            lines = certify_images(defended, self.chosen, self.indices, certificates_path(out, run), settings)
            told += f", certified {100 * sum(line.score for line in lines) / len(lines):.1f}%"
        logger.info("%s: measured in %.0f s: %s", run, time.monotonic() - begun, told)


def compare(config: CompareConfig, connect: Connect) -> list[Run]:
    """Learns, measures and certifies all runs, and makes the summary; returns the runs that could not be learned.

    Raises UserError if the folder holds other runs than these, or the victim is another one or unavailable.
    """
    device = resolve_device(config.device)
    splits = load_data(config)
    indices, chosen = chosen_images(splits, config.split, config.limit, config.seed)
    config = settled_certificate(settled(config), chosen)
    opened: AbstractContextManager[Endpoint]
    if config.victim:
        opened = in_process(config.victim, device, splits)
    else:
        opened = connect(config.victim_url, patience_s=_PATIENCE_S, **config.wire_options())
    failed = []
    with opened as endpoint:
        where = str(config.victim or ", ".join(config.victim_url))
        if identify(endpoint, where, chosen.images[0], splits.labels).artifact is not None:
            raise UserError(f"a gateway answers at {where}: name the bare victim")
        shared = settings_for(config, splits, split=config.split, seed=config.seed, stop_early=config.stop_early)
        _claim(config, shared, endpoint, splits, chosen)
        bench = Bench(config, shared, indices, chosen, endpoint, device)
        for run in config.runs:
            with locked(config.out / "locks" / f"{run}.lock".replace("/", "-"), wait=False) as mine:
                if not mine:
                    logger.info("%s: another process is at it, so it is left to that one", run)
                elif METHODS[run.method].kind == "learned" and not learn(run, config, splits, endpoint):
                    failed.append(run)
                    if not endpoint.ready():
                        raise UserError(f"nothing is ready at {where}: start it, and give the same command again")
                else:
                    bench.measure(run)
    summarize(config)
    return failed


def _claim(config: CompareConfig, shared: Settings, endpoint: Endpoint, splits: Splits, chosen: ImageSet) -> None:
    """Refuses to mix runs of other settings, other pre-trained parts or another victim in one folder."""
    ids: dict[str, JsonValue] = {}
    if config.pretrained:
        for name in SANITIZERS:
            load_pretrained(config.pretrained, name, splits, config.sigma)  # refuses what does not fit
            ids[name] = load_artifact(config.pretrained / name).manifest.id
    notes: dict[str, JsonValue] = {**asdict(shared), "shape": list(shared.shape), "images": len(chosen), **ids}
    claim(config.out / CLAIM, notes)
    refuse_another_victim(config.out / "victim.json", endpoint, chosen.images)


def print_plan(config: CompareConfig) -> None:
    """Prints the runs and how far they are."""
    for run in config.runs:
        bound = f"{run.steps} steps" if run.steps else f"{run.budget:,} queries"
        print(f"{run!s:<32} {bound:>16}  {_state(run, config.out)}")


def _state(run: Run, out: Path) -> str:
    lines = read_output(certificates_path(out, run))
    images = json.loads((out / CLAIM).read_bytes())["images"] if (out / CLAIM).exists() else 0
    if images and finished(out, run, images):
        return "done"
    if lines:
        return f"{len(lines)} of {images} images certified"
    if (out / run.place / MANIFEST_FILE).exists():
        return "learned"
    spent = Journal.total(out / run.place)
    return f"{spent:,} queries spent" if spent else "to do"
