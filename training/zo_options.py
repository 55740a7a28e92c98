"""The arguments of `zo_fit`, and the parts that they name."""

import argparse
import math
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args

from pydantic import JsonValue

from defense.artifact import MethodName
from defense.autoencoders import Autoencoder
from defense.denoisers import WienerUNetDenoiser
from defense.estimators import (
    Basis,
    Combination,
    ControlVariate,
    CoordinateGradientEstimator,
    DecoderTangents,
    Difference,
    Directions,
    Estimator,
    ExactGradient,
    FixedSpan,
    Guided,
    Isotropic,
    RandomGradientEstimator,
    Sampling,
    Subspace,
    SurrogateGradient,
    SurrogateSpan,
    low_frequencies,
)
from defense.sanitizer import Sanitizer
from defense.surrogates import SurrogateSettings
from training import cli, pretrain
from training.meeting import add_answer_arguments
from training.zo_settings import FitSettings

AUTO = "auto"
"""The choice of --sanitizer that leaves the reconstruction to validation, and of --mu that leaves it to the probe."""


def add_zo_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds all arguments but those of data and device."""
    victim = parser.add_argument_group("the victim")
    victim.add_argument("--victim-url", action="append", required=True, help="repeat it for replicas of one victim")
    victim.add_argument("--max-queries", type=cli.positive_int, default=40_000, help="hard budget (default 40000)")
    victim.add_argument(
        "--patience", type=cli.positive_float, default=120.0, help="seconds to wait for a victim that is away"
    )
    victim.add_argument("--batch-images", type=cli.positive_int, default=256, help="images a request (default 256)")
    victim.add_argument("--in-flight", type=cli.positive_int, default=4, help="requests at once (default 4)")
    add_answer_arguments(victim)

    method = parser.add_argument_group("the method")
    method.add_argument(
        "--sanitizer",
        choices=(*pretrain.SANITIZERS, AUTO),
        default="denoiser+autoencoder",
        help="denoiser+autoencoder: ZO-AE-DS, the default; denoiser: ZO-DS, the gradient is estimated at the image; "
        "auto: trained as ZO-AE-DS, served with or without the reconstruction, whichever validates better",
    )
    method.add_argument(
        "--estimator",
        choices=("rge", "cge", "surrogate", "exact"),
        default="rge",
        help="rge: random directions, the default; cge: coordinates; surrogate: the gradient of a student of the "
        "victim's answers; exact: automatic differentiation, for an open model in process",
    )
    method.add_argument(
        "--live-only", action="store_true", help="CGE leaves out what is exactly zero: the code's units that are dead"
    )
    method.add_argument("--directions", type=cli.positive_int, default=20, help="q of RGE (default 20)")
    method.add_argument("--sampling", choices=get_args(Sampling), default="sphere", help="RGE's directions")
    method.add_argument(
        "--subspace",
        choices=("none", "dct", "components", "decoder", "surrogate"),
        default="none",
        help="where RGE looks: everywhere; low frequencies; principal components of the images; tangents of the "
        "pre-trained decoder; principal directions of the surrogate's gradients (all but none: --sanitizer denoiser)",
    )
    method.add_argument("--rank", type=cli.positive_int, default=64, help="dimensions of the subspace (default 64)")
    method.add_argument(
        "--rotated", type=cli.share, default=0.0, help="share of them that are random, drawn anew each step (default 0)"
    )
    method.add_argument(
        "--guided", action="store_true", help="RGE's first direction is the surrogate's gradient; implies projection"
    )
    method.add_argument("--control-variate", action="store_true", help="RGE only of what the surrogate leaves open")
    method.add_argument(
        "--combine",
        choices=get_args(Combination),
        default="unbiased",
        help="of RGE's slopes: unbiased, the default; projection on their directions: shorter, biased towards zero",
    )
    method.add_argument(
        "--difference", choices=get_args(Difference), help="default: forward for RGE, central for CGE, as published"
    )
    method.add_argument(
        "--mu", type=_step, default=AUTO, help="step, in L2 norm; auto: what the probe finds clear of noise (default)"
    )
    method.add_argument("--batch", type=cli.positive_int, default=32, help="images an optimiser step (default 32)")
    method.add_argument("--learning-rate", type=cli.positive_float, default=3e-5, help="Adam's (default 3e-5)")
    method.add_argument(
        "--schedule", choices=("constant", "cosine"), default="constant", help="of the learning rate (default constant)"
    )
    method.add_argument(
        "--averaging", type=cli.share, default=0.0, help="decay of the weights' exponential average (default 0: none)"
    )
    method.add_argument(
        "--mse-weight", type=cli.non_negative_float, default=50.0, help="weight of the MSE term (default 50; 0: none)"
    )
    method.add_argument("--clip", type=cli.positive_float, default=1.0, help="bound on the gradient norm (default 1)")
    method.add_argument("--steps", type=cli.positive_int, help="at most so many steps; default: the budget decides")
    method.add_argument("--validation-images", type=cli.positive_int, default=512, help="at most so many (default 512)")
    method.add_argument("--validate-every", type=cli.positive_int, default=10, help="steps (default 10)")

    surrogate = parser.add_argument_group("the surrogate, where the method uses one")
    surrogate.add_argument(
        "--warm-up", type=cli.positive_int, help="queries it learns from before the first step (default: a fifth)"
    )
    surrogate.add_argument(
        "--warm-up-steps", type=cli.positive_int, help="its optimiser steps on them (default: one for ten queries)"
    )
    surrogate.add_argument(
        "--student-steps", type=cli.positive_int, default=2, help="its optimiser steps after each step (default 2)"
    )
    surrogate.add_argument(
        "--slope-weight", type=cli.non_negative_float, default=0.0, help="of slopes beside answers (default 0)"
    )
    surrogate.add_argument(
        "--checked", type=cli.non_negative_int, default=16, help="images a step whose slope is measured (default 16)"
    )
    surrogate.add_argument(
        "--keep-surrogate",
        action="store_true",
        help="keep it, a partial copy of the victim, in OUT after training (default: it is deleted)",
    )

    start = parser.add_argument_group("where it starts and ends")
    start.add_argument(
        "--pretrained",
        type=Path,
        help="what training.pretrain wrote, its models as they are; default: pre-train first, into OUT/pretrained",
    )
    pretrain.add_model_arguments(start)
    start.add_argument("--out", type=Path, default=Path("artifacts/defense"), help="folder of artifact and checkpoint")
    start.add_argument("--checkpoint-every", type=cli.positive_int, default=5, help="steps (default 5)")
    start.add_argument("--resume", action="store_true", help="continue the run in OUT, its ledger intact")


def _step(text: str) -> str | float:
    return text if text == AUTO else cli.positive_float(text)


def difference_of(arguments: argparse.Namespace) -> Difference:
    """How the method takes slopes."""
    if arguments.estimator == "surrogate":
        return "forward"
    difference: Difference = arguments.difference or ("central" if arguments.estimator == "cge" else "forward")
    return difference


def needs_differences(arguments: argparse.Namespace) -> bool:
    """Whether the method takes finite differences of the victim's answers, and so a step that its noise allows."""
    return arguments.estimator != "exact" and not (arguments.estimator == "surrogate" and arguments.checked == 0)


