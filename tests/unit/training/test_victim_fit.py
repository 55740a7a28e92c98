import json
from pathlib import Path

import pytest
import torch
from torch import nn

from services.hospital.model import load_victim
from services.protocol.images import decode_image
from training import victim_fit
from training.datasets import ImageSet, Splits
from training.phantoms import BRAIN_LABELS, brain_phantoms


@pytest.fixture
def splits(monkeypatch: pytest.MonkeyPatch) -> Splits:
    """A tiny phantom set, which `main` gets too."""
    images, labels = brain_phantoms(80, size=32)
    whole = ImageSet(images, labels, tuple(map(str, range(80))))
    parts = [whole.subset(range(first, last)) for first, last in ((0, 48), (48, 64), (64, 80))]
    tiny = Splits("phantom", BRAIN_LABELS, *parts, fingerprint="f" * 64)
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


def test_same_seed_gives_the_same_victim(tmp_path: Path, splits: Splits) -> None:
    run(tmp_path / "one")
    run(tmp_path / "two")
    first, second = (load_victim(tmp_path / name)[0](splits.test.images) for name in ("one", "two"))
    assert torch.allclose(first, second, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--size", "16"], "size must be at least 32"),
        (["--width", "3"], "--width: Input should be less than or equal to 1"),
        (["--device", "warp:9"], "warp:9"),
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


class Constant(nn.Module):
    """Says class 1 whatever it sees."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.tensor([0.0, 5.0, 0.0]).expand(len(images), 3)


def test_score_counts_by_class() -> None:
    data = ImageSet(torch.zeros(6, 1, 32, 32), torch.tensor([0, 1, 1, 2, 1, 0]), tuple("abcdef"))
    result = victim_fit.score(Constant(), data, 3, torch.device("cpu"))
    assert result.accuracy == 0.5
    assert result.correct == (0, 3, 0)
    assert result.count == (2, 3, 1)


def test_the_best_epoch_is_kept(splits: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(32 * 32, 4))
    accuracies = iter([0.5, 0.9, 0.9, 0.4])
    losses = iter([1.0, 0.8, 0.6, 0.1])
    seen = []

    def fake_score(model: nn.Module, *_: object) -> victim_fit.Score:
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return victim_fit.Score(next(accuracies), next(losses), (), ())

    monkeypatch.setattr(victim_fit, "score", fake_score)
    best = victim_fit.fit(model, splits, epochs=4, seed=0, device=torch.device("cpu"))
    assert best == 3
    assert all(torch.equal(value, seen[2][name]) for name, value in model.state_dict().items())


def test_augmentation_varies_each_image_within_range_and_follows_the_seed(splits: Splits) -> None:
    images = splits.train.images[:1].expand(8, -1, -1, -1)
    moved, again = (victim_fit.augment(images, torch.Generator().manual_seed(1)) for _ in range(2))
    assert moved.shape == images.shape
    assert moved.min() >= 0
    assert moved.max() <= 1
    assert torch.equal(moved, again)
    assert torch.pdist(moved.flatten(1)).min() > 0.1


def test_augmentation_keeps_the_picture_in_the_frame(splits: Splits) -> None:
    images = splits.train.images
    moved = victim_fit.augment(images, torch.Generator().manual_seed(0))
    assert moved.mean().item() == pytest.approx(images.mean().item(), rel=0.15)
