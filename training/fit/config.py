"""The configuration of `zo_fit`: everything that decides a run, checked when it is made."""

import math
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from defense.artifact import MethodName
from defense.autoencoders import AutoencoderName
from defense.denoisers import DenoiserName
from defense.estimators import Difference, Sampling
from defense.surrogates import SurrogateSettings
from defense.victims import QueryLedger
from services.settings import Config, Share
from training.command.config import DeviceConfig
from training.data.config import DataConfig, SeedConfig
from training.fit.presets import PRESETS, PresetName
from training.victim.config import VictimConfig, VotesConfig

PretrainedName = Literal["denoiser", "denoiser+autoencoder"]
"""What pre-training makes, by the names of its folders."""

_LARGEST_WARM_UP: Final = 20_000  # queries, unless told: the others are asked where the sanitizer is by then


class PretrainConfig(SeedConfig):
    """The noise, and pre-training."""

    sigma: PositiveFloat = Field(0.25, description="standard deviation of the noise, in units of [0,1]")
    denoiser: DenoiserName = Field("wiener-unet", description="see docs/methods.md")
    autoencoder: AutoencoderName = Field("linear", description="see docs/methods.md")
    code: PositiveInt = Field(256, description="numbers in the code")
    pretrain_steps: PositiveInt = Field(1200, description="optimiser steps of the denoiser; the autoencoder takes half")


class EstimatorConfig(Config):
    """The method: what is trained, and how the gradient is estimated."""

    sanitizer: Literal["denoiser", "denoiser+autoencoder", "auto"] = Field(
        "denoiser+autoencoder",
        description="denoiser+autoencoder: ZO-AE-DS; denoiser: ZO-DS, the gradient is estimated at the image; auto: "
        "trained as ZO-AE-DS, served with or without the reconstruction, whichever validates better",
    )
    estimator: Literal["rge", "cge", "local", "surrogate", "exact"] = Field(
        "rge",
        description="rge: random directions; cge: coordinates; local: random directions, each judged at every pixel by "
        "the answers around it, for a victim that answers masks; surrogate: the gradient of a student of the victim's "
        "answers; exact: automatic differentiation, for an open model in process",
    )
    directions: PositiveInt = Field(20, description="q of RGE and local")
    window: PositiveInt = Field(9, description="side in pixels, odd, of local")
    sampling: Sampling = Field("sphere", description="RGE's directions")
    subspace: Literal["none", "dct"] = Field(
        "none", description="where RGE looks: everywhere, or low frequencies of the image (--sanitizer denoiser)"
    )
    rank: PositiveInt = Field(64, description="dimensions of the subspace")
    guided: bool = Field(False, description="RGE's first direction is the surrogate's gradient")
    difference: Difference | None = Field(None, description="default: forward for RGE, central for CGE, as published")
    mu: Literal["auto"] | Annotated[float, Field(gt=0)] = Field(
        "auto", description="step, in L2 norm; auto: what the probe finds clear of noise"
    )


class LoopConfig(Config):
    """The training loop."""

    max_queries: PositiveInt = Field(40_000, description="hard budget")
    batch: PositiveInt = Field(32, description="images an optimiser step")
    less_noise: Share = Field(
        0.0, description="share of the training images with any noise below sigma, for the pass that sees none"
    )
    learning_rate: PositiveFloat = Field(3e-5, description="Adam's")
    schedule: Literal["constant", "cosine"] = Field(
        "constant", description="of the learning rate; cosine: down to zero as the budget, or the steps, run out"
    )
    averaging: Share = Field(0.0, description="decay of the weights' exponential average; 0: none")
    mse_weight: NonNegativeFloat = Field(50.0, description="weight of the MSE term; 0: none")
    clip: PositiveFloat = Field(1.0, description="bound on the gradient norm")
    steps: PositiveInt | None = Field(None, description="at most so many steps; default: the budget decides")
    validation_images: PositiveInt = Field(512, description="at most so many")
    validate_every: PositiveInt = Field(10, description="steps between validations")
    checkpoint_every: PositiveInt = Field(5, description="steps between checkpoints")


class SurrogateConfig(Config):
    """The surrogate, where the method uses one."""

    warm_up: PositiveInt | None = Field(
        None,
        description=f"queries it learns from before the first step (default: a third, at most {_LARGEST_WARM_UP})",
    )
    warm_up_steps: PositiveInt | None = Field(
        None, description="its optimiser steps on them (default: one for ten queries)"
    )
    student_steps: PositiveInt = Field(2, description="its optimiser steps after each step")
    extra: NonNegativeInt = Field(0, description="images a step of which only it is asked")


