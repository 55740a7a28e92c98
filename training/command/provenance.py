"""What every verb writes beside its result and its configuration, so that it can be made again: versions."""

import platform
from importlib.metadata import version


def versions(*more: str) -> dict[str, str]:
    """Versions of Python, of this project, of the libraries that decide every result, and of `more` distributions."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("zo-gateway", "torch", "torchvision", "numpy", *more)},
    }
