"""What every verb writes beside its result, so that it can be made again: settings and versions."""

import argparse
import platform
from importlib.metadata import version
from pathlib import Path

from pydantic import BaseModel, JsonValue


def settings_of(arguments: BaseModel | argparse.Namespace) -> dict[str, JsonValue]:
    """The command's configuration as JSON values; paths as they were typed."""
    if isinstance(arguments, BaseModel):
        return arguments.model_dump(mode="json")

    def plain(value: object) -> JsonValue:
        if isinstance(value, str | int | float | bool) or value is None:
            return value
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        if isinstance(value, Path):
            return str(value)
        raise TypeError(f"an argument of type {type(value).__name__} cannot be recorded")

    return {name: plain(value) for name, value in vars(arguments).items()}


def versions(*more: str) -> dict[str, str]:
    """Versions of Python, of this project, of the libraries that decide every result, and of `more` distributions."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("zo-gateway", "torch", "torchvision", "numpy", *more)},
    }
