"""Which images a command works on, and how they are split."""

from typing import Annotated, Final, Literal

from pydantic import BeforeValidator, Field, PositiveInt

from services.settings import Config

Task = Literal["classification", "segmentation"]
"""What the images are for: a class for each, or a class for each pixel."""

Channels = Annotated[Literal[1, 3], BeforeValidator(lambda value: int(value) if value in ("1", "3") else value)]

PHANTOM: Final = "phantom"
"""What --data says for the procedural sets."""


class SeedConfig(Config):
    """What is random."""

    seed: int = Field(0, description="seed of everything else that is random")


class DataConfig(SeedConfig):
    """The images."""

    data: str = Field(
        PHANTOM,
        description="a folder (Training/<class>/* and Testing/<class>/*, or one folder a class; or images/* and "
        "masks/*), or 'phantom'",
    )
    task: Task | None = Field(None, description="default: a folder tells it by its layout; of phantoms, classification")
    size: PositiveInt = Field(64, description="images are resized to SIZE x SIZE")
    channels: Channels | None = Field(None, description="1: grey (default to classify); 3: colour (default to segment)")
    split_seed: int = Field(
        0, description="which images go to which split, and which phantoms are drawn; keep it for all commands"
    )
    published_test: bool = Field(
        False,
        description="keep the Testing folder as the test split, and drop its near-duplicates from training "
        "(default: all images are split anew, by groups of near-duplicates)",
    )
