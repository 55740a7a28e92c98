import pytest

from training import zo_fit
from training.presets import PRESETS, expanded


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_known_to_zo_fit(name):
    parser = zo_fit.build_parser()
    parser.parse_args(expanded(["--preset", name, "--victim-url", "http://victim"]))


@pytest.mark.parametrize("typed", [["--preset", "guided"], ["--preset=guided"]])
def test_what_is_typed_beside_a_preset_overrides_it_wherever_it_stands(typed):
    parser = zo_fit.build_parser()
    for argv in ([*typed, "--batch", "7"], ["--batch", "7", *typed]):
        arguments = parser.parse_args(expanded([*argv, "--victim-url", "http://victim"]))
        assert arguments.batch == 7
        assert arguments.guided
        assert arguments.sanitizer == "denoiser"


@pytest.mark.parametrize("argv", [["--preset", "nonsense"], ["--preset"], []])
def test_what_is_no_preset_is_left_to_the_parser(argv):
    assert expanded(argv) == argv
