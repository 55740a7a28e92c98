"""Attacks by who has everything and by who sees answers: what they find on a defense that is none."""

import json
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
import torch
from toy_defense import SIDE, Brighter, publish, splits

from defense import adaptive
from defense.artifact import load_artifact
from training import redteam
from training.attack import parties
from training.attack.checks import SURE
from training.data.datasets import ImageSet, Splits
from training.victim.in_process import InProcessVictim


class Gateway(InProcessVictim):
    """The same defense, as its gateway answers."""

    def __init__(self, whole: bool, artifact: dict[str, object] | None) -> None:
        super().__init__(Brighter(whole).eval(), splits(whole).labels, torch.device("cpu"))
        self._artifact = artifact

    def describe(self, image: torch.Tensor) -> dict[str, object]:
        told = super().describe(image)
        return told if self._artifact is None else {**told, "artifact": self._artifact}


def prepare(monkeypatch: pytest.MonkeyPatch, folder: Path, data: Splits, whole: bool) -> list[str]:
    """A sanitizer that does nothing, so that what an attack gains is known; the arguments of its attackers."""
    victim = InProcessVictim(Brighter(whole).eval(), data.labels, torch.device("cpu"))
    monkeypatch.setattr(redteam, "load_data", lambda *_: data)
    monkeypatch.setattr(parties, "in_process", lambda *_: nullcontext(victim))
    monkeypatch.setattr(adaptive.Defended, "forward", lambda self, images: self.victim(images))
    publish(folder / "a")
    sizes = ["--epsilons-linf", "0,4", "--epsilons-l2", "8", "--steps", "5", "--device", "cpu"]
    budget = ["--queries", "60", "--student-queries", "40", "--student-steps", "10"]
    return ["--results", str(folder / "results.json"), *sizes, *budget]


def attack(monkeypatch: pytest.MonkeyPatch, folder: Path, data: Splits, whole: bool, *more: str) -> list[dict]:
    """The rows of an insider's run."""
    shared = prepare(monkeypatch, folder, data, whole)
    code = redteam.main([*shared, "--victim", "unused", "--artifact", str(folder / "a"), *more])
    return json.loads((folder / "results.json").read_text()) if code == 0 else []


def serve(monkeypatch: pytest.MonkeyPatch, whole: bool, artifact: dict[str, object] | None) -> None:
    monkeypatch.setattr(parties, "HTTPVictim", lambda *_, **__: nullcontext(Gateway(whole, artifact)))


def worst_by_size(rows: list[dict]) -> dict[float, float]:
    return {row["epsilon"]: row["value"] for row in rows if row["attack"] == "adaptive" and row["norm"] == "linf"}


@pytest.mark.parametrize("votes", ["0", "5"])
def test_the_worst_case_is_that_of_each_image(monkeypatch, tmp_path: Path, capsys, votes: str) -> None:
    data = splits(whole=True)
    rows = attack(monkeypatch, tmp_path, data, True, "--votes", votes, "--eot", "4")
    told = capsys.readouterr().out
    margin = (data.validation.images.mean((1, 2, 3)) - 0.5).abs()
    expected = {0.0: 1.0, 4 / 255: float((margin > 4 / 255).double().mean()), SURE: 0.0}
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
            "adaptive-apgd",
        )
    }
    for row in rows:
        if row["norm"] == "linf" and row["metric"] == "accuracy":
            assert row["value"] >= worst[row["epsilon"]]


def test_masks_are_attacked_too(monkeypatch, tmp_path: Path) -> None:
    rows = attack(monkeypatch, tmp_path, splits(whole=False), False)
    worst = worst_by_size(rows)
    assert worst[0.0] == pytest.approx(1.0)
    assert worst[SURE] < 0.05 < worst[4 / 255] < 1


def test_other_images_than_the_artifacts_are_refused(monkeypatch, tmp_path: Path, capsys) -> None:
    data = splits(whole=True)
    small = data.validation.images[..., :8, :8]
    other = ImageSet(small, data.validation.labels, data.validation.names)
    assert attack(monkeypatch, tmp_path, Splits("toy", data.labels, other, other, other, "f"), True) == []
    assert "takes other images" in capsys.readouterr().err


