"""`evaluate` and `certify` in front of segmenters, in a world where every pixel's answer is known in closed form."""

import json
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace

import pytest
import torch
from measuring_fakes import GATEWAY_URL, VICTIM_URL, connecting
from torch import Tensor, nn

from training import certify, evaluate
from training.certificates.files import MaskLine, read_output
from training.data.datasets import ImageSet, Splits
from training.measure.results import Row, read_rows
from training.measure.scoring import scores, worst_case
from training.measure.selection import stratified_order
from training.victim import in_process

LABELS = ("background", "polyp")
SIDE = 8
MARGIN = 4 / 255


class Threshold(nn.Module):
    """Logits of two classes at every pixel: brighter than one half or not."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(20.0))

    def forward(self, images: Tensor) -> Tensor:
        score = self.slope * (images[:, :1] - 0.5)
        return torch.cat([-score, score], dim=1)


class Segmenter:
    """A service; as a gateway it pulls every pixel to the side that is right in this world, by `tolerance`."""

    def __init__(self, tolerance: float = 0.0, artifact: dict[str, object] | None = None) -> None:
        self.tolerance, self.artifact = tolerance, artifact

    def __call__(self, images: Tensor) -> Tensor:
        pull = self.tolerance * torch.where(torch.arange(SIDE) < SIDE // 2, 1.0, -1.0)
        with torch.no_grad():
            return Threshold()(images + pull).softmax(dim=1)

    def describe(self, image: Tensor) -> dict[str, object]:
        answer: dict[str, object] = {"labels": list(LABELS), "lesion_fraction": 0.5}
        return answer if self.artifact is None else {**answer, "artifact": self.artifact}

    def ready(self) -> bool:
        return True


def splits(margin: float = MARGIN, count: int = 6) -> Splits:
    """The left half is the lesion, brighter than one half by a margin; the right half is as much darker."""
    masks = (torch.arange(SIDE) < SIDE // 2).long().expand(count, SIDE, SIDE).contiguous()
    images = (0.5 + margin * (2 * masks.float() - 1)).unsqueeze(1)
    part = ImageSet(images=images, labels=masks, names=tuple(f"frame-{index}" for index in range(count)))
    return Splits(name="toy", labels=LABELS, train=part, validation=part, test=part, fingerprint="abc")


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace(labels=LABELS, channels=1, size=(SIDE, SIDE))
    monkeypatch.setattr(in_process, "load_victim", lambda _: (Threshold().eval(), config))
    monkeypatch.setattr(evaluate, "load_data", lambda *_, **__: splits())
    monkeypatch.setattr(certify, "load_data", lambda *_, **__: splits(margin=0.2))


def gateway() -> Segmenter:
    return Segmenter(tolerance=0.05, artifact={"id": "f00d", "queries_spent": 4321, "name": "zo"})


def evaluated(folder: Path, *more: str) -> list[Row]:
    connect = connecting(victim=Segmenter(), gateway=gateway())
    argv = ["--victim-url", VICTIM_URL, "--gateway", f"zo={GATEWAY_URL}", "--results", str(folder / "r.json")]
    assert evaluate.main([*argv, "--device", "cpu", *more], connect=connect) == 0
    return read_rows(folder / "r.json")


@pytest.mark.usefixtures("world")
def test_dice_and_iou_with_and_without_the_gateway_are_what_the_closed_form_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = evaluated(tmp_path, "--attacks", "fgsm,pgd", "--epsilons-linf", "2,8")
    found = {(row.defense, row.attack, round(255 * (row.epsilon or 0)), row.metric): row.value for row in rows}
    for metric in ("dice", "iou"):
        for defense in ("none", "zo"):
            assert found[defense, "none", 0, metric] == 1
            assert found[defense, "fgsm", 2, metric] == 1
        for attack in ("fgsm", "pgd"):
            assert found["none", attack, 8, metric] == pytest.approx(0, abs=0.02)
            assert found["zo", attack, 8, metric] == 1
    assert {row.task for row in rows} == {"segmentation"}
    assert not any(row.metric == "accuracy" for row in rows)
    printed = capsys.readouterr().out
    assert "Dice, in %" in printed
    assert "small" not in printed  # there are none


def certified(folder: Path, *more: str) -> list[MaskLine]:
    argv = [
        "--url",
        GATEWAY_URL,
        "--name",
        "zo",
        "--out",
        str(folder / "zo.jsonl"),
        "--results",
        str(folder / "r.json"),
    ]
    assert certify.main([*argv, "--sigma", "0.25", *more], connect=connecting(gateway=Segmenter())) == 0
    return [line for line in read_output(folder / "zo.jsonl").values() if isinstance(line, MaskLine)]


@pytest.mark.usefixtures("world")
def test_pixels_above_tau_are_certified_and_the_rest_abstain(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A margin of 0.2 under noise of 0.25 gives every pixel a probability of 0.788 of being right."""
    sure = certified(tmp_path / "sure", "--tau", "0.6", "--n0", "100", "--n", "600", "--limit", "3")
    radius = 0.25 * NormalDist().inv_cdf(0.6)
    assert len(sure) == 3
    for line in sure:
        assert (line.dice, line.iou, line.abstained, line.queries) == (1, 1, 0, 700)
        assert line.radius == pytest.approx(radius)
        assert line.linf_radius_255 == pytest.approx(255 * radius / SIDE)
    rows = {row.metric: row for row in read_rows(tmp_path / "sure" / "r.json")}
    assert set(rows) == {"certified_dice", "certified_iou", "abstained"}
    assert (rows["certified_dice"].value, rows["certified_dice"].epsilon) == (1, pytest.approx(radius))
    assert "0.0% of the pixels abstained" in capsys.readouterr().out

    unsure = certified(tmp_path / "unsure", "--tau", "0.75", "--limit", "3")  # 100 samples do not tell 0.788 from 0.75
    assert all(line.abstained > 0.9 and line.dice < 0.2 for line in unsure)
    assert "--tau was" not in capsys.readouterr().err


