"""The arguments of `zo_fit`, and the parts that they name."""

import argparse
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args

from pydantic import JsonValue

from defense.estimators import (
    CoordinateGradientEstimator,
    Difference,
    Estimator,
    Isotropic,
    RandomGradientEstimator,
    Sampling,
)
from defense.sanitizer import Sanitizer
from training import cli, pretrain
from training.zo_trainer import FitSettings


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

    method = parser.add_argument_group("the method")
    method.add_argument(
        "--sanitizer",
        choices=pretrain.SANITIZERS,
        default="denoiser+autoencoder",
        help="denoiser+autoencoder: ZO-AE-DS, the default; denoiser: ZO-DS, the gradient is estimated at the image",
    )
    method.add_argument("--estimator", choices=("rge", "cge"), default="rge", help="random or coordinate directions")
    method.add_argument("--directions", type=cli.positive_int, default=20, help="q of RGE (default 20)")
    method.add_argument("--sampling", choices=get_args(Sampling), default="sphere", help="RGE's directions")
    method.add_argument(
        "--difference", choices=get_args(Difference), help="default: forward for RGE, central for CGE, as published"
    )
    method.add_argument("--mu", type=cli.positive_float, default=0.005, help="step, in L2 norm (default 0.005)")
    method.add_argument("--batch", type=cli.positive_int, default=32, help="images an optimiser step (default 32)")
    method.add_argument("--learning-rate", type=cli.positive_float, default=3e-5, help="Adam's (default 3e-5)")
    method.add_argument(
        "--mse-weight", type=cli.non_negative_float, default=50.0, help="weight of the MSE term (default 50; 0: none)"
    )
    method.add_argument("--clip", type=cli.positive_float, default=1.0, help="bound on the gradient norm (default 1)")
    method.add_argument("--steps", type=cli.positive_int, help="at most so many steps; default: the budget decides")
    method.add_argument("--validation-images", type=cli.positive_int, default=512, help="at most so many (default 512)")
    method.add_argument("--validate-every", type=cli.positive_int, default=10, help="steps (default 10)")

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


def refuse_impossible(arguments: argparse.Namespace, sanitizer: Sanitizer) -> None:
    """Raises UserError where the arguments do not fit the sanitizer."""
    dimension = sanitizer.border_dimension
    if arguments.estimator == "rge" and arguments.sampling == "orthonormal" and arguments.directions > dimension:
        raise cli.UserError(
            f"--sampling orthonormal has at most {dimension} directions here, not {arguments.directions}: "
            "lower --directions"
        )


def build_estimator(arguments: argparse.Namespace) -> Estimator:
    """The estimator that the arguments name."""
    if arguments.estimator == "cge":
        return CoordinateGradientEstimator(arguments.mu, arguments.difference or "central")
    return RandomGradientEstimator(
        arguments.directions, arguments.mu, Isotropic(arguments.sampling), arguments.difference or "forward"
    )


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
        steps=arguments.steps,
        validate_every=arguments.validate_every,
        checkpoint_every=arguments.checkpoint_every,
        seed=arguments.seed,
    )
