"""The configuration of what is measured."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveInt

from training.data.config import DataConfig

Split = Literal["test", "validation"]


class MeasureConfig(DataConfig):
    """What is measured."""

    split: Split = Field("test", description="images to use")
    limit: PositiveInt | None = Field(
        None, description="use at most LIMIT images, stratified by class or lesion size (default all)"
    )
    results: Path = Field(Path("artifacts/results.json"), description="rows are added here")


def safe_name(name: str) -> str:
    """The name, where it can also name a file; else ValueError."""
    if not re.fullmatch(r"[\w+-][\w.+-]*", name):
        raise ValueError(f"{name!r} is no name: use letters, digits and . _ + -")
    return name


DefenseName = Annotated[str, AfterValidator(safe_name)]
"""Of a defense; it can also name a file."""
