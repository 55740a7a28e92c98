"""Adaptive attacks: what they find on a defence that is none, and what the checks say of attacks that fail."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from toy_defence import SIDE, Brighter, publish, splits

from defense import adaptive
from training import redteam
from training.datasets import ImageSet, Splits
from training.inprocess import InProcessVictim
from training.redteam import _SURE, checks

GOOD = {
    ("linf", 1 / 255): {
        "fgsm": 0.9,
        "pgd": 0.8,
        "pgd-twice": 0.79,
        "pgd-bpda": 0.85,
        "pgd-transfer": 0.9,
        "worst": 0.78,
    },
    ("linf", 8 / 255): {"fgsm": 0.5, "pgd": 0.1, "pgd-twice": 0.1, "pgd-bpda": 0.2, "pgd-transfer": 0.4, "worst": 0.1},
    ("linf", _SURE): {"fgsm": 0.2, "pgd": 0.0, "pgd-twice": 0.0, "pgd-bpda": 0.0, "pgd-transfer": 0.1, "worst": 0.0},
}


def test_attacks_that_work_pass_all_checks() -> None:
    assert all(line.endswith(": holds") for line in checks(GOOD))
    assert len(checks(GOOD)) == 5


@pytest.mark.parametrize(
    ("size", "change", "which"),
    [
        (1 / 255, {"fgsm": 0.5}, 0),
        (8 / 255, {"pgd-twice": 0.0, "pgd": 0.1}, 1),
        (8 / 255, {"pgd-transfer": 0.0}, 2),
        (8 / 255, {"worst": 0.9}, 3),
        (_SURE, {"worst": 0.1}, 4),
    ],
)
def test_each_check_fails_on_what_it_is_for(size: float, change: dict[str, float], which: int) -> None:
    broken = {key: {**one, **(change if key[1] == size else {})} for key, one in GOOD.items()}
    failed = [place for place, line in enumerate(checks(broken)) if "FAILS at" in line]
    assert failed == [which]


def attack(monkeypatch: pytest.MonkeyPatch, folder: Path, data: Splits, whole: bool, *more: str) -> list[dict]:
    """The rows of a run on a sanitizer that does nothing, so that what an attack gains is known."""
    victim = InProcessVictim(Brighter(whole).eval(), data.labels, torch.device("cpu"))
    monkeypatch.setattr(redteam, "load_data", lambda *_: data)
    monkeypatch.setattr(redteam, "in_process", lambda *_: nullcontext(victim))
    monkeypatch.setattr(adaptive.Defended, "forward", lambda self, images: self.victim(images))
    results = folder / "results.json"
    arguments = ["--victim", "unused", "--artifact", str(publish(folder / "a")), "--results", str(results)]
    sizes = ["--epsilons-linf", "0,4", "--epsilons-l2", "8", "--steps", "5", "--device", "cpu"]
    code = redteam.main([*arguments, *sizes, *more])
    return json.loads(results.read_text()) if code == 0 else []


def worst_by_size(rows: list[dict]) -> dict[float, float]:
    return {row["epsilon"]: row["value"] for row in rows if row["attack"] == "adaptive" and row["norm"] == "linf"}


@pytest.mark.parametrize("votes", ["0", "5"])
def test_the_worst_case_is_that_of_each_image(monkeypatch, tmp_path: Path, capsys, votes: str) -> None:
    data = splits(whole=True)
    rows = attack(monkeypatch, tmp_path, data, True, "--votes", votes, "--eot", "4")
    told = capsys.readouterr().out
    margin = (data.validation.images.mean((1, 2, 3)) - 0.5).abs()
    expected = {0.0: 1.0, 4 / 255: float((margin > 4 / 255).double().mean()), _SURE: 0.0}
    worst = worst_by_size(rows)
    if votes == "0":
        assert worst == pytest.approx(expected)
        (ddn,) = [row for row in rows if row["metric"] == "median_l2"]
        nearest = float((margin * SIDE).quantile(0.5, interpolation="lower"))  # a smaller change does not turn the mean
        assert nearest <= ddn["value"] < 5 * nearest
        assert told.count(": holds") == 5
    assert {row["attack"] for row in rows if row["norm"] == "linf"} == {
        *(
            "adaptive",
            "adaptive-pgd",
            "adaptive-pgd-twice",
            "adaptive-pgd-bpda",
            "adaptive-pgd-transfer",
            "adaptive-fgsm",
        )
    }
    for row in rows:
        if row["norm"] == "linf" and row["metric"] == "accuracy":
            assert row["value"] >= worst[row["epsilon"]]


def test_masks_are_attacked_too(monkeypatch, tmp_path: Path) -> None:
    rows = attack(monkeypatch, tmp_path, splits(whole=False), False)
    worst = worst_by_size(rows)
    assert worst[0.0] == pytest.approx(1.0)
    assert worst[_SURE] < 0.05 < worst[4 / 255] < 1


def test_other_images_than_the_artifacts_are_refused(monkeypatch, tmp_path: Path, capsys) -> None:
    data = splits(whole=True)
    small = data.validation.images[..., :8, :8]
    other = ImageSet(small, data.validation.labels, data.validation.names)
    assert attack(monkeypatch, tmp_path, Splits("toy", data.labels, other, other, other, "f"), True) == []
    assert "takes other images" in capsys.readouterr().err
