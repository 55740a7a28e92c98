import httpx
import numpy as np
import pytest

from services.protocol import oip
from services.protocol.errors import UpstreamInvalid
from services.protocol.images import decode_image
from services.protocol.wires.predict import PredictWire

IMAGE = np.full((1, 4, 6), 0.5, np.float32)


def answer(*scores: float) -> httpx.Response:
    output = (oip.Tensor("probabilities", np.array([scores], np.float32)), True)
    body, headers = oip.encode_response([output], model_name="m", model_version="1")
    return httpx.Response(200, content=body, headers=headers)


def test_names_are_asked_for_with_a_png_and_its_answer_is_passed_on_as_it_is() -> None:
    wire = PredictWire(labels=None)
    body, headers = wire.encode_question(IMAGE)
    assert headers == {"Content-Type": "image/png"}
    assert decode_image(body, channels=1, size=(4, 6)).shape == IMAGE.shape
    told = {"label": "a", "labels": ["a", "b"], "artifact": {"id": "x"}}
    assert wire.read_description(httpx.Response(200, json=told), IMAGE.shape) == told
    assert wire.read(answer(0.25, 0.75), (1, *IMAGE.shape)).labels is None


def test_where_names_are_known_a_victim_that_takes_no_images_is_described_by_its_scores() -> None:
    wire = PredictWire(labels=("a", "b"))
    assert wire.encode_question(IMAGE) == wire.encode(IMAGE[None])
    told = wire.read_description(answer(0.25, 0.75), IMAGE.shape)
    assert told == {"label": "b", "labels": ["a", "b"], "probabilities": [0.25, 0.75]}
    with pytest.raises(UpstreamInvalid, match="3 classes, for 2 labels"):
        wire.read(answer(1, 2, 3), (1, *IMAGE.shape))