def uses_surrogate(arguments: argparse.Namespace) -> bool:
    """Whether the method needs a student of the victim."""
    flags = arguments.guided or arguments.control_variate or arguments.subspace == "surrogate"
    return bool(arguments.estimator == "surrogate" or (arguments.estimator == "rge" and flags))


def surrogate_settings(arguments: argparse.Namespace) -> SurrogateSettings:
    """How the student learns."""
    warm_up = max(1, (arguments.warm_up or arguments.max_queries // 5) // arguments.votes)
    return SurrogateSettings(
        warm_up=warm_up,
        warm_up_steps=arguments.warm_up_steps or math.ceil(warm_up / 10),
        steps=arguments.student_steps,
        slope_weight=arguments.slope_weight,
    )


def build_estimator(
    arguments: argparse.Namespace, sanitizer: Sanitizer, autoencoder: Autoencoder | None, mu: float
) -> Estimator:
    """The estimator that the arguments name.

    Args:
        arguments: Those of `add_zo_arguments`.
        sanitizer: What will be trained.
        autoencoder: The pre-trained one, for --subspace decoder.
        mu: The step of finite differences.

    Raises:
        UserError: The arguments do not fit each other, or the sanitizer.
    """
    difference = difference_of(arguments)
    match arguments.estimator:
        case "cge":
            return CoordinateGradientEstimator(mu, difference, arguments.live_only)
        case "surrogate":
            try:
                return SurrogateGradient(arguments.checked, mu)
            except ValueError as error:
                raise cli.UserError(f"--checked: {error}") from error
        case "exact":
            return ExactGradient()
    where = _directions(arguments, sanitizer, autoencoder)
    if arguments.guided:
        where = Guided(where)
    combine: Combination = "projection" if arguments.guided else arguments.combine
    try:
        random = RandomGradientEstimator(arguments.directions, mu, where, difference, combine)
    except ValueError as error:
        raise cli.UserError(f"{error} (--combine projection)") from error
    return ControlVariate(random) if arguments.control_variate else random


def _directions(arguments: argparse.Namespace, sanitizer: Sanitizer, autoencoder: Autoencoder | None) -> Directions:
    if arguments.subspace == "none":
        _refuse_too_many(arguments, sanitizer.border_dimension)
        return Isotropic(arguments.sampling)
    if sanitizer.autoencoder is not None:
        raise cli.UserError("--subspace is one of image space: add --sanitizer denoiser")
    basis: Basis
    match arguments.subspace:
        case "decoder":
            assert autoencoder is not None  # loaded for this
            _refuse_too_many(arguments, autoencoder.code_dimension)
            return DecoderTangents(autoencoder)
        case "surrogate":
            rank = arguments.rank
            if rank > arguments.batch:
                raise cli.UserError(f"--rank {rank} needs the gradients of as many images: raise --batch, or lower it")
            basis = SurrogateSpan(rank)
        case "components":
            if not isinstance(sanitizer.denoiser, WienerUNetDenoiser):
                raise cli.UserError("--subspace components takes those of the denoiser wiener-unet: use that one")
            basis = FixedSpan(sanitizer.denoiser.components.basis[: arguments.rank].clone())
            rank = len(basis.rows)
        case _:
            side = round((arguments.rank / sanitizer.config.input.channels) ** 0.5)
            try:
                basis = FixedSpan(low_frequencies(sanitizer.config.input.dimensions, side))
            except ValueError as error:
                raise cli.UserError(f"{error}: choose another --rank, channels times a square") from error
            rank = len(basis.rows)
    _refuse_too_many(arguments, rank)
    return Subspace(basis, rank, arguments.sampling, arguments.rotated)


def _refuse_too_many(arguments: argparse.Namespace, dimension: int) -> None:
    if arguments.sampling == "orthonormal" and arguments.directions > dimension:
        raise cli.UserError(
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
        batch=arguments.batch,
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
