from pathlib import Path

import pytest

from services.settings import read
from training.comparison.config import CompareConfig
from training.comparison.runs import Run

TYPED = [
    [],
    ["--task", "segmentation", "--channels", "1"],
    ["--channels", "3", "--size", "32", "--published-test", "--split-seed", "4"],
    ["--wire", "image", "--victim-mapping", "victim.toml", "--votes", "3", "--vote-noise", "0.2"],
]


@pytest.mark.parametrize("typed", TYPED)
def test_a_learned_run_has_the_images_and_the_victim_of_the_comparison(typed: list[str]) -> None:
    argv = ["--victim-url", "http://victim", "--pretrained", "parts", *typed]
    config = read(CompareConfig, argv, prog="compare")
    learned = config.learning(Run("zo-ds", budget=600, seed=5), resume=True)
    for name in ("task", "channels", "data", "size", "published_test", "split_seed", "sigma", "victim_url"):
        assert getattr(learned, name) == getattr(config, name)
    for name in ("wire", "victim_mapping", "votes", "vote_noise", "device", "pretrained"):
        assert getattr(learned, name) == getattr(config, name)
    assert (learned.max_queries, learned.steps, learned.seed, learned.resume) == (600, None, 5, True)
    assert (learned.directions, learned.batch, learned.mu) == (4, 128, 0.005)
    assert learned.out == Path("artifacts/compare/zo-ds/600-5")


def test_a_white_box_is_bound_by_its_steps() -> None:
    config = CompareConfig(victim=Path("weights"), pretrained=Path("parts"), methods=("fo-ds",))
    learned = config.learning(Run("fo-ds", budget=0, seed=0, steps=7))
    assert (learned.steps, learned.victim_url, learned.estimator) == (7, ("in-process:weights",), "exact")
    assert learned.max_queries > 10**8
