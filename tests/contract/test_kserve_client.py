"""KServe's Python client speaks to a gateway in front of a hospital."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from services.hospital.model import VictimConfig, build_victim

kserve = pytest.importorskip("kserve")

CONFIG = VictimConfig(labels=("a", "b", "c"), channels=1, size=(32, 32), width=0.125)
IMAGES = np.random.default_rng(0).random((5, 1, 32, 32), dtype=np.float32)


@pytest.mark.anyio
async def test_scores_in_json_and_in_binary(defend: Callable[[nn.Module, VictimConfig], str]) -> None:
    torch.manual_seed(0)
    model = build_victim(CONFIG).eval()
    with torch.inference_mode():
        expected = np.asarray(model(1 - torch.from_numpy(IMAGES)).softmax(dim=1))
    url = f"http://{defend(model, CONFIG)}"
    client = kserve.InferenceRESTClient(kserve.RESTConfig(protocol="v2"))
    try:
        assert await client.is_server_live(url)
        assert await client.is_server_ready(url)
        assert await client.is_model_ready(url, "defended")
        for binary in (True, False):
            sent = kserve.InferInput("images", list(IMAGES.shape), "FP32")
            sent.set_data_from_numpy(IMAGES, binary_data=binary)
            asked = kserve.InferRequest("defended", [sent], parameters={"binary_data_output": binary})
            answer = await client.infer(url, asked, model_name="defended")
            assert answer.outputs[0].as_numpy() == pytest.approx(expected, rel=1e-4)
    finally:
        await client.close()
