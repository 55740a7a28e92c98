from typing import get_args

import pytest

from defense.sanitizer import ImageShape, Sanitizer, SanitizerConfig
from training.fit.builders import build_estimator
from training.fit.config import FitConfig
from training.fit.presets import PRESETS, PresetName


def test_every_preset_has_a_name_that_is_known():
    assert tuple(PRESETS) == get_args(PresetName)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_makes_an_estimator(name):
    config = FitConfig(preset=name)
    assert PRESETS[name].items() <= config.model_dump().items()
    both = Sanitizer(SanitizerConfig(input=ImageShape(channels=1, height=64, width=64)))
    sanitizer = both.denoiser_alone() if config.sanitizer == "denoiser" else both
    assert build_estimator(config, sanitizer, 0.01).evaluations(256) >= 1