class FitConfig(SurrogateConfig, VotesConfig, LoopConfig, EstimatorConfig, PretrainConfig):
    """How a sanitizer is learned.

    With `preset`, what is not given is that method's; settings that mean nothing beside the others are refused.
    """

    preset: PresetName | None = Field(None, description="a method by name; flags beside it override its own")

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        name: Any = values.get("preset")
        return {**PRESETS[name], **values} if name in PRESETS else values  # an unknown name is refused by its field

    @model_validator(mode="after")
    def _refuse_meaningless(self) -> Self:
        rge, local, surrogate = self.estimator == "rge", self.estimator == "local", self.uses_surrogate
        self._require(rge, "--estimator rge", "sampling", "subspace", "guided")
        self._require(rge or local, "--estimator rge or local", "directions")
        self._require(local, "--estimator local", "window")
        self._require(rge and self.subspace == "dct", "--subspace dct", "rank")
        self._require(rge or self.estimator == "surrogate", "--estimator rge or surrogate", "extra")
        self._require(surrogate, "a method with a surrogate", "warm_up", "warm_up_steps", "student_steps")
        return self

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.window % 2 == 0:
            raise ValueError(f"--window {self.window}: a window has an odd number of cells on a side")
        if self.subspace == "dct":
            if self.sanitizer != "denoiser":
                raise ValueError("--subspace is one of image space: add --sanitizer denoiser")
            self.refuse_too_many_directions(self.rank)
        if self.uses_surrogate and (self.warm_up or 0) >= self.max_queries:
            raise ValueError(f"--warm-up {self.warm_up} leaves nothing of --max-queries {self.max_queries}: lower it")
        return self

    def _require(self, meaningful: bool, where: str, *names: str) -> None:
        """Raises ValueError for a setting that differs from its default and would be ignored."""
        for name in names:
            if not meaningful and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"--{name.replace('_', '-')} means nothing without {where}: leave it out")

    def refuse_too_many_directions(self, dimension: int) -> None:
        """Raises ValueError where a space of `dimension` has too few orthonormal directions."""
        if self.estimator == "rge" and self.sampling == "orthonormal" and self.directions > dimension:
            raise ValueError(
                f"--sampling orthonormal has at most {dimension} directions here, not {self.directions}: "
                "lower --directions"
            )

    @property
    def uses_surrogate(self) -> bool:
        """Whether the method needs a student of the victim."""
        return self.estimator == "surrogate" or (self.estimator == "rge" and (self.guided or self.extra > 0))

    @property
    def needs_differences(self) -> bool:
        """Whether the method takes finite differences of the victim's answers, and so a step that its noise allows."""
        return self.estimator not in ("exact", "surrogate")

    @property
    def slopes(self) -> Difference:
        """How the method takes slopes."""
        return self.difference or ("central" if self.estimator == "cge" else "forward")

    @property
    def method(self) -> MethodName:
        """What the artifact calls the method."""
        at_image = self.sanitizer == "denoiser"
        if self.estimator == "exact":
            return "fo-ds" if at_image else "fo-ae-ds"
        return "zo-ds" if at_image else "zo-ae-ds"

    @property
    def surrogate_settings(self) -> SurrogateSettings:
        """How the student learns."""
        queries = self.warm_up or min(self.max_queries // 3, _LARGEST_WARM_UP)
        warm_up = max(1, queries // self.votes)
        return SurrogateSettings(
            warm_up=warm_up,
            warm_up_steps=self.warm_up_steps or math.ceil(warm_up / 10),
            steps=self.student_steps,
        )

    def learning_rate_at(self, step: int, ledger: QueryLedger) -> float:
        """The learning rate of the step after `step`, by how much of the steps, or else of the budget, is gone."""
        if self.schedule == "constant":
            return self.learning_rate
        if self.steps is not None:
            gone = step / self.steps
        else:
            gone = 0.0 if ledger.max_queries is None else ledger.total / ledger.max_queries
        return 0.5 * self.learning_rate * (1 + math.cos(math.pi * min(1.0, gone)))


class RunConfig(FitConfig, VictimConfig, DataConfig, DeviceConfig):
    """Learns a sanitizer for a model nobody may open, from queries alone: ZO-DS and ZO-AE-DS (Zhang et al., 2022).

    A run of `training.zo_fit`: how it learns, from which images and which victim, and where it goes.
    """

    pretrained: Path | None = Field(
        None,
        description="what training.pretrain wrote, its models as they are; default: pre-train first, into "
        "OUT/pretrained",
    )
    out: Path = Field(Path("artifacts/defense"), description="folder of artifact and checkpoint")
    resume: bool = Field(False, description="continue the run in OUT, its ledger intact")
    keep_surrogate: bool = Field(
        False,
        description="keep the surrogate, a partial copy of the victim, in OUT after training (default: it is deleted)",
    )

    @model_validator(mode="after")
    def _keep_what_is_there(self) -> Self:
        self._require(self.uses_surrogate, "a method with a surrogate", "keep_surrogate")
        return self
