"""The parts of a run of `zo_fit`, made from its configuration: estimator, student and metered victim."""

from dataclasses import fields, is_dataclass
from pathlib import Path

import torch
from pydantic import JsonValue

from defense.estimators import (
    CoordinateGradientEstimator,
    Directions,
    Estimator,
    ExactGradient,
    Extrapolation,
    Guided,
    Isotropic,
    LocalGradientEstimator,
    RandomGradientEstimator,
    Subspace,
    SurrogateGradient,
    low_frequencies,
)
from defense.sanitizer import Sanitizer
from defense.surrogates import Surrogate
from defense.victims import MeteredVictim, QueryLedger
from defense.votes import VotingVictim
from services.protocol.client import Endpoint
from training.command.errors import UserError
from training.fit.config import FitConfig
from training.fit.student import Student


def build_estimator(config: FitConfig, sanitizer: Sanitizer, mu: float) -> Estimator:
    """The estimator of a configuration, with finite-difference step `mu`; UserError if it does not fit."""
    match config.estimator:
        case "cge":
            return CoordinateGradientEstimator(mu, config.slopes)
        case "local":
            if sanitizer.autoencoder is not None and len(sanitizer.autoencoder.code_shape) != 3:
                raise UserError("--estimator local needs a border with cells: --sanitizer denoiser, or a conv code")
            return LocalGradientEstimator(config.directions, mu, config.window)
        case "surrogate":
            return SurrogateGradient(asked=config.batch)  # also at the images that only the surrogate is asked about
        case "exact":
            return ExactGradient()
    where = _directions(config, sanitizer)
    if config.guided:
        random = RandomGradientEstimator(config.directions, mu, Guided(where), config.slopes, "projection")
    else:
        random = RandomGradientEstimator(config.directions, mu, where, config.slopes)
    return Extrapolation(random, config.batch) if config.extra else random


def _directions(config: FitConfig, sanitizer: Sanitizer) -> Directions:
    if config.subspace == "none":
        try:
            config.refuse_too_many_directions(sanitizer.border_dimension)
        except ValueError as error:
            raise UserError(str(error)) from error
        return Isotropic(config.sampling)
    side = round((config.rank / sanitizer.config.input.channels) ** 0.5)
    try:
        rows = low_frequencies(sanitizer.config.input.dimensions, side)
    except ValueError as error:
        raise UserError(f"{error}: choose another --rank, channels times a square") from error
    if len(rows) != config.rank:
        raise UserError(f"--rank has to be channels times a square, for instance {len(rows)}")
    return Subspace(rows, config.sampling)


def recorded(part: object) -> JsonValue:
    """An estimator, or a part of one, as the JSON that an artifact keeps: its class and its settings."""
    if is_dataclass(part):
        settings = {field.name: recorded(getattr(part, field.name)) for field in fields(part)}
        return {"kind": type(part).__name__, **settings}
    return part if isinstance(part, str | int | float | bool | None) else type(part).__name__


def metered(victim: Endpoint, ledger: QueryLedger, config: FitConfig) -> MeteredVictim:
    """The victim behind its ledger, and behind votes where they are asked for."""
    if config.votes == 1:
        return MeteredVictim(victim, ledger)
    # Its noise is no part of a checkpoint; a resumed run shall at least not see that of the first steps again.
    voting = VotingVictim(victim, config.votes, config.vote_noise, config.seed + ledger.total)
    return MeteredVictim(voting, ledger, queries_per_image=voting.queries_per_image)


def build_student(
    config: FitConfig,
    sanitizer: Sanitizer,
    classes: int,
    positions: tuple[int, ...],
    device: torch.device,
    folder: Path,
    *,
    writes: bool = True,
) -> Student | None:
    """The surrogate of a victim with these classes and score positions; None if the method uses none.

    Raises UserError if the method does not fit what the victim answers.
    """
    if config.estimator == "local" and not positions:
        raise UserError("--estimator local needs a victim that answers masks; this one answers classes: use rge")
    if not config.uses_surrogate:
        return None
    shape = sanitizer.config.input.dimensions
    surrogate = Surrogate(shape, classes, config.surrogate_settings, config.seed, device, positions)
    return Student(surrogate, folder, writes=writes)
