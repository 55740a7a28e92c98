"""Methods by name: what `zo_fit --preset NAME` stands for, and what `compare` compares."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, Literal

PresetName = Literal[
    "zo-ds",
    "zo-ae-ds-rge20",
    "zo-ae-ds-rge192",
    "zo-ae-ds-cge",
    "local",
    "surrogate",
    "surrogate-small",
    "surrogate-dense",
    "guided",
    "guided-dct",
    "guided-auto",
    "fo-ds",
    "fo-ae-ds",
]
"""Those that begin with zo- are the published methods, those with fo- need an open model."""

Settings = Mapping[str, Any]
"""Fields of `FitConfig`."""

_DS: Final[Settings] = {"sanitizer": "denoiser"}
_AE_DS: Final[Settings] = {"sanitizer": "denoiser+autoencoder"}

# Faithful to Zhang et al. 2022 in what defines the estimators: mu = 0.005, unit directions, forward differences for
# RGE and central ones for CGE. Batch sizes are this project's: at equal queries few directions and more images teach
# more, and CGE could else not afford a step.
_RGE: Final[Settings] = {"estimator": "rge", "sampling": "sphere", "difference": "forward", "mu": 0.005}
_CGE: Final[Settings] = {"estimator": "cge", "difference": "central", "mu": 0.005}

# Exact gradients bear a larger step than noisy ones; chosen on validation, as all below.
_EXACT: Final[Settings] = {
    "estimator": "exact",
    "batch": 64,
    "learning_rate": 3e-4,
    "schedule": "cosine",
    "averaging": 0.95,
    "clip": 5,
    "validate_every": 60,
}
# A surrogate is worth the more the longer it has learned and the slower the denoiser leaves what it has learned.
_SLOW: Final[Settings] = {
    "warm_up_steps": 2400,
    "learning_rate": 2e-4,
    "schedule": "cosine",
    "averaging": 0.98,
    "clip": 5,
}
_FOLLOWED: Final[Settings] = {"estimator": "surrogate", **_SLOW}
_GUIDED: Final[Settings] = {"guided": True, "batch": 32, "extra": 32, "validate_every": 100, **_SLOW}

PRESETS: Final[Mapping[PresetName, Settings]] = MappingProxyType(
    {
        "zo-ds": {**_DS, **_RGE, "directions": 4, "batch": 128},
        "zo-ae-ds-rge20": {**_AE_DS, **_RGE, "directions": 20, "batch": 32},
        "zo-ae-ds-rge192": {**_AE_DS, **_RGE, "directions": 192, "batch": 8},
        "zo-ae-ds-cge": {**_AE_DS, **_CGE, "batch": 4},
        "local": {
            **_DS,
            "estimator": "local",
            "window": 9,
            "directions": 4,
            "batch": 32,
            "clip": 5,
            "learning_rate": 5e-5,
            "schedule": "cosine",
            "averaging": 0.9,
            "validate_every": 20,
        },
        "surrogate": {**_DS, **_FOLLOWED, "batch": 32, "extra": 32, "validate_every": 200},
        # For budgets that hold a few hundred of those steps only: a quarter of the queries a step, and much more time.
        "surrogate-small": {**_DS, **_FOLLOWED, "batch": 8, "extra": 56, "validate_every": 600},
        # For segmenters: an answer teaches the student at every pixel, so that it needs fewer of them and less fitting.
        # Masks suffer more than classes do where the pass that sees no noise blurs: hence the images with less noise.
        "surrogate-dense": {
            **_DS,
            **_FOLLOWED,
            "batch": 16,
            "extra": 16,
            "validate_every": 100,
            "warm_up_steps": 1000,
            "less_noise": 0.5,
        },
        "guided": {**_DS, **_GUIDED, "directions": 1},
        "guided-dct": {
            **_DS,
            **_GUIDED,
            "directions": 4,
            "subspace": "dct",
            "rank": 64,
            "sampling": "orthonormal",
        },
        "guided-auto": {**_GUIDED, "sanitizer": "auto", "directions": 1},
        "fo-ds": {**_DS, **_EXACT},
        "fo-ae-ds": {**_AE_DS, **_EXACT},
    }
)
"""What each method sets; everything else is `FitConfig`'s default."""
