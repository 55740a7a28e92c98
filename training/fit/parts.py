"""The parts of a `zo_fit` run, as its arguments name them: estimator, settings of loop and surrogate."""

import argparse
import math
from dataclasses import fields, is_dataclass

import torch
from pydantic import JsonValue

from defense.artifact import MethodName
from defense.estimators import (
    CoordinateGradientEstimator,
    Difference,
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
from defense.surrogates import Surrogate, SurrogateSettings
from defense.victims import MeteredVictim, QueryLedger
from defense.votes import VotingVictim
from training.command.errors import UserError
from training.fit.options import AUTO
from training.fit.settings import FitSettings
from training.fit.student import Student
from training.measure.endpoints import Endpoint

_LARGEST_WARM_UP = 20_000  # queries, unless told: the others are asked where the sanitizer is by then
_OF_RGE = ("sampling", "subspace", "guided")
_OF_THE_SURROGATE = ("warm_up", "warm_up_steps", "student_steps", "keep_surrogate")


def uses_surrogate(arguments: argparse.Namespace) -> bool:
    """Whether the method needs a student of the victim."""
    of_rge = arguments.estimator == "rge" and (arguments.guided or arguments.extra)
    return bool(arguments.estimator == "surrogate" or of_rge)


def refuse_meaningless(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Raises UserError for a flag that would be ignored beside the others."""
    rge, surrogate = arguments.estimator == "rge", uses_surrogate(arguments)
    applies = {
        **dict.fromkeys(_OF_RGE, (rge, "--estimator rge")),
        "directions": (rge or arguments.estimator == "local", "--estimator rge or local"),
        "window": (arguments.estimator == "local", "--estimator local"),
        "rank": (rge and arguments.subspace == "dct", "--subspace dct"),
        **dict.fromkeys(_OF_THE_SURROGATE, (surrogate, "a method with a surrogate")),
        "extra": (rge or arguments.estimator == "surrogate", "--estimator rge or surrogate"),
        "vote_noise": (arguments.votes > 1, "--votes"),
    }
    for name, (meaningful, where) in applies.items():
        if not meaningful and getattr(arguments, name) != parser.get_default(name):
            raise UserError(f"--{name.replace('_', '-')} means nothing without {where}: leave it out")
    if uses_surrogate(arguments) and arguments.warm_up and arguments.warm_up >= arguments.max_queries:
        raise UserError(
            f"--warm-up {arguments.warm_up} leaves nothing of --max-queries {arguments.max_queries}: lower it"
        )


def needs_differences(arguments: argparse.Namespace) -> bool:
    """Whether the method takes finite differences of the victim's answers, and so a step that its noise allows."""
    return arguments.estimator not in ("exact", "surrogate")


def difference_of(arguments: argparse.Namespace) -> Difference:
    """How the method takes slopes."""
    difference: Difference = arguments.difference or ("central" if arguments.estimator == "cge" else "forward")
    return difference


def surrogate_settings(arguments: argparse.Namespace) -> SurrogateSettings:
    """How the student learns."""
    warm_up = max(1, (arguments.warm_up or min(arguments.max_queries // 3, _LARGEST_WARM_UP)) // arguments.votes)
    return SurrogateSettings(
        warm_up=warm_up,
        warm_up_steps=arguments.warm_up_steps or math.ceil(warm_up / 10),
        steps=arguments.student_steps,
    )


def build_estimator(arguments: argparse.Namespace, sanitizer: Sanitizer, mu: float) -> Estimator:
    """The estimator that the arguments name.

    Args:
        arguments: Those of `add_zo_arguments`.
        sanitizer: What will be trained.
        mu: The step of finite differences.

    Raises:
        UserError: The arguments do not fit each other, or the sanitizer.
    """
    estimator = _estimator_of_batch(arguments, sanitizer, mu)
    if arguments.extra and not isinstance(estimator, SurrogateGradient):
        return Extrapolation(estimator, arguments.batch)
    return estimator


def _estimator_of_batch(arguments: argparse.Namespace, sanitizer: Sanitizer, mu: float) -> Estimator:
    """The estimator at the images that are paid for; the surrogate's own gradient also at those that are not."""
    difference = difference_of(arguments)
    match arguments.estimator:
        case "cge":
            return CoordinateGradientEstimator(mu, difference)
        case "local":
            if sanitizer.autoencoder is not None and len(sanitizer.autoencoder.code_shape) != 3:
                raise UserError("--estimator local needs a border with cells: --sanitizer denoiser, or a conv code")
            try:
                return LocalGradientEstimator(arguments.directions, mu, arguments.window)
            except ValueError as error:
                raise UserError(f"--window: {error}") from error
        case "surrogate":
            return SurrogateGradient(asked=arguments.batch)
        case "exact":
            return ExactGradient()
    where = _directions(arguments, sanitizer)
    if arguments.guided:
        return RandomGradientEstimator(arguments.directions, mu, Guided(where), difference, "projection")
    return RandomGradientEstimator(arguments.directions, mu, where, difference)


def _directions(arguments: argparse.Namespace, sanitizer: Sanitizer) -> Directions:
    if arguments.subspace == "none":
        _refuse_too_many(arguments, sanitizer.border_dimension)
        return Isotropic(arguments.sampling)
    if sanitizer.autoencoder is not None:
        raise UserError("--subspace is one of image space: add --sanitizer denoiser")
    side = round((arguments.rank / sanitizer.config.input.channels) ** 0.5)
    try:
        rows = low_frequencies(sanitizer.config.input.dimensions, side)
    except ValueError as error:
        raise UserError(f"{error}: choose another --rank, channels times a square") from error
    if len(rows) != arguments.rank:
        raise UserError(f"--rank has to be channels times a square, for instance {len(rows)}")
    _refuse_too_many(arguments, len(rows))
    return Subspace(rows, arguments.sampling)


def _refuse_too_many(arguments: argparse.Namespace, dimension: int) -> None:
    if arguments.sampling == "orthonormal" and arguments.directions > dimension:
        raise UserError(
            f"--sampling orthonormal has at most {dimension} directions here, not {arguments.directions}: "
            "lower --directions"
        )


def method_name(arguments: argparse.Namespace) -> MethodName:
    """What the artifact calls the method."""
    at_image = arguments.sanitizer == "denoiser"
    if arguments.estimator == "exact":
        return "fo-ds" if at_image else "fo-ae-ds"
    return "zo-ds" if at_image else "zo-ae-ds"


def recorded(part: object) -> JsonValue:
    """An estimator, or a part of one, as the JSON that an artifact keeps: its class and its settings."""
    if is_dataclass(part):
        settings = {field.name: recorded(getattr(part, field.name)) for field in fields(part)}
        return {"kind": type(part).__name__, **settings}
    return part if isinstance(part, str | int | float | bool | None) else type(part).__name__


def fit_settings(arguments: argparse.Namespace) -> FitSettings:
    """The loop's settings."""
    return FitSettings(
        sigma=arguments.sigma,
        less_noise=arguments.less_noise,
        batch=arguments.batch,
        extra=arguments.extra,
        learning_rate=arguments.learning_rate,
        mse_weight=arguments.mse_weight,
        clip=arguments.clip,
        schedule=arguments.schedule,
        averaging=arguments.averaging,
        reconstruction="chosen" if arguments.sanitizer == AUTO else "kept",
        steps=arguments.steps,
        validate_every=arguments.validate_every,
        checkpoint_every=arguments.checkpoint_every,
        seed=arguments.seed,
    )


def metered(client: Endpoint, ledger: QueryLedger, arguments: argparse.Namespace) -> MeteredVictim:
    """The victim behind its ledger, and behind votes where they are asked for."""
    if arguments.votes == 1:
        return MeteredVictim(client, ledger)
    # Its noise is no part of a checkpoint; a resumed run shall at least not see that of the first steps again.
    voting = VotingVictim(client, arguments.votes, arguments.vote_noise, arguments.seed + ledger.total)
    return MeteredVictim(voting, ledger, queries_per_image=voting.queries_per_image)


def build_student(
    arguments: argparse.Namespace,
    sanitizer: Sanitizer,
    classes: int,
    positions: tuple[int, ...],
    device: torch.device,
    *,
    writes: bool = True,
) -> Student | None:
    """The surrogate, where the method uses one.

    Args:
        arguments: Those of `add_zo_arguments`.
        sanitizer: What will be trained.
        classes: K of the victim.
        positions: The axes of its answers behind the classes.
        device: Where the surrogate learns.
        writes: Whether this process keeps it on disk.

    Raises:
        UserError: The method does not fit what the victim answers.
    """
    if arguments.estimator == "local" and not positions:
        raise UserError("--estimator local needs a victim that answers masks; this one answers classes: use rge")
    if not uses_surrogate(arguments):
        return None
    shape = sanitizer.config.input.dimensions
    surrogate = Surrogate(shape, classes, surrogate_settings(arguments), arguments.seed, device, positions)
    return Student(surrogate, arguments.out, writes=writes)
