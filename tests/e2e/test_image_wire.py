"""zo_fit against a real server that knows only images: one a request, JSON back, perhaps nothing but a label."""

import base64
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch
from fastapi import FastAPI, Request
from zo_fit_runs import serving

from defense.artifact import load_artifact
from defense.noise_floor import probe_queries
from services.protocol.decoding.pool import DecodingPool
from services.protocol.images import decode_image
from services.protocol.requests import read_request
from training import pretrain, zo_fit
from training.data.datasets import ImageSet, Splits
from training.fit.checkpoint import Journal

SIZE = 16
LABELS = ["left", "right"]


class ImageServer:
    """Compares the two sides of an image; counts what it receives."""

    def __init__(self, names_only: bool) -> None:
        self.names_only = names_only
        self.received = 0
        self.app = FastAPI()
        self.app.post("/predict")(self.predict)
        self.app.post("/models/sides:classify")(self.classify)

    async def predict(self, request: Request) -> dict[str, object]:
        assert request.headers["Content-Type"].startswith("multipart/form-data")
        probabilities = self.compare(
            (await read_request(request, (1, SIZE, SIZE), DecodingPool(1), max_body_bytes=10**6)).images[0]
        )
        told = {"label": LABELS[int(probabilities[0] < 0.5)], "labels": LABELS}
        return told if self.names_only else {**told, "probabilities": probabilities}

    async def classify(self, request: Request) -> list[dict[str, object]]:
        """The same for those who have a key, in a form of its own: base64 in, the best class first out."""
        assert request.headers["Authorization"] == "Bearer s3cret"
        (sent,) = (await request.json())["instances"]
        png = base64.b64decode(sent["b64"], validate=True)
        probabilities = self.compare(decode_image(png, channels=1, size=(SIZE, SIZE)))
        pairs = sorted(zip(probabilities, LABELS, strict=True), reverse=True)
        return [{"label": label, "score": score} for score, label in pairs]

    def compare(self, image: np.ndarray) -> list[float]:
        self.received += 1
        difference = 30 * (image[..., : SIZE // 2] - image[..., SIZE // 2 :]).mean()
        probabilities: list[float] = torch.tensor([difference, -difference]).softmax(0).tolist()
        return probabilities

    def running(self) -> AbstractContextManager[str]:
        return serving(self.app)


def image_set(count: int, seed: int) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    images = 0.3 + 0.1 * torch.rand(count, 1, SIZE, SIZE, generator=generator)
    images[..., : SIZE // 2] += 0.2 * (torch.rand(count, 1, 1, 1, generator=generator) - 0.5)
    return ImageSet(images, torch.zeros(count, dtype=torch.int64), tuple(map(str, range(count))))


@pytest.fixture
def flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    splits = Splits("halves", tuple(LABELS), image_set(60, 0), image_set(8, 1), image_set(8, 2), "f" * 64)
    for module in (pretrain, zo_fit):
        monkeypatch.setattr(module, "load_data", lambda *_, **__: splits)
    made = tmp_path / "pretrained"
    assert pretrain.main(["--pretrain-steps", "20", "--code", "8", "--size", str(SIZE), "--out", str(made)]) == 0
    quick = ["--batch", "4", "--directions", "3", "--device", "cpu"]
    return ["--wire", "image", "--pretrained", str(made), *quick, "--out", str(tmp_path / "out")]


def test_a_victim_that_knows_only_images_is_learned_from_one_upload_at_a_time(flags, tmp_path):
    victim = ImageServer(names_only=False)
    with victim.running() as url:
        assert zo_fit.main(["--victim-url", url, "--steps", "2", *flags]) == 0
    manifest = load_artifact(tmp_path / "out").manifest
    assert manifest.queries_spent == victim.received == Journal.total(tmp_path / "out")
    assert manifest.labels == LABELS
    assert manifest.provenance.estimator["mu"] > 0.005  # 8 bits hide the published step


def test_an_endpoint_with_ways_of_its_own_is_learned_through_a_mapping(flags, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("SIDES_KEY", "s3cret")
    mapping = tmp_path / "sides.toml"
    mapping.write_text(
        """
        labels = ["left", "right"]
        headers = { Authorization = "Bearer ${SIDES_KEY}" }
        image = { json = { instances = [{ b64 = "{image}" }] } }
        answer = { scores = "" }
        """
    )
    victim = ImageServer(names_only=False)
    with victim.running() as url:
        where = ["--victim-url", f"{url}/models/sides:classify", "--victim-mapping", str(mapping)]
        assert zo_fit.main([*where, "--steps", "2", *flags, "--wire", "tensor"]) == 0
    manifest = load_artifact(tmp_path / "out").manifest
    assert manifest.queries_spent == victim.received == Journal.total(tmp_path / "out")
    assert manifest.labels == LABELS
    assert "s3cret" not in manifest.model_dump_json() + caplog.text


def test_a_victim_that_tells_only_labels_is_refused_by_name_and_votes_are_the_remedy(flags, tmp_path, capsys):
    victim = ImageServer(names_only=True)
    with victim.running() as url:
        assert zo_fit.main(["--victim-url", url, "--steps", "1", *flags]) == 2
        assert "--votes V" in capsys.readouterr().err
        assert victim.received == probe_queries(32)
        other = ["--out", str(tmp_path / "voted")]
        votes = ["--votes", "2", "--vote-noise", "0.2", "--mu", "1"]
        assert zo_fit.main(["--victim-url", url, "--steps", "1", *flags, *other, *votes]) == 0
    manifest = load_artifact(tmp_path / "voted").manifest
    assert manifest.queries_spent == victim.received - probe_queries(32)
    assert manifest.queries["probe"] == 2 * probe_queries(32) + 1
