"""What `training.compare` can compare; the learned ones are the presets of `training.fit.presets`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, Literal

from defense.preprocessors import PREPROCESSORS
from training.fit.presets import PRESETS
from training.measure.results import NO_DEFENSE

Kind = Literal["bare", "preprocessor", "pretrained", "autoencoder", "learned"]


@dataclass(frozen=True)
class Method:
    """One line of the comparison.

    Attributes:
        kind: bare: the victim alone; preprocessor: one of `defense.preprocessors`; pretrained: an artifact of
            `training.pretrain`; autoencoder: only the autoencoder of one; learned: made by `training.zo_fit`.
        part: Name of the preprocessor or of the pre-trained artifact.
        settings: Fields of `FitConfig`, for what is learned.
    """

    kind: Kind
    part: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def white_box(self) -> bool:
        """Whether it sees the victim's exact gradients: an upper bound, not a defense of a black box."""
        return self.settings.get("estimator") == "exact"


METHODS: Final[Mapping[str, Method]] = MappingProxyType(
    {
        NO_DEFENSE: Method("bare"),
        "noise": Method("bare"),
        **{name: Method("preprocessor", name) for name in PREPROCESSORS},
        "ae": Method("autoencoder", "denoiser+autoencoder"),
        "mse": Method("pretrained", "denoiser"),
        "mse-ae": Method("pretrained", "denoiser+autoencoder"),
        **{name: Method("learned", settings=settings) for name, settings in PRESETS.items()},
    }
)
"""All methods, in the order of the tables. `none` is not smoothed: it has a clean accuracy and no certificate."""


def known_method(name: str) -> str:
    """The name of a method; raises ValueError for any other."""
    if name not in METHODS:
        raise ValueError(f"unknown: {name}; there are {', '.join(METHODS)}")
    return name
