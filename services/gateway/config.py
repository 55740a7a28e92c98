"""Settings of the gateway."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from services.protocol.client import WireName
from services.runtime import ServiceSettings


class GatewaySettings(ServiceSettings):
    """Serves a learned sanitizer in front of a victim: same requests, same answers.

    Flags may also be given as environment variables: GATEWAY_ARTIFACT, GATEWAY_PORT and so on.
    """

    model_config = SettingsConfigDict(env_prefix="GATEWAY_", cli_prog_name="python -m services.gateway")

    artifact: Path = Field(description="directory of the sanitizer, as training.zo_fit wrote it")
    victim_url: Annotated[tuple[str, ...], NoDecode] = Field(
        min_length=1,
        description="the victim's URL, or that of a model of an Open Inference Protocol server (.../v2/models/NAME); "
        "repeat it (or separate by commas) for replicas",
    )
    victim_mapping: Path | None = Field(
        None, description="file that says what the URL does not: headers, labels, or how an image is sent"
    )
    wire: WireName = Field(
        "tensor", description="how images travel to the victim: float32 tensors, or one 8-bit PNG a request"
    )
    port: int = Field(8080, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    model_name: str = Field("defended", min_length=1, description="name of the model under /v2/models")
    timeout_s: float = Field(60.0, gt=0, description="seconds to wait for the victim before answering 504")
    forward_batch: int = Field(256, ge=1, description="most images in one request to the victim")
    in_flight: int = Field(16, ge=1, description="most requests to the victim at once")

    @field_validator("victim_url", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        """Flags and variables arrive as one string."""
        return tuple(url.strip() for url in value.split(",") if url.strip()) if isinstance(value, str) else value
