"""What `training.evaluate` compares: the bare victim, and defenses in this process and behind gateways."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Final, Self

import torch
from pydantic import AfterValidator, Field, NonNegativeFloat, PositiveFloat, model_validator
from torch import Tensor

from defense.artifact import load_artifact
from defense.attacks import ATTACKS
from services.protocol.client import Endpoint
from services.settings import Commas, Repeated
from training.attack.oblivious import Defense
from training.command.config import DeviceConfig
from training.command.errors import UserError
from training.command.team import Team
from training.comparison.methods import METHODS
from training.comparison.runs import Run, build_front
from training.data.datasets import ImageSet, Splits
from training.fit.noise import with_noise
from training.measure.config import MeasureConfig, safe_name
from training.measure.endpoints import Connect, Defended, identify
from training.measure.results import NO_DEFENSE

_PRETRAINED: Final = ("pretrained", "autoencoder")
_BASELINES: Final = [name for name, method in METHODS.items() if method.kind != "learned" and name != NO_DEFENSE]


def _one_of(known: Sequence[str], name: str) -> str:
    if name not in known:
        raise ValueError(f"unknown: {name}; there are {', '.join(known)}")
    return name


def _named(text: str) -> str:
    name, separator, place = text.partition("=")
    if not separator or not place or name == NO_DEFENSE:
        raise ValueError(f"expected NAME=PLACE with a name other than {NO_DEFENSE!r}, got {text!r}")
    return f"{safe_name(name)}={place}"


Named = Annotated[str, AfterValidator(_named)]
"""NAME=PLACE."""


class EvaluateConfig(MeasureConfig, DeviceConfig):
    """Measures oblivious attacks."""

    victim: Path = Field(Path("artifacts/victim"), description="the victim's weights, to attack")
    victim_url: str | None = Field(None, description="where the bare victim answers (default: in this process)")
    gateway: Repeated[Named] = Field((), description="NAME=URL, a gateway; may be repeated")
    artifact: Repeated[Named] = Field((), description="NAME=DIR, a sanitizer, in process; may be repeated")
    baselines: Commas[Annotated[str, AfterValidator(partial(_one_of, _BASELINES))]] = Field(
        (), description=f"comma-separated, in process, of {', '.join(_BASELINES)}"
    )
    pretrained: Path | None = Field(None, description="what training.pretrain wrote, for baselines from there")
    sigma: PositiveFloat = Field(0.25, description="of the baseline noise")
    attacks: Commas[Annotated[str, AfterValidator(partial(_one_of, list(ATTACKS)))]] = Field(
        (), description=f"comma-separated, of {', '.join(ATTACKS)} (all that the task has)"
    )
    epsilons_linf: Commas[NonNegativeFloat] = Field((1.0, 2.0, 4.0, 8.0), description="comma-separated, in 1/255")
    epsilons_l2: Commas[NonNegativeFloat] = Field((0.5, 1.0, 2.0), description="comma-separated, in units of [0,1]")

    @model_validator(mode="after")
    def _checked(self) -> Self:
        names = [NO_DEFENSE, *self.baselines, *(one.partition("=")[0] for one in (*self.artifact, *self.gateway))]
        if len(set(names)) != len(names):
            raise ValueError("every --gateway, --artifact and baseline needs a name of its own")
        if self.pretrained is None and any(METHODS[name].kind in _PRETRAINED for name in self.baselines):
            raise ValueError("these baselines are pre-trained: make them with training.pretrain, and name --pretrained")
        return self


@contextmanager
def defenses(
    config: EvaluateConfig, bare: Endpoint, splits: Splits, chosen: ImageSet, team: Team, connect: Connect
) -> Iterator[tuple[Defense, ...]]:
    """The lines of the table: bare victim, baselines, artifacts, gateways.

    Raises UserError if one of them is missing or is for other images.
    """
    with ExitStack() as clients:
        found = [Defense(NO_DEFENSE, bare, 0), *_in_front(config, bare, splits, team)]
        for name, _, url in (one.partition("=") for one in config.gateway):
            endpoint = clients.enter_context(connect(url))
            identity = identify(endpoint, url, chosen.images[0], splits.labels)
            if identity.artifact is None:
                raise UserError(f"no gateway answers at {url}, but a bare victim: --gateway {name} needs a gateway")
            found.append(Defense(name, endpoint, identity.queries))
        yield tuple(found)


def _in_front(config: EvaluateConfig, victim: Endpoint, splits: Splits, team: Team) -> Iterator[Defense]:
    """The defenses that run in this process, wherever the victim is."""
    device = team.device(config.device)
    source = torch.Generator().manual_seed(config.seed + team.rank)

    def noisy(images: Tensor) -> Tensor:
        """One noisy copy; the smoothed victim is `training.certify`'s and `training.compare`'s."""
        return with_noise(images, config.sigma, source)

    for name in config.baselines:
        front, _ = build_front(Run(name, 0, 0), config.results.parent, config.pretrained, device)
        yield Defense(name, Defended(noisy if name == "noise" else front, victim, device), 0)
    for name, _, folder in (one.partition("=") for one in config.artifact):
        artifact = load_artifact(Path(folder))
        if artifact.manifest.input.dimensions != tuple(splits.test.images.shape[1:]):
            raise UserError(f"--artifact {name} takes other images: use its --size and --channels")
        sanitizer = artifact.sanitizer.to(device).eval().to(memory_format=torch.channels_last)
        yield Defense(name, Defended(sanitizer, victim, device), artifact.manifest.queries_spent)
