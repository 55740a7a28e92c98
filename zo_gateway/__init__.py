"""What people import: learn a defense of a black box in Python, load it, and certify it (docs/api.md).

Nothing is loaded before it is used, so that importing this costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import services  # noqa: F401 - sets up OpenMP, which must happen before torch is loaded

if TYPE_CHECKING:
    from defense.artifact import Artifact
    from defense.artifact import load_artifact as load
    from defense.errors import DefenseError
    from defense.segmentation_smoothing import certify_mask
    from defense.smoothing import certify
    from services.protocol.client import HTTPVictim
    from services.protocol.errors import ServiceError
    from training.command.errors import UserError
    from training.data.datasets import Splits, load_splits
    from training.data.tensors import split_images
    from training.fit.config import FitConfig
    from training.fit.run import fit
    from training.victim.check import check_victim
    from training.victim.function import FunctionVictim

__all__ = [
    "Artifact",
    "DefenseError",
    "FitConfig",
    "FunctionVictim",
    "HTTPVictim",
    "ServiceError",
    "Splits",
    "UserError",
    "certify",
    "certify_mask",
    "check_victim",
    "fit",
    "load",
    "load_splits",
    "split_images",
]

_HOMES = {
    "Artifact": ("defense.artifact", "Artifact"),
    "DefenseError": ("defense.errors", "DefenseError"),
    "FitConfig": ("training.fit.config", "FitConfig"),
    "FunctionVictim": ("training.victim.function", "FunctionVictim"),
    "HTTPVictim": ("services.protocol.client", "HTTPVictim"),
    "ServiceError": ("services.protocol.errors", "ServiceError"),
    "Splits": ("training.data.datasets", "Splits"),
    "UserError": ("training.command.errors", "UserError"),
    "certify": ("defense.smoothing", "certify"),
    "certify_mask": ("defense.segmentation_smoothing", "certify_mask"),
    "check_victim": ("training.victim.check", "check_victim"),
    "fit": ("training.fit.run", "fit"),
    "load": ("defense.artifact", "load_artifact"),
    "load_splits": ("training.data.datasets", "load_splits"),
    "split_images": ("training.data.tensors", "split_images"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
