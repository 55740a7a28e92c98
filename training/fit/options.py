"""The arguments of `zo_fit`, and the parts that they name."""

import argparse
from pathlib import Path
from typing import get_args

from defense.estimators import Difference, Sampling
from training import pretrain
from training.command import cli
from training.fit.probe import add_answer_arguments

AUTO = "auto"
"""The choice of --sanitizer that leaves the reconstruction to validation, and of --mu that leaves it to the probe."""


def add_zo_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds all arguments but those of data and device."""
    victim = parser.add_argument_group("the victim")
    victim.add_argument(
        "--victim-url",
        action="append",
        required=True,
        help="http://host:8000, or a model of an Open Inference Protocol server: http://host:8000/v2/models/NAME; "
        "repeat it for replicas of one victim; dns+http://... takes every address of the name as one",
    )
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
        choices=("rge", "cge", "local", "surrogate", "exact"),
        default="rge",
        help="rge: random directions, the default; cge: coordinates; local: random directions, each judged at every "
        "pixel by the answers around it, for a victim that answers masks; surrogate: the gradient of a student of the "
        "victim's answers; exact: automatic differentiation, for an open model in process",
    )
    method.add_argument("--directions", type=cli.positive_int, default=20, help="q of RGE and local (default 20)")
    method.add_argument("--window", type=cli.positive_int, default=9, help="side in pixels, odd, of local (default 9)")
    method.add_argument("--sampling", choices=get_args(Sampling), default="sphere", help="RGE's directions")
    method.add_argument(
        "--subspace",
        choices=("none", "dct"),
        default="none",
        help="where RGE looks: everywhere, the default; dct: low frequencies of the image (--sanitizer denoiser)",
    )
    method.add_argument("--rank", type=cli.positive_int, default=64, help="dimensions of the subspace (default 64)")
    method.add_argument("--guided", action="store_true", help="RGE's first direction is the surrogate's gradient")
    method.add_argument(
        "--difference", choices=get_args(Difference), help="default: forward for RGE, central for CGE, as published"
    )
    method.add_argument(
        "--mu", type=_step, default=AUTO, help="step, in L2 norm; auto: what the probe finds clear of noise (default)"
    )
    method.add_argument("--batch", type=cli.positive_int, default=32, help="images an optimiser step (default 32)")
    method.add_argument(
        "--less-noise",
        type=cli.share,
        default=0.0,
        help="share of the training images with any noise below sigma, for the pass that sees none (default 0)",
    )
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
        "--warm-up",
        type=cli.positive_int,
        help="queries it learns from before the first step (default: a third, at most 20000)",
    )
    surrogate.add_argument(
        "--warm-up-steps", type=cli.positive_int, help="its optimiser steps on them (default: one for ten queries)"
    )
    surrogate.add_argument(
        "--student-steps", type=cli.positive_int, default=2, help="its optimiser steps after each step (default 2)"
    )
    surrogate.add_argument(
        "--extra", type=cli.non_negative_int, default=0, help="images a step of which only it is asked (default 0)"
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