@pytest.mark.usefixtures("world")
def test_an_interrupted_certificate_goes_on_and_other_settings_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = certified(tmp_path, "--limit", "2")
    more = certified(tmp_path, "--limit", "4")
    assert more[:2] == few
    argv = ["--url", GATEWAY_URL, "--name", "zo", "--out", str(tmp_path / "zo.jsonl"), "--tau", "0.8"]
    assert certify.main(argv, connect=connecting(gateway=Segmenter())) == 2
    assert "tau was 0.75, is 0.8" in capsys.readouterr().err


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize(("tau", "told"), [("0.4", "greater than or equal to 0.5"), ("1", "less than 1")])
def test_a_tau_that_no_majority_has_is_refused(tau: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        certify.main(["--url", GATEWAY_URL, "--name", "zo", "--tau", tau])
    assert f"--tau: must be {told}" in capsys.readouterr().err


def test_small_lesions_are_scored_apart() -> None:
    masks = torch.zeros(3, 10, 10, dtype=torch.int64)
    masks[0, :5] = 1
    masks[1, 0, :4] = 1
    answers = masks.clone()
    answers[1, 0, :2] = 0
    found = {metric: values.tolist() for metric, values in scores(answers, masks).items()}
    assert list(found) == ["dice", "iou", "dice_small"]
    assert found["dice"] == pytest.approx([1, 2 / 3, 1])
    assert found["iou"] == pytest.approx([1, 1 / 2, 1])
    assert found["dice_small"] == pytest.approx([2 / 3])


def test_an_abstaining_pixel_is_as_wrong_as_it_can_be() -> None:
    mask = torch.zeros(4, 4, dtype=torch.int64)
    mask[:2] = 1
    answer = mask.clone()
    assert worst_case(answer, mask) == (1, 1)
    answer[0, 0] = answer[3, 0] = -1  # one pixel of the lesion missed, one beside it taken for lesion
    assert worst_case(answer, mask) == pytest.approx((2 * 7 / 16, 7 / 9))
    # No choice for the abstaining pixels does worse.
    for first in (0, 1):
        for second in (0, 1):
            settled = answer.clone()
            settled[0, 0], settled[3, 0] = first, second
            assert worst_case(settled, mask)[0] >= worst_case(answer, mask)[0]


def test_a_few_images_hold_small_lesions_in_proportion() -> None:
    labels = torch.zeros(40, dtype=torch.int64)
    labels[:10] = 1
    order = stratified_order(labels, 8, seed=0)
    assert sum(index < 10 for index in order) == 2


def test_the_file_says_what_was_certified(tmp_path: Path) -> None:
    line = {"index": 0, "name": "a", "radius": 0.1, "linf_radius_255": 1.0, "queries": 5, "seconds": 0.1}
    settings = {"artifact": None, "dataset": "d", "fingerprint": "f", "split": "test", "shape": [1, 2, 2], "sigma": 0.1}
    settings |= {"name": "n", "n0": 1, "n": 2, "alpha": 0.1, "seed": 0, "tau": 0.75}
    path = tmp_path / "x.jsonl"
    path.write_text(
        json.dumps(settings) + "\n" + json.dumps({**line, "dice": 0.5, "iou": 0.3, "abstained": 0.2}) + "\n"
    )
    (found,) = read_output(path).values()
    assert isinstance(found, MaskLine)
    assert found.score == 0.5