def test_an_outsider_needs_an_address_and_nothing_else(monkeypatch, tmp_path: Path, capsys) -> None:
    shared = prepare(monkeypatch, tmp_path, splits(True), True)
    serve(monkeypatch, True, {"id": "f00d", "queries_spent": 12, "name": "ours"})
    assert redteam.main([*shared, "--gateway-url", "http://gateway"]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())
    assert {row["defence"] for row in rows} == {"ours"}
    assert {row["queries"] for row in rows} == {12}
    attacks = {row["attack"] for row in rows}
    assert {"none", "outsider", "outsider-square", "outsider-student", "outsider-hopskipjump"} <= attacks
    assert "corruption-blur" in attacks
    assert not any(name.startswith("adaptive") for name in attacks)
    worst = {row["epsilon"]: row["value"] for row in rows if row["attack"] == "outsider" and row["norm"] == "linf"}
    assert worst[0.0] == 1
    assert worst[SURE] == 0
    told = capsys.readouterr().out
    assert "outsider: 60 queries an image and run, 40 for a student" in told
    assert "check: larger changes are not less successful (outsider): holds" in told
    assert "the outsider's queries: " in told


@pytest.mark.parametrize("whole", [True, False])
def test_both_together_give_one_worst_case(monkeypatch, tmp_path: Path, capsys, whole: bool) -> None:
    shared = prepare(monkeypatch, tmp_path, splits(whole), whole)
    serve(monkeypatch, whole, {"id": load_artifact(tmp_path / "a").manifest.id, "queries_spent": 0, "name": "a"})
    inside = ["--victim", "unused", "--artifact", str(tmp_path / "a")]
    assert redteam.main([*shared, *inside, "--gateway-url", "http://gateway"]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())
    values = {
        (row["attack"], row["norm"], row["epsilon"]): row["value"] for row in rows if row["metric"] != "median_l2"
    }
    for norm, epsilon in (("linf", 0.0), ("linf", 4 / 255), ("linf", SURE), ("l2", 8.0)):
        others = [value for key, value in values.items() if key[1:] == (norm, epsilon)]
        assert values["adaptive", norm, epsilon] == min(others)
        assert values["outsider", norm, epsilon] >= values["adaptive", norm, epsilon]
    assert "who sees answers alone is not better than who sees all" in capsys.readouterr().out


def test_the_bare_victim_can_be_attacked_alike(monkeypatch, tmp_path: Path) -> None:
    shared = prepare(monkeypatch, tmp_path, splits(True), True)
    serve(monkeypatch, True, None)
    assert redteam.main([*shared, "--victim", "unused", "--gateway-url", "http://victim"]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())
    assert {row["defence"] for row in rows} == {"none"}
    assert not any("bpda" in row["attack"] or "transfer" in row["attack"] for row in rows)


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ([], "nothing to attack: name --gateway-url"),
        (["--artifact", "A"], "nothing to attack: name --gateway-url"),
        (["--gateway-url", "http://gateway", "--artifact", "A"], "name --victim too"),
        (["--victim", "unused", "--votes", "5"], "name --victim and --artifact"),
        (
            ["--victim", "unused", "--artifact", "A", "--votes", "5", "--gateway-url", "http://gateway"],
            "attack them apart",
        ),
        (["--victim", "unused", "--gateway-url", "http://gateway"], "the gateway serves f00d, --artifact is not given"),
        (
            ["--victim", "unused", "--artifact", "A", "--gateway-url", "http://gateway"],
            "name the artifact that it serves",
        ),
    ],
)
def test_what_does_not_fit_is_told(monkeypatch, tmp_path: Path, capsys, typed: list[str], told: str) -> None:
    shared = prepare(monkeypatch, tmp_path, splits(True), True)
    serve(monkeypatch, True, {"id": "f00d", "queries_spent": 12, "name": "ours"})
    with suppress(SystemExit):  # of what needs no look at anything
        assert redteam.main([*shared, *(str(tmp_path / "a") if one == "A" else one for one in typed)]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "results.json").exists()
