"""The picture of attack and defence, of classes and of masks."""

import io
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from defense.artifact import Provenance, save_artifact
from defense.sanitizer import ImageShape, Sanitizer, SanitizerConfig
from training import grid
from training.datasets import ImageSet, Splits
from training.inprocess import InProcessVictim

SIDE = 16


class Brighter(nn.Module):
    """Of every pixel whether it is brighter than one half; with `whole`, of the image."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.whole = whole

    def forward(self, images: Tensor) -> Tensor:
        score = 10 * (images[:, :1] - 0.5)
        logits = torch.cat([-score, score], dim=1)
        return logits.mean((2, 3)) if self.whole else logits


def splits(whole: bool) -> Splits:
    images = torch.rand(6, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    labels = Brighter(whole)(images).argmax(1)
    part = ImageSet(images, labels, tuple(map(str, range(6))))
    return Splits("toy", ("dark", "bright"), part, part, part, "f")


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    shape = ImageShape(channels=1, height=SIDE, width=SIDE)
    sanitizer = Sanitizer(SanitizerConfig(input=shape, denoiser="dncnn-small", autoencoder=None))
    made_by = Provenance(
        method="mse", estimator=None, data="toy", data_fingerprint="f", settings={}, versions={}, validation={}
    )
    save_artifact(tmp_path / "a", sanitizer, name="a", labels=[], sigma=0.1, queries={}, provenance=made_by)
    return tmp_path / "a"


def draw(monkeypatch: pytest.MonkeyPatch, artifact: Path, data: Splits, whole: bool, *more: str) -> int:
    victim = InProcessVictim(Brighter(whole).eval(), data.labels, torch.device("cpu"))
    monkeypatch.setattr(grid, "load_data", lambda *_: data)
    monkeypatch.setattr(grid, "in_process", lambda *_: nullcontext(victim))
    out = artifact.parent / "pictures" / "grid.png"
    return grid.main(["--artifact", str(artifact), "--out", str(out), "--device", "cpu", "--images", "2", *more])


@pytest.mark.parametrize("whole", [True, False])
def test_a_row_an_image_and_a_column_a_stage(monkeypatch, artifact, whole):
    shown = []
    monkeypatch.setattr(grid, "_show", lambda axes, image, faded=False: shown.append(image.shape))
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
