"""The configuration of a red team."""

from pathlib import Path
from typing import Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from services.settings import Commas
from training.command.config import DeviceConfig
from training.measure.config import DefenseName, MeasureConfig, Split


class OutsiderConfig(MeasureConfig):
    """The outsider."""

    gateway_url: str | None = Field(None, description="where the gateway answers")
    gateway_mapping: Path | None = Field(
        None, description="a mapping file, for [headers] such as X-API-Key (docs/victims.md)"
    )
    queries: PositiveInt = Field(500, description="an image and run of an attack")
    student_queries: NonNegativeInt = Field(2000, description="to teach a student (0: none)")
    student_steps: PositiveInt | None = Field(
        None, description="of its optimiser (default 1200; of a segmenter's, 400)"
    )


class InsiderConfig(MeasureConfig):
    """The insider."""

    victim: Path | None = Field(None, description="the model's weights, as training.victim_fit wrote")
    artifact: Path | None = Field(None, description="the sanitizer (default none: the bare victim)")
    votes: NonNegativeInt = Field(0, description="noisy copies that vote (0: one pass, no noise)")
    eot: PositiveInt = Field(20, description="noisy copies a gradient")


class RedTeamConfig(OutsiderConfig, InsiderConfig, DeviceConfig):
    """Attacks a defense: as an outsider who may ask a running gateway, as an insider who has all of it, or as both."""

    split: Split = Field("validation", description="images to use")
    name: DefenseName | None = Field(None, description="of the defense in the results (default the artifact's)")
    epsilons_linf: Commas[NonNegativeFloat] = Field((0.5, 1.0, 2.0, 4.0, 8.0), description="in 1/255")
    epsilons_l2: Commas[NonNegativeFloat] = Field((0.25, 0.5, 1.0, 2.0), description="in units of [0,1]")
    steps: PositiveInt = Field(40, description="of PGD")

    @model_validator(mode="after")
    def _has_a_target(self) -> Self:
        if self.victim is None and self.gateway_url is None:
            raise ValueError(
                "nothing to attack: name --gateway-url (a running gateway), --victim (its weights), or both"
            )
        if self.victim is None and self.artifact is not None:
            raise ValueError("--artifact is attacked together with the weights behind it: name --victim too")
        if self.votes and self.artifact is None:
            raise ValueError("--votes is about noisy copies in front of a sanitizer: name --victim and --artifact")
        if self.votes and self.gateway_url is not None:
            raise ValueError(
                "--votes attacks the vote in this process, a gateway answers in its own mode: attack them apart"
            )
        return self
