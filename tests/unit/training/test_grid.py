"""The picture of attack and defense, of classes and of masks."""

import io
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from PIL import Image
from toy_defense import SIDE, Brighter, publish, splits

from training import grid
from training.data.datasets import ImageSet, Splits
from training.reporting import grid as pictures
from training.victim.in_process import InProcessVictim


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return publish(tmp_path / "a")


def draw(monkeypatch: pytest.MonkeyPatch, artifact: Path, data: Splits, whole: bool, *more: str) -> int:
    victim = InProcessVictim(Brighter(whole).eval(), data.labels, torch.device("cpu"))
    monkeypatch.setattr(grid, "load_data", lambda *_: data)
    monkeypatch.setattr(grid, "in_process", lambda *_: nullcontext(victim))
    out = artifact.parent / "pictures" / "grid.png"
    return grid.main(["--artifact", str(artifact), "--out", str(out), "--device", "cpu", "--images", "2", *more])


@pytest.mark.parametrize("whole", [True, False])
def test_a_row_an_image_and_a_column_a_stage(monkeypatch, artifact, whole):
    shown = []
    monkeypatch.setattr(pictures, "_show", lambda axes, image, faded=False: shown.append(image.shape))
    assert draw(monkeypatch, artifact, splits(whole), whole) == 0
    picture = Image.open(io.BytesIO((artifact.parent / "pictures" / "grid.png").read_bytes()))
    assert picture.format == "PNG"
    assert picture.width > 2 * picture.height
    assert shown == [(1, SIDE, SIDE)] * (2 * 8)


def test_other_images_than_the_artifacts_are_refused(monkeypatch, artifact, capsys):
    data = splits(whole=True)
    small = data.validation.images[..., :8, :8]
    other = ImageSet(small, data.validation.labels, data.validation.names)
    assert draw(monkeypatch, artifact, Splits("toy", data.labels, other, other, other, "f"), True) == 2
    assert "takes other images" in capsys.readouterr().err
    assert not (artifact.parent / "pictures").exists()
