import pytest
from pydantic import ValidationError

from services.settings import read
from training.fit.config import FitConfig, RunConfig

URL = ["--victim-url", "http://victim"]


def run(*flags: str) -> RunConfig:
    return read(RunConfig, [*URL, *flags], prog="zo_fit")


@pytest.mark.parametrize("typed", [["--preset", "guided"], ["--preset=guided"]])
def test_what_is_typed_beside_a_preset_overrides_it_wherever_it_stands(typed):
    for argv in ([*typed, "--batch", "7"], ["--batch", "7", *typed]):
        config = run(*argv)
        assert config.batch == 7
        assert config.guided
        assert config.sanitizer == "denoiser"


@pytest.mark.parametrize("argv", [["--preset", "nonsense"], ["--preset"], ["--pres", "guided"]])
def test_what_is_no_preset_is_refused(argv, capsys):
    with pytest.raises(SystemExit):
        run(*argv)
    assert "--pres" in capsys.readouterr().err


def test_a_configuration_made_of_the_values_of_another_one_is_the_same():
    for config in (FitConfig(), FitConfig(preset="guided-dct", max_queries=5000, votes=3, vote_noise=0.2)):
        assert FitConfig(**config.model_dump()) == config


@pytest.mark.parametrize(("budget", "answers"), [(15_000, 5_000), (1_000_000, 20_000)])
def test_the_warm_up_is_a_share_of_a_small_budget_and_bounded_in_a_large_one(budget, answers):
    assert FitConfig(max_queries=budget).surrogate_settings.warm_up == answers


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 5}, "--window means nothing without --estimator local"),
        ({"estimator": "local", "window": 4}, "odd number of cells"),
        ({"estimator": "cge", "guided": True}, "--guided means nothing without --estimator rge"),
        ({"estimator": "cge", "directions": 3}, "--directions means nothing without --estimator rge or local"),
        ({"rank": 16}, "--rank means nothing without --subspace dct"),
        ({"student_steps": 3}, "--student-steps means nothing without a method with a surrogate"),
        ({"estimator": "exact", "extra": 3}, "--extra means nothing without --estimator rge or surrogate"),
        ({"vote_noise": 0.2}, "--vote-noise means nothing without --votes"),
        ({"subspace": "dct"}, "add --sanitizer denoiser"),
        (
            {"sanitizer": "denoiser", "subspace": "dct", "rank": 4, "sampling": "orthonormal", "directions": 5},
            "at most 4 directions here, not 5",
        ),
        ({"guided": True, "warm_up": 900, "max_queries": 900}, "leaves nothing of --max-queries 900"),
    ],
)
def test_settings_that_mean_nothing_together_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        FitConfig(**settings)


def test_a_setting_that_would_be_ignored_does_no_harm_at_its_default():
    assert FitConfig(estimator="cge", directions=20).estimator == "cge"


def test_keeping_a_surrogate_that_there_is_not_is_refused(capsys):
    with pytest.raises(SystemExit):
        run("--keep-surrogate")
    assert "--keep-surrogate means nothing without a method with a surrogate" in capsys.readouterr().err
    assert run("--keep-surrogate", "--preset", "surrogate").keep_surrogate
