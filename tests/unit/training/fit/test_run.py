"""`fit` from Python, with a function as the victim."""

import pytest
import torch
from torch import Tensor
from zo_fakes import LABELS, SIZE, SPLITS

from defense.artifact import load_artifact
from training.command.errors import UserError
from training.fit.checkpoint import Journal
from training.fit.config import FitConfig
from training.fit.run import fit
from training.victim.function import FunctionVictim

CONFIG = FitConfig(directions=2, batch=4, steps=2, validate_every=2, code=8, pretrain_steps=2)


class Sides:
    """Compares the two sides of an image, and counts the images."""

    received = 0

    def __call__(self, images: Tensor) -> Tensor:
        self.received += len(images)
        difference = (images[..., : SIZE // 2] - images[..., SIZE // 2 :]).mean((1, 2, 3))
        return torch.stack([30 * difference, -30 * difference], dim=1).softmax(1)


def test_a_function_is_defended_and_every_call_is_booked(tmp_path):
    victim = Sides()
    artifact = fit(CONFIG, victim, SPLITS, out=tmp_path, device="cpu")
    saved = load_artifact(tmp_path)
    assert artifact.manifest == saved.manifest
    assert saved.manifest.labels == ["0", "1"]
    assert saved.manifest.queries_spent == Journal.total(tmp_path) == victim.received
    images = SPLITS.test.images
    with torch.no_grad():
        assert torch.equal(artifact.sanitizer.eval()(images), saved.sanitizer.eval()(images))
    assert (
        FitConfig.model_validate(
            {name: value for name, value in saved.manifest.provenance.settings.items() if name != "data_fingerprint"}
        )
        == CONFIG
    )


def test_its_run_goes_on_and_its_classes_may_have_names(tmp_path):
    victim = FunctionVictim(Sides(), LABELS)
    fit(CONFIG, victim, SPLITS, out=tmp_path, device="cpu")
    more = CONFIG.model_copy(update={"steps": 3})
    with pytest.raises(UserError, match="holds a run already"):
        fit(more, victim, SPLITS, out=tmp_path, device="cpu")
    assert fit(more, victim, SPLITS, out=tmp_path, device="cpu", resume=True).manifest.labels == LABELS
