"""The attackers of a red team, made ready: weights loaded, the gateway reached."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Final

import torch

from defense.artifact import load_artifact
from services.device import resolve_device
from services.protocol.client import HTTPVictim
from services.protocol.mapping import load_mapping
from training.attack.config import RedTeamConfig
from training.attack.insider import Insider
from training.attack.outsider import Outsider
from training.command.errors import UserError
from training.data.datasets import ImageSet, Splits
from training.measure.endpoints import Identity, identify
from training.victim.in_process import in_process

_PATIENCE_S: Final = 10.0
"""How long the outsider waits where the gateway is away or refuses, in seconds: rates pass, suspicion does not."""


@dataclass(frozen=True)
class Parties:
    """The attackers, `insider` and `outsider` (either may be missing), and their target."""

    insider: Insider | None
    outsider: Outsider | None
    target: Identity


@contextmanager
def parties(config: RedTeamConfig, splits: Splits, chosen: ImageSet) -> Iterator[Parties]:
    """The attackers of a configuration; UserError if artifact, gateway and images do not fit each other."""
    device = resolve_device(config.device)
    with ExitStack() as stack:
        insider, inside = _insider(config, splits, chosen, device, stack)
        outsider, outside = _outsider(config, splits, chosen, device, stack)
        if inside is not None and outside is not None and inside.artifact != outside.artifact:
            raise UserError(
                f"the gateway serves {outside.artifact or 'no artifact'}, --artifact is "
                f"{inside.artifact or 'not given'}: name the artifact that it serves"
            )
        target = inside or outside
        assert target is not None  # the configuration names one
        yield Parties(insider, outsider, target)


def _insider(
    config: RedTeamConfig, splits: Splits, chosen: ImageSet, device: torch.device, stack: ExitStack
) -> tuple[Insider | None, Identity | None]:
    if config.victim is None:
        return None, None
    sanitizer, sigma, target = None, 0.0, Identity(artifact=None, queries=0)
    if config.artifact is not None:
        artifact = load_artifact(config.artifact)
        manifest = artifact.manifest
        if tuple(chosen.images.shape[1:]) != manifest.input.dimensions:
            raise UserError(f"{config.artifact} takes other images: use its --size and --channels")
        sanitizer, sigma = artifact.sanitizer.to(device).eval().requires_grad_(False), manifest.sigma
        target = Identity(manifest.id, manifest.queries_spent, manifest.name)
    victim = stack.enter_context(in_process(config.victim, device, splits))
    insider = Insider(
        victim.model,
        sanitizer,
        chosen.images.to(device),
        chosen.labels.to(device),
        sigma=sigma,
        votes=config.votes,
        eot=config.eot,
        steps=config.steps,
        seed=config.seed,
    )
    return insider, target


def _outsider(
    config: RedTeamConfig, splits: Splits, chosen: ImageSet, device: torch.device, stack: ExitStack
) -> tuple[Outsider | None, Identity | None]:
    url = config.gateway_url
    if url is None:
        return None, None
    mapping = load_mapping(config.gateway_mapping)
    endpoint = stack.enter_context(HTTPVictim([url], patience_s=_PATIENCE_S, mapping=mapping))
    target = identify(endpoint, url, chosen.images[0], splits.labels)
    outsider = Outsider(
        endpoint,
        chosen.images,
        chosen.labels,
        splits.train.images,
        queries=config.queries,
        student_queries=config.student_queries,
        student_steps=config.student_steps or (1200 if chosen.labels.ndim == 1 else 400),
        steps=config.steps,
        seed=config.seed,
        device=device,
    )
    return outsider, target
