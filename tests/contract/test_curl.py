"""curl speaks to a gateway, as the README has it: forms, bodies and plain JSON, no library in between."""

import base64
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from services.hospital.model import VictimConfig
from services.protocol.images import decode_image, encode_png
from services.protocol.masks import decode_mask

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")

SIZE = (32, 48)
IMAGE = np.random.default_rng(0).random((1, *SIZE), dtype=np.float32)


class Sides(nn.Module):
    """Logits (N,2): the left half is brighter, or the right one."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        difference = images[..., :24].mean(dim=(1, 2, 3)) - images[..., 24:].mean(dim=(1, 2, 3))
        return torch.stack([difference, -difference], dim=1)


class Bright(nn.Module):
    """Logits (N,2,H,W), of the second class where a pixel is brighter than half."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([0.5 - images, images - 0.5], dim=1)


@pytest.fixture(scope="module")
def classifier(defend: Callable[[nn.Module, VictimConfig], str]) -> str:
    """Host and port of a gateway, which inverts, in front of a classifier."""
    return defend(Sides(), VictimConfig(labels=("left", "right"), channels=1, size=SIZE))


@pytest.fixture(scope="module")
def segmenter(defend: Callable[[nn.Module, VictimConfig], str]) -> str:
    """The same in front of a segmenter."""
    return defend(Bright(), VictimConfig(labels=("background", "polyp"), channels=1, size=SIZE))


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    path = tmp_path / "scan.png"
    path.write_bytes(encode_png(IMAGE))
    return path


def curl(*arguments: str) -> tuple[int, bytes]:
    """The answer's status and body."""
    done = subprocess.run(["curl", "-sS", "-w", "%{stderr}%{http_code}", *arguments], capture_output=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return int(done.stderr), done.stdout


def expected(model: nn.Module) -> np.ndarray:
    seen = decode_image(encode_png(IMAGE), channels=1, size=SIZE)
    return np.asarray(model(1 - torch.from_numpy(seen)[None]).softmax(1))[0]


def test_an_image_in_a_form_or_as_the_body(classifier: str, scan: Path) -> None:
    url = f"http://{classifier}/predict"
    for asked in (["-F", f"file=@{scan}"], ["-H", "Content-Type: image/png", "--data-binary", f"@{scan}"]):
        status, body = curl(*asked, url)
        told = json.loads(body)
        assert status == 200
        assert told["probabilities"] == pytest.approx(expected(Sides()).tolist(), rel=1e-5)
        assert told["label"] == ["left", "right"][int(expected(Sides()).argmax())]
        assert told["artifact"]["id"] == "sha256-abc"


def test_a_mask_in_json_or_as_a_file(segmenter: str, scan: Path, tmp_path: Path) -> None:
    url = f"http://{segmenter}/predict"
    classes = expected(Bright()).argmax(0)
    _, body = curl("-F", f"file=@{scan}", url)
    assert np.array_equal(decode_mask(base64.b64decode(json.loads(body)["mask"]), 2, SIZE), classes)
    file = tmp_path / "mask.png"
    status, _ = curl("-F", f"file=@{scan}", "-H", "Accept: image/png", "-o", str(file), url)
    assert status == 200
    assert np.array_equal(decode_mask(file.read_bytes(), 2, SIZE), classes)


@pytest.mark.parametrize("typed", [[], ["-H", "Content-Type: application/json"]])
@pytest.mark.parametrize("path", ["/predict", "/v2/models/defended/infer", "/v2/models/defended/versions/1/infer"])
def test_tensors_in_json_whatever_the_type_that_curl_calls_them(classifier: str, path: str, typed: list[str]) -> None:
    tensor = {"name": "images", "shape": [1, *IMAGE.shape], "datatype": "FP32", "data": [IMAGE.tolist()]}
    status, body = curl("-d", json.dumps({"id": "7", "inputs": [tensor]}), *typed, f"http://{classifier}{path}")
    told = json.loads(body)
    assert status == 200
    assert told["id"] == "7"
    scores = np.asarray(Sides()(1 - torch.from_numpy(IMAGE)[None]).softmax(1))[0]
    assert told["outputs"][0]["shape"] == [1, 2]
    assert told["outputs"][0]["data"] == pytest.approx(scores.tolist(), rel=1e-5)


def test_health_metadata_and_errors(classifier: str, scan: Path) -> None:
    url = f"http://{classifier}"
    for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/defended/ready"):
        assert curl(f"{url}{path}")[0] == 200
    status, body = curl(f"{url}/v2/models/defended")
    assert (status, json.loads(body)["outputs"][0]["shape"]) == (200, [-1, 2])
    wrong = [
        (404, [f"{url}/v2/models/other"], "unknown model"),
        (415, ["-F", f"file=@{__file__}", f"{url}/predict"], "neither"),
        (400, ["-F", f"scan=@{scan}", f"{url}/predict"], "the field 'file'"),
        (400, ["-d", "{}", f"{url}/v2/models/defended/infer"], "'inputs'"),
    ]
    for status, asked, words in wrong:
        found, body = curl(*asked)
        assert found == status
        assert words in json.loads(body)["error"]
