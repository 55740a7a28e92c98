"""How a victim is reached and asked."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Self, TypedDict

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from services.protocol.client import Endpoint, WireName
from services.protocol.mapping import Mapping, load_mapping
from services.settings import Config, Repeated

Connect = Callable[..., AbstractContextManager[Endpoint]]
"""Makes a victim's client; takes the arguments of `services.protocol.client.HTTPVictim`."""


class WireOptions(TypedDict):
    """Arguments of `HTTPVictim`."""

    wire: WireName
    mapping: Mapping | None


class ClientOptions(TypedDict):
    """Arguments of `HTTPVictim`."""

    wire: WireName
    mapping: Mapping | None
    batch: int
    in_flight: int
    patience_s: float


class WireConfig(Config):
    """How the victim is asked."""

    victim_mapping: Path | None = Field(
        None,
        description="TOML or JSON file that says what the URL does not: headers, labels, how an image is sent and "
        "where the scores are in the answer (services/protocol/mapping.py)",
    )
    wire: WireName = Field(
        "tensor",
        description="tensor: float32, many images a request; image: one 8-bit PNG a request, for a victim that knows "
        "only images",
    )

    def wire_options(self) -> WireOptions:
        """Arguments of the victim's client; InvalidInput if the mapping is invalid."""
        return {"wire": self.wire, "mapping": load_mapping(self.victim_mapping)}


class VictimConfig(WireConfig):
    """The victim."""

    victim_url: Repeated[str] = Field(
        min_length=1,
        description="http://host:8000, or a model of an Open Inference Protocol server: "
        "http://host:8000/v2/models/NAME; repeat it for replicas of one victim; dns+http://... takes every address of "
        "the name as one",
    )
    patience: PositiveFloat = Field(120.0, description="seconds to wait for a victim that is away")
    batch_images: PositiveInt = Field(256, description="images a request")
    in_flight: PositiveInt = Field(4, description="requests at once")

    def client_options(self) -> ClientOptions:
        """Arguments of the victim's client except its URLs; InvalidInput if the mapping is invalid."""
        return {
            "batch": self.batch_images,
            "in_flight": self.in_flight,
            "patience_s": self.patience,
            **self.wire_options(),
        }


class VotesConfig(Config):
    """Victims that answer labels only."""

    votes: PositiveInt = Field(
        1,
        description="the label's shares among so many noisy copies, at as many queries; 1: the victim's answer itself",
    )
    vote_noise: NonNegativeFloat = Field(0.1, description="standard deviation of the copies' noise")

    @model_validator(mode="after")
    def _noise_needs_votes(self) -> Self:
        if self.votes == 1 and self.vote_noise != type(self).model_fields["vote_noise"].default:
            raise ValueError("--vote-noise means nothing without --votes: leave it out")
        return self
