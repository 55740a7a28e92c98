"""A victim whose answers can be seen, and a sanitizer for its images: what tests of white-box tools share."""

from pathlib import Path

import torch
from torch import Tensor, nn

from defense.artifact import Provenance, save_artifact
from defense.sanitizer import ImageShape, Sanitizer, SanitizerConfig
from training.data.datasets import ImageSet, Splits

SIDE = 16


class Brighter(nn.Module):
    """Of every pixel whether it is brighter than one half; with `whole`, of the image."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.whole = whole
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, images: Tensor) -> Tensor:
        score = self.scale * (images[:, :1] - 0.5)
        logits = torch.cat([-score, score], dim=1)
        return logits.mean((2, 3)) if self.whole else logits


def splits(whole: bool) -> Splits:
    images = torch.rand(6, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    labels = Brighter(whole)(images).argmax(1)
    part = ImageSet(images, labels, tuple(map(str, range(6))))
    return Splits("toy", ("dark", "bright"), part, part, part, "f")


def publish(folder: Path) -> Path:
    """Writes a sanitizer that does nothing in particular; returns its folder."""
    shape = ImageShape(channels=1, height=SIDE, width=SIDE)
    sanitizer = Sanitizer(SanitizerConfig(input=shape, denoiser="dncnn-small", autoencoder=None))
    made_by = Provenance(
        method="mse", estimator=None, data="toy", data_fingerprint="f", settings={}, versions={}, validation={}
    )
    save_artifact(folder, sanitizer, name="a", labels=[], sigma=0.1, queries={}, provenance=made_by)
    return folder
