"""Images for the page: right as they are, wrong as they are attacked, in files."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from toy_defense import SIDE, Brighter, splits

from services.protocol.images import decode_image
from training import samples
from training.victim.in_process import InProcessVictim


def make(monkeypatch: pytest.MonkeyPatch, out: Path, epsilon: str) -> int:
    data = splits(whole=True)
    victim = InProcessVictim(Brighter(True).eval(), data.labels, torch.device("cpu"))
    monkeypatch.setattr(samples, "load_data", lambda *_: data)
    monkeypatch.setattr(samples, "in_process", lambda *_: nullcontext(victim))
    return samples.main(
        ["--victim", "unused", "--out", str(out), "--epsilon", epsilon, "--each", "2", "--device", "cpu"]
    )


def test_each_image_has_an_attacked_twin_that_the_model_gets_wrong(monkeypatch, tmp_path: Path) -> None:
    assert make(monkeypatch, tmp_path, "64") == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names
    assert len(names) <= 2 * 2 * 2
    model = Brighter(True)
    for name in names:
        if ".attacked" in name:
            continue
        kind = name.partition("-")[0]
        pair = [name, name.replace(".png", ".attacked.png")]
        images = [decode_image((tmp_path / one).read_bytes(), channels=1, size=(SIDE, SIDE)) for one in pair]
        answers = [("dark", "bright")[int(model(torch.from_numpy(image)[None]).argmax())] for image in images]
        assert answers[0] == kind != answers[1]
        assert abs(images[0] - images[1]).max() <= 64 / 255 + 1e-6


def test_an_attack_that_succeeds_nowhere_is_an_error_and_writes_nothing(monkeypatch, tmp_path: Path, capsys) -> None:
    assert make(monkeypatch, tmp_path / "out", "0.001") == 2
    assert "raise --epsilon" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
