import io
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from gateway_fakes import Answers, Upstream, gateway, images
from service_fakes import tensor_request

from services.protocol import logs
from services.protocol.logs import HEADER, LogFormat

pytestmark = pytest.mark.anyio


Lines = Callable[[], list[dict[str, Any]]]


@contextmanager
def logged(form: LogFormat) -> Iterator[io.StringIO]:
    """What is logged inside, by anybody."""
    root, handler, text = logging.getLogger(), logs.make_handler(form), io.StringIO()
    assert isinstance(handler, logging.StreamHandler)
    handler.setStream(text)
    before = root.level
    root.addHandler(handler)
    root.setLevel("INFO")
    yield text
    root.removeHandler(handler)
    root.setLevel(before)


@pytest.fixture
def lines() -> Iterator[Lines]:
    """What has been logged by this project, as JSON."""

    def told() -> list[dict[str, Any]]:
        read = [json.loads(line) for line in text.getvalue().splitlines()]
        return [line for line in read if line["logger"].startswith("services")]

    with logged("json") as text:
        yield told


async def test_a_request_has_one_id_in_its_answer_its_log_and_at_the_victim(
    lines: Callable[[], list[dict[str, Any]]],
) -> None:
    received: list[httpx.Headers] = []

    class Notes(Upstream):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            received.append(request.headers)
            return await super().handle_async_request(request)

    question = tensor_request(images(1))
    async with gateway(Notes()) as http:
        mine = await http.post(
            "/predict?mode=sanitize",
            content=question["content"],
            headers={**question["headers"], HEADER: "trace-7:a.b"},
        )
        others = [(await http.post("/predict", **question)).headers[HEADER] for _ in range(2)]
    assert mine.headers[HEADER] == received[0][HEADER] == "trace-7:a.b"
    assert [one[HEADER] for one in received[1:]] == others
    assert len(set(others)) == 2
    told = [line for line in lines() if line["logger"] == "services.protocol.logs"]
    assert [line["request_id"] for line in told] == ["trace-7:a.b", *others]
    for line in told:
        assert (line["level"], line["method"], line["route"], line["status"]) == ("INFO", "POST", "/predict", 200)
        assert line["ms"] >= 0
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])


@pytest.mark.parametrize("identity", ["", "a b", "x" * 129, 'a"}', "é"])
async def test_an_id_that_could_disturb_a_log_is_replaced(identity: str) -> None:
    async with gateway(Upstream()) as http:
        response = await http.get("/v2/health/live", headers=[(HEADER.encode(), identity.encode())])
    assert re.fullmatch("[0-9a-f]{32}", response.headers[HEADER])


async def test_an_unexpected_error_has_its_id_and_its_traceback_in_the_log_alone(
    lines: Callable[[], list[dict[str, Any]]],
) -> None:
    async with gateway(Upstream(), Answers(lambda images: images * float("nan"))) as http:
        response = await http.post("/predict", **tensor_request(images(1)))
    assert response.status_code == 500
    assert response.json() == {"error": "internal error"}
    told = lines()
    assert {line["request_id"] for line in told} == {response.headers[HEADER]}
    assert any(line.get("status") == 500 for line in told)


def test_text_lines_have_the_id_too() -> None:
    with logged("text") as text:
        logging.getLogger("services.x").warning("two\nlines %s", 5)
        logging.getLogger("services.x").debug("nothing")
    assert re.search(r"WARNING services.x \[.+\]: two\nlines 5\n$", text.getvalue())


def test_a_traceback_is_one_line_of_json() -> None:
    try:
        raise ValueError("why\nso")
    except ValueError:
        record = logging.LogRecord("n", logging.ERROR, "p", 1, "it %s", ("failed",), sys.exc_info())
    (line,) = logs.JsonFormatter().format(record).splitlines()
    told = json.loads(line)
    assert told["message"] == "it failed"
    assert "ValueError: why\nso" in told["traceback"]
