import pytest

from training import compare, zo_fit
from training.comparison.fitting import zo_flags
from training.comparison.runs import Run


@pytest.mark.parametrize("typed", [[], ["--task", "segmentation", "--channels", "1"], ["--channels", "3"]])
def test_zo_fit_gets_the_task_and_the_channels_once_they_are_known(typed: list[str]) -> None:
    arguments = compare.build_parser().parse_args(["--victim-url", "http://victim", *typed])
    learned = zo_fit.build_parser().parse_args(zo_flags(Run("zo-ds", budget=600, seed=0), arguments))
    assert (learned.task, learned.channels) == (arguments.task, arguments.channels)
    assert (learned.data, learned.size) == (arguments.data, arguments.size)


@pytest.mark.parametrize("typed", [[], ["--wire", "image", "--victim-mapping", "victim.toml", "--votes", "3"]])
def test_zo_fit_asks_the_victim_as_the_comparison_does(typed: list[str]) -> None:
    arguments = compare.build_parser().parse_args(["--victim-url", "http://victim", *typed])
    learned = zo_fit.build_parser().parse_args(zo_flags(Run("zo-ds", budget=600, seed=0), arguments))
    for name in ("wire", "victim_mapping", "votes", "vote_noise"):
        assert getattr(learned, name) == getattr(arguments, name)
