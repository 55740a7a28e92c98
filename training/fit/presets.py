"""Methods by name: what `zo_fit --preset NAME` stands for, and what `compare` compares."""

import shlex
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

_DS: Final = "--sanitizer denoiser"
_AE_DS: Final = "--sanitizer denoiser+autoencoder"

# Faithful to Zhang et al. 2022 in what defines the estimators: mu = 0.005, unit directions, forward differences for
# RGE and central ones for CGE. Batch sizes are this project's: at equal queries few directions and more images teach
# more, and CGE could else not afford a step.
_RGE: Final = "--estimator rge --sampling sphere --difference forward --mu 0.005"
_CGE: Final = "--estimator cge --difference central --mu 0.005"

# Exact gradients bear a larger step than noisy ones; chosen on validation, as all below.
_FAST: Final = "--learning-rate 3e-4 --schedule cosine --averaging 0.95 --clip 5 --validate-every 60"
# A surrogate is worth the more the longer it has learned and the slower the denoiser leaves what it has learned.
_SLOW: Final = "--warm-up-steps 2400 --learning-rate 2e-4 --schedule cosine --averaging 0.98 --clip 5"
_TRUSTED: Final = f"--batch 32 --extra 32 --validate-every 100 {_SLOW}"
_FOLLOWED: Final = "--estimator surrogate"

PRESETS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "zo-ds": f"{_DS} {_RGE} --directions 4 --batch 128",
        "zo-ae-ds-rge20": f"{_AE_DS} {_RGE} --directions 20 --batch 32",
        "zo-ae-ds-rge192": f"{_AE_DS} {_RGE} --directions 192 --batch 8",
        "zo-ae-ds-cge": f"{_AE_DS} {_CGE} --batch 4",
        "local": f"{_DS} --estimator local --window 9 --directions 4 --batch 32 --clip 5 "
        "--learning-rate 5e-5 --schedule cosine --averaging 0.9 --validate-every 20",
        "surrogate": f"{_DS} --batch 32 --extra 32 --validate-every 200 {_SLOW} {_FOLLOWED}",
        # For budgets that hold a few hundred of those steps only: a quarter of the queries a step, and much more time.
        "surrogate-small": f"{_DS} --batch 8 --extra 56 --validate-every 600 {_SLOW} {_FOLLOWED}",
        # For segmenters: an answer teaches the student at every pixel, so that it needs fewer of them and less fitting.
        # Masks suffer more than classes do where the pass that sees no noise blurs: hence the images with less noise.
        "surrogate-dense": f"{_DS} --batch 16 --extra 16 --validate-every 100 {_SLOW} {_FOLLOWED} "
        "--warm-up-steps 1000 --less-noise 0.5",
        "guided": f"{_DS} {_TRUSTED} --guided --directions 1",
        "guided-dct": f"{_DS} {_TRUSTED} --guided --subspace dct --rank 64 --sampling orthonormal --directions 4",
        "guided-auto": f"--sanitizer auto {_TRUSTED} --guided --directions 1",
        "fo-ds": f"{_DS} --batch 64 {_FAST} --estimator exact",
        "fo-ae-ds": f"{_AE_DS} --batch 64 {_FAST} --estimator exact",
    }
)
"""Name -> flags of `zo_fit`. Those that begin with zo- are the published methods, those with fo- need an open model."""


def expanded(argv: Sequence[str]) -> list[str]:
    """The arguments with the flags of every `--preset NAME` in front, so that others override them.

    A name that is none is left for the parser to refuse.
    """
    flags: list[str] = []
    for place, argument in enumerate(argv):
        name, separator, value = argument.partition("=")
        if name == "--preset":
            value = value if separator else "".join(argv[place + 1 : place + 2])
            flags += shlex.split(PRESETS.get(value, ""))
    return [*flags, *argv]
