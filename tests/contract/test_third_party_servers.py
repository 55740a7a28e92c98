"""Our client, and our gateway, in front of Open Inference Protocol servers that we did not write."""

import base64
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import tritonclient.http as triton
from arithmetic import SHAPE, SIDES, classify, segment
from PIL import Image
from third_party import kserve, mlserver

from defense.artifact import load_artifact
from services.protocol.client import AsyncVictimClient
from services.protocol.errors import InvalidInput, NotFound, ServiceError, UpstreamInvalid
from services.protocol.mapping import Mapping
from training import pretrain, zo_fit
from training.data.datasets import ImageSet, Splits

IMAGES = np.random.default_rng(0).random((5, *SHAPE), dtype=np.float32)
CHOSEN = {"tensor": {"output": "scores"}}


@pytest.fixture(scope="module", params=[kserve, mlserver], ids=["kserve", "mlserver"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with the models of `servers/arithmetic.py`."""
    with request.param(tmp_path_factory.mktemp(request.param.__name__)) as url:
        yield url


def client(server: str, model: str, content: dict[str, Any] | None = None, **options: Any) -> AsyncVictimClient:
    return AsyncVictimClient([f"{server}/v2/models/{model}"], mapping=Mapping.model_validate(content or {}), **options)


@pytest.mark.parametrize(
    ("model", "content", "expected"),
    [
        ("classifier", {}, classify(IMAGES)),
        ("segmenter", {}, np.concatenate([1 - segment(IMAGES), segment(IMAGES)], axis=1)),
        ("wordy", CHOSEN, classify(IMAGES)),
        ("undeclared", {}, classify(IMAGES)),
    ],
)
@pytest.mark.anyio
async def test_scores_of_every_kind_of_model(server: str, model: str, content: dict[str, Any], expected: Any) -> None:
    async with client(server, model, content, batch=2) as victim:
        assert await victim.ready()
        scores = await victim.infer(IMAGES)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, rtol=1e-6)


@pytest.mark.anyio
async def test_what_the_metadata_rule_out_is_told_before_anything_is_sent(server: str) -> None:
    async with client(server, "wordy") as victim:
        with pytest.raises(InvalidInput, match=r"the outputs 'word', 'scores'.*\[tensor\] output"):
            await victim.infer(IMAGES)
    async with client(server, "classifier", {"tensor": {"output": "logits"}}) as victim:
        with pytest.raises(InvalidInput, match="no output 'logits', but 'scores'"):
            await victim.infer(IMAGES)
    async with client(server, "classifier") as victim:
        with pytest.raises(InvalidInput, match=r"takes images as \[-1, 1, 8, 6\], these are \[N, 3, 8, 6\]"):
            await victim.infer(np.repeat(IMAGES, 3, axis=1))


@pytest.mark.anyio
async def test_a_model_that_is_not_there_is_not_ready_and_told(server: str) -> None:
    async with client(server, "other") as victim:
        assert not await victim.ready()
        with pytest.raises(NotFound, match=r"answered 404: .*other"):
            await victim.infer(IMAGES)


@pytest.mark.anyio
async def test_a_servers_failure_is_an_invalid_answer(server: str) -> None:
    async with client(server, "undeclared") as victim:
        with pytest.raises(ServiceError, match="answered 500") as caught:
            await victim.infer(IMAGES[:, :, :4])
    assert type(caught.value) is UpstreamInvalid


@pytest.mark.anyio
async def test_binary_tensors_where_the_server_reads_them_without_saying_so(server: str) -> None:
    """KServe does; MLServer's REST endpoints do not, and refuse them."""
    encoding = {"encoding": "binary"}
    async with httpx.AsyncClient() as http:
        is_kserve = (await http.get(f"{server}/v2")).json()["name"] == "kserve"
    for model in ("classifier", "wordy", "undeclared"):
        content = {"tensor": {**encoding, **(CHOSEN["tensor"] if model == "wordy" else {})}}
        async with client(server, model, content) as victim:
            if is_kserve:
                assert np.array_equal(await victim.infer(IMAGES), classify(IMAGES))
            else:
                with pytest.raises(ServiceError):
                    await victim.infer(IMAGES)


@pytest.mark.anyio
async def test_classes_have_the_names_of_a_mapping_or_numbers(server: str) -> None:
    names = ["left", "right", "all"]
    async with client(server, "classifier", {"labels": names}) as victim:
        told = await victim.describe(IMAGES[0])
    assert told["labels"] == names
    assert told["label"] == names[int(classify(IMAGES)[0].argmax())]
    async with client(server, "classifier") as victim:
        assert (await victim.describe(IMAGES[0]))["labels"] == ["0", "1", "2"]


def ask(url: str, images: np.ndarray) -> Any:
    """tritonclient's answer of a gateway."""
    with triton.InferenceServerClient(url) as asker:
        sent = triton.InferInput("images", list(images.shape), "FP32")
        sent.set_data_from_numpy(images)
        assert asker.is_model_ready("defended")
        return asker.infer("defended", [sent]).as_numpy("probabilities")


def test_the_gateway_defends_a_classifier_there(server: str, front: Callable[..., str]) -> None:
    url = front(f"{server}/v2/models/classifier", SHAPE, ("left", "right", "all"), forward_batch=2)
    np.testing.assert_allclose(ask(url, IMAGES), classify(1 - IMAGES), rtol=1e-5)


def test_the_gateway_answers_with_the_mask_of_a_segmenter_there(server: str, front: Callable[..., str]) -> None:
    url = front(f"{server}/v2/models/segmenter", SHAPE, ("background", "polyp"))
    foreground = segment(1 - IMAGES)
    np.testing.assert_allclose(ask(url, IMAGES), np.concatenate([1 - foreground, foreground], axis=1), atol=1e-6)
    left_is_dark = Image.fromarray(np.repeat([[0] * 30 + [255] * 30], 80, axis=0).astype(np.uint8))
    file = io.BytesIO()
    left_is_dark.save(file, format="PNG")
    told = httpx.post(f"http://{url}/predict", files={"file": file.getvalue()}).json()
    with Image.open(io.BytesIO(base64.b64decode(told["mask"]))) as mask:
        assert mask.size == (60, 80)
        assert np.array_equal(np.asarray(mask)[:, :25], np.full((80, 25), 255))
        assert np.array_equal(np.asarray(mask)[:, 35:], np.zeros((80, 25)))


def test_the_gateway_tells_nothing_of_a_model_that_is_not_there(server: str, front: Callable[..., str]) -> None:
    url = front(f"{server}/v2/models/other", SHAPE)
    assert httpx.get(f"http://{url}/v2/health/ready").status_code == 503
    response = httpx.post(f"http://{url}/predict", files={"file": b""})
    assert response.status_code == 400
    file = io.BytesIO()
    Image.new("L", (6, 8)).save(file, format="PNG")
    response = httpx.post(f"http://{url}/predict", files={"file": file.getvalue()})
    assert response.status_code == 502
    assert server not in response.text


def image_set(count: int, seed: int) -> ImageSet:
    """Images of which one side or the other is a little brighter."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.3 + 0.1 * torch.rand(count, *SIDES, generator=generator)
    images[..., :8] += 0.2 * (torch.rand(count, 1, 1, 1, generator=generator) - 0.5)
    return ImageSet(images, torch.zeros(count, dtype=torch.int64), tuple(map(str, range(count))))


def test_a_defense_is_learned_from_a_model_there(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = Splits("sides", ("left", "right"), image_set(60, 0), image_set(8, 1), image_set(8, 2), "f" * 64)
    for module in (pretrain, zo_fit):
        monkeypatch.setattr(module, "load_data", lambda *_, **__: splits)
    made = str(tmp_path / "pretrained")
    assert pretrain.main(["--pretrain-steps", "20", "--code", "8", "--size", "16", "--out", made]) == 0
    mapping = tmp_path / "sides.toml"
    mapping.write_text('labels = ["left", "right"]')
    victim = ["--victim-url", f"{server}/v2/models/sides", "--victim-mapping", str(mapping), "--batch-images", "64"]
    quick = ["--batch", "4", "--directions", "3", "--steps", "2", "--device", "cpu"]
    assert zo_fit.main([*victim, *quick, "--pretrained", made, "--out", str(tmp_path / "out")]) == 0
    manifest = load_artifact(tmp_path / "out").manifest
    assert manifest.labels == ["left", "right"]
    assert manifest.provenance.settings["victim_url"] == [f"{server}/v2/models/sides"]
    assert manifest.queries_spent == sum(manifest.queries.values()) > 400
