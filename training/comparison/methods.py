"""What `training.compare` can compare; the learned ones are the presets of `training.fit.presets`."""

import argparse
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from defense.preprocessors import PREPROCESSORS
from training.fit.presets import PRESETS
from training.measure.results import NO_DEFENSE

Kind = Literal["bare", "preprocessor", "pretrained", "autoencoder", "learned"]


@dataclass(frozen=True)
class Method:
    """One line of the comparison.

    Attributes:
        kind: bare: the victim alone; preprocessor: one of `defense.preprocessors`; pretrained: an artifact of
            `training.pretrain`; autoencoder: the autoencoder alone of one; learned: what `training.zo_fit` makes.
        part: Name of the preprocessor or of the pre-trained artifact.
        flags: Of `zo_fit`.
    """

    kind: Kind
    part: str = ""
    flags: tuple[str, ...] = ()

    @property
    def white_box(self) -> bool:
        """Whether it sees the victim's exact gradients: an upper bound, not a defense of a black box."""
        return any(flag.endswith("exact") for flag in self.flags)


METHODS: Final[Mapping[str, Method]] = MappingProxyType(
    {
        NO_DEFENSE: Method("bare"),
        "noise": Method("bare"),
        **{name: Method("preprocessor", name) for name in PREPROCESSORS},
        "ae": Method("autoencoder", "denoiser+autoencoder"),
        "mse": Method("pretrained", "denoiser"),
        "mse-ae": Method("pretrained", "denoiser+autoencoder"),
        **{name: Method("learned", flags=tuple(shlex.split(flags))) for name, flags in PRESETS.items()},
    }
)
"""All methods, in the order of the tables. `none` is not smoothed: it has a clean accuracy and no certificate."""


def method_list(text: str) -> list[str]:
    """Parses comma-separated names of methods (an argparse type)."""
    names = list(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in METHODS]:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; there are {', '.join(METHODS)}")
    return names
