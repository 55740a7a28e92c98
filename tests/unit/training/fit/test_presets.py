import pytest

from defense.sanitizer import ImageShape, Sanitizer, SanitizerConfig
from training import zo_fit
from training.fit.parts import build_estimator, refuse_meaningless
from training.fit.presets import PRESETS, expanded


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


def test_an_abbreviated_preset_is_not_taken_for_one_that_was_expanded(capsys):
    with pytest.raises(SystemExit):
        zo_fit.build_parser().parse_args(expanded(["--pres", "guided", "--victim-url", "u"]))
    assert "unrecognized arguments" in capsys.readouterr().err


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_makes_an_estimator(name):
    parser = zo_fit.build_parser()
    arguments = parser.parse_args(expanded(["--preset", name, "--victim-url", "http://victim"]))
    refuse_meaningless(arguments, parser)
    shape = ImageShape(channels=1, height=64, width=64)
    both = Sanitizer(SanitizerConfig(input=shape))
    sanitizer = both.denoiser_alone() if arguments.sanitizer == "denoiser" else both
    assert build_estimator(arguments, sanitizer, 0.01).evaluations(256) >= 1
