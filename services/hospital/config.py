"""Settings of the hospital service."""

from pathlib import Path

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from services.server import ServiceSettings


class HospitalSettings(ServiceSettings):
    """Serves a classifier or a segmenter as a black box: POST /predict and health, nothing else.

    Flags may also be given as environment variables: HOSPITAL_MODEL, HOSPITAL_PORT and so on.
    """

    model_config = SettingsConfigDict(env_prefix="HOSPITAL_", cli_prog_name="python -m services.hospital")

    model: Path = Field(description="directory of the victim, as training.victim_fit wrote it")
