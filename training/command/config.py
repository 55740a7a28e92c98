"""The parts of a command's configuration that are about no subject of their own."""

from pydantic import Field

from services.settings import Config


class DeviceConfig(Config):
    """Where it runs."""

    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
