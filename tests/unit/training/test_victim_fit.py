import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from services.hospital.model import VictimConfig, build_victim, load_victim
from services.protocol.images import decode_image
from training import victim_fit
from training.data.datasets import ImageSet, Splits
from training.data.folders import LESION_LABELS
from training.data.phantoms import BRAIN_LABELS, brain_phantoms, polyp_phantoms
from training.measure.segmentation import dice, iou
from training.victim import fitting
from training.victim.fitting import fit
from training.victim.tasks import Classification, ClassificationScore, Segmentation


@pytest.fixture
def splits(monkeypatch: pytest.MonkeyPatch) -> Splits:
    """A tiny phantom set, which `main` gets too."""
    images, labels = brain_phantoms(80, size=32)
    whole = ImageSet(images, labels, tuple(map(str, range(80))))
    parts = [whole.subset(range(first, last)) for first, last in ((0, 48), (48, 64), (64, 80))]
    tiny = Splits("phantom", BRAIN_LABELS, *parts, fingerprint="f" * 64)
    monkeypatch.setattr(victim_fit, "load_data", lambda _: tiny)
    return tiny


@pytest.fixture
def frames(monkeypatch: pytest.MonkeyPatch) -> Splits:
    """A tiny phantom set with masks, which `main` gets too."""
    images, masks = polyp_phantoms(80, size=32)
    whole = ImageSet(images, masks.squeeze(1).long(), tuple(map(str, range(80))))
    parts = [whole.subset(range(first, last)) for first, last in ((0, 48), (48, 64), (64, 80))]
    tiny = Splits("phantom", LESION_LABELS, *parts, fingerprint="e" * 64)
    monkeypatch.setattr(victim_fit, "load_data", lambda _: tiny)
    return tiny


def run(out: Path, *options: str) -> int:
    return victim_fit.main(["--size", "32", "--epochs", "2", "--out", str(out), *options])


def test_command_writes_a_victim_and_its_report(
    tmp_path: Path, splits: Splits, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path) == 0
    model, config = load_victim(tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert config.labels == BRAIN_LABELS
    assert config.size == (32, 32)
    assert report["images"] == {"train": 48, "validation": 16, "test": 16}
    assert report["fingerprint"] == splits.fingerprint
    right = int((model(splits.test.images).argmax(1) == splits.test.labels).sum())
    assert report["test"]["accuracy"] == right / 16
    assert sum(entry["correct"] for entry in report["test"]["classes"].values()) == right
    assert {entry["count"] for entry in report["test"]["classes"].values()} == {4}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["example.png", "model.safetensors", "report.json"]
    example = decode_image((tmp_path / "example.png").read_bytes(), channels=1, size=(32, 32))
    assert torch.from_numpy(example).allclose(splits.test.images[0], atol=1 / 255)
    assert f"({right} of 16)" in capsys.readouterr().out


def test_command_writes_a_segmenter_and_its_report(
    tmp_path: Path, frames: Splits, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "--task", "segmentation", "--width", "0.125") == 0
    model, config = load_victim(tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert (config.task, config.labels, config.channels, config.size) == ("segmentation", LESION_LABELS, 3, (32, 32))
    answers = model(frames.test.images).argmax(1)
    told = report["test"]
    assert told["count"] == 16
    assert told["dice"] == pytest.approx(dice(answers, frames.test.labels).mean().item(), abs=1e-3)
    assert told["iou"] == pytest.approx(iou(answers, frames.test.labels).mean().item(), abs=1e-3)
    assert told["small_lesions"].keys() == {"dice", "iou", "median_dice", "count"}
    assert report["settings"]["task"] == "segmentation"
    assert report["settings"]["epochs"] == 2
    assert "monai" in report["versions"]
    assert "median Dice" in capsys.readouterr().out
    example = decode_image((tmp_path / "example.png").read_bytes(), channels=3, size=(32, 32))
    assert torch.from_numpy(example).allclose(frames.test.images[0], atol=1 / 255)


def test_a_segmenter_learns(frames: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "_AVERAGING", 0.5)  # the steps are few
    torch.manual_seed(0)
    part = replace(frames.train, images=0.2 + 0.6 * frames.train.labels.unsqueeze(1))  # whose lesions are easily seen
    easy = replace(frames, train=part, validation=part)
    config = VictimConfig(task="segmentation", labels=LESION_LABELS, size=(32, 32), width=0.125)
    model, task, cpu = build_victim(config), Segmentation(LESION_LABELS), torch.device("cpu")
    assert task.score(model, part, cpu).dice.mean() < 0.5
    fit(model, task, easy, epochs=12, seed=0, device=cpu)
    assert task.score(model, part, cpu).dice.mean() > 0.7


def test_same_seed_gives_the_same_victim(tmp_path: Path, splits: Splits) -> None:
    run(tmp_path / "one")
    run(tmp_path / "two")
    first, second = (load_victim(tmp_path / name)[0](splits.test.images) for name in ("one", "two"))
    assert torch.allclose(first, second, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--size", "16"], "size must be at least 32"),
        (["--width", "3"], "--width: must be less than or equal to 1"),
        (["--device", "warp:9"], "warp:9"),
        (["--task", "segmentation", "--size", "40"], "size must be multiples of 16, at least 32 x 32, got 40 x 40"),
        (["--task", "segmentation", "--depth", "vgg11"], "a segmenter takes none"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    assert run(tmp_path / "out", *options) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert words in lines[0]
    assert not (tmp_path / "out").exists()


def test_a_missing_folder_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--data", str(tmp_path / "nowhere")) == 2
    assert "no such folder" in capsys.readouterr().err


def test_the_best_epoch_is_kept(splits: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(32 * 32, 4))
    right = iter([5, 9, 9, 4])
    losses = iter([1.0, 0.8, 0.6, 0.1])
    seen = []

    def fake_score(model: nn.Module, *_: object) -> ClassificationScore:
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return ClassificationScore(("all",), next(losses), (next(right),), (10,))

    task = Classification(splits.labels)
    monkeypatch.setattr(task, "score", fake_score)
    best = fit(model, task, splits, epochs=4, seed=0, device=torch.device("cpu"))
    assert best == 3
    assert all(torch.equal(value, seen[2][name]) for name, value in model.state_dict().items())
