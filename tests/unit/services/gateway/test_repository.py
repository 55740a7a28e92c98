"""Artifacts by number: which there are, and which are refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from defense.artifact import MANIFEST_FILE, Provenance, save_artifact
from defense.errors import ArtifactError
from defense.sanitizer import ImageShape, Sanitizer, SanitizerConfig
from services.gateway import repository as module
from services.gateway.repository import Repository, probes

SHAPE = ImageShape(channels=1, height=16, width=16)


def publish(folder: Path, seed: int = 0) -> str:
    """Writes an artifact; gives its id."""
    torch.manual_seed(seed)
    sanitizer = Sanitizer(SanitizerConfig(input=SHAPE, denoiser="dncnn-small", autoencoder=None))
    provenance = Provenance(
        method="mse", estimator=None, data="noise", data_fingerprint="0", settings={}, versions={}, validation={}
    )
    return save_artifact(
        folder, sanitizer, name="ours", labels=["a", "b"], sigma=0.25, queries={}, provenance=provenance
    ).id


def test_an_artifact_by_itself_is_version_one(tmp_path: Path) -> None:
    identity = publish(tmp_path)
    repository = Repository(tmp_path)
    assert repository.numbers() == ("1",)
    for number in (None, "1"):
        version = repository.load(number)
        assert (version.number, version.artifact.manifest.id) == ("1", identity)


def test_the_highest_number_is_the_newest_and_others_may_be_named(tmp_path: Path) -> None:
    ids = {str(number): publish(tmp_path / str(number), number) for number in (2, 10, 9)}
    for other in ("03", "latest", "0", "-1", "1.5"):
        publish(tmp_path / other)
    repository = Repository(tmp_path)
    assert repository.numbers() == ("2", "9", "10")
    assert repository.load().artifact.manifest.id == ids["10"]
    assert repository.load("9").artifact.manifest.id == ids["9"]


def test_versions_that_come_are_seen(tmp_path: Path) -> None:
    publish(tmp_path / "1")
    repository = Repository(tmp_path)
    assert repository.load().number == "1"
    publish(tmp_path / "2")
    assert repository.load().number == "2"


def test_a_version_that_is_being_copied_is_not_served(tmp_path: Path) -> None:
    publish(tmp_path / "1")
    publish(tmp_path / "elsewhere", 1)
    (tmp_path / "2").mkdir()
    weights = next((tmp_path / "elsewhere").glob("*.safetensors"))
    shutil.copy(weights, tmp_path / "2")
    assert Repository(tmp_path).load().number == "1", "no manifest yet"
    shutil.copy(tmp_path / "elsewhere" / MANIFEST_FILE, tmp_path / "2")
    (tmp_path / "2" / weights.name).write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ArtifactError, match="altered"):
        Repository(tmp_path).load()
    assert Repository(tmp_path).load("1").number == "1"


@pytest.mark.parametrize("folder", ["nothing", "empty"])
def test_a_folder_without_any_is_refused(folder: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match=r"neither an artifact nor folders 1, 2, \.\.\."):
        Repository(tmp_path / folder).load()


def test_a_number_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    publish(tmp_path / "1")
    with pytest.raises(ArtifactError, match="no version '7'; there are 1"):
        Repository(tmp_path).load("7")


class Returns(torch.nn.Module):
    def __init__(self, *outputs: float) -> None:
        super().__init__()
        self.outputs = list(outputs)

    def forward(self, images: Tensor) -> Tensor:
        return torch.full_like(images, self.outputs.pop(0))


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        ((1.5, 1.5), "no images"),
        ((float("nan"), float("nan")), "no images"),
        ((0.2, 0.3), "not the same function twice"),
    ],
)
def test_a_sanitizer_that_fails_on_the_probes_is_refused(
    outputs: tuple[float, float], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path)
    artifact = module.load_artifact(tmp_path)
    broken = type(artifact)(Returns(*outputs), artifact.manifest)  # type: ignore[arg-type]
    monkeypatch.setattr(module, "load_artifact", lambda _path: broken)
    with pytest.raises(ArtifactError, match=words):
        Repository(tmp_path).load()


@pytest.mark.parametrize("shape", [(1, 8, 6), (3, 5, 64)])
def test_probes_are_images_and_always_the_same(shape: tuple[int, int, int]) -> None:
    images = probes(shape)
    assert (images.shape, images.dtype) == ((4, *shape), np.float32)
    assert images.min() >= 0
    assert images.max() <= 1
    assert np.array_equal(images, probes(shape))
