"""Names that stand for several replicas: looked up, followed as they change, and spoken to under their own name."""

import http.server
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import anyio
import httpx
import numpy as np
import pytest

from services.protocol import oip, replicas, roster
from services.protocol.client import AsyncVictimClient
from services.protocol.errors import InvalidInput, UpstreamUnreachable
from services.protocol.replicas import Replica
from services.protocol.roster import Roster

pytestmark = pytest.mark.anyio

NAME = "dns+http://hospital:8000"
IMAGES = np.zeros((3, 1, 2, 2), np.float32)


class Names:
    """A name service: what it says, how often it was asked, and an error in place of an answer."""

    def __init__(self) -> None:
        self.says: list[str] = ["10.0.0.1", "10.0.0.2"]
        self.asked: list[str] = []
        self.error: OSError | None = None

    async def addresses(self, host: str) -> tuple[str, ...]:
        self.asked.append(host)
        if self.error is not None:
            raise self.error
        return tuple(self.says)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    service = Names()
    monkeypatch.setattr(roster, "addresses", service.addresses)
    monkeypatch.setattr(roster, "REFRESH_S", 0.0)
    monkeypatch.setattr(replicas, "BACKOFF_FIRST_S", 0.001)
    return service


def answered(body: bytes, headers: Mapping[str, str]) -> httpx.Response:
    images = oip.decode_request(body, oip.header_length(headers[oip.HEADER])).inputs[0].array
    scores = oip.Tensor("probabilities", np.full((len(images), 2), 0.5, np.float32))
    body, headers = oip.encode_response([(scores, True)], model_name="m", model_version="1")
    return httpx.Response(200, content=body, headers=headers)


class Hosts:
    """Victims at every address but those that are down, which note who was asked under which name."""

    def __init__(self) -> None:
        self.down: set[str] = set()
        self.asked: list[tuple[str, str]] = []

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.host in self.down:
            raise httpx.ConnectError("refused")
        self.asked.append((request.url.host, request.headers["Host"]))
        assert request.extensions.get("sni_hostname", "hospital") == "hospital"
        await anyio.sleep(0.01)  # so that requests meet
        return answered(request.content, request.headers) if request.method == "POST" else httpx.Response(200)


async def test_every_address_is_a_replica_asked_under_the_name(names: Names) -> None:
    hosts = Hosts()
    async with AsyncVictimClient([NAME], batch=1, in_flight=2, transport=httpx.MockTransport(hosts)) as victim:
        for _ in range(3):
            await victim.infer(IMAGES)
    assert {address for address, _ in hosts.asked} == {"10.0.0.1", "10.0.0.2"}
    assert {name for _, name in hosts.asked} == {"hospital:8000"}
    assert set(names.asked) == {"hospital"}


async def test_a_replica_that_comes_is_used_and_one_that_goes_is_not_asked_again(names: Names) -> None:
    hosts = Hosts()
    async with AsyncVictimClient([NAME], batch=1, in_flight=3, transport=httpx.MockTransport(hosts)) as victim:
        await victim.infer(IMAGES)
        names.says = ["10.0.0.2", "10.0.0.3"]
        hosts.asked.clear()
        await victim.infer(IMAGES)
        assert {address for address, _ in hosts.asked} == {"10.0.0.2", "10.0.0.3"}


async def test_a_dead_replica_is_left_out_and_a_new_one_found_while_waiting(names: Names) -> None:
    hosts = Hosts()
    names.says = ["10.0.0.1"]
    hosts.down = {"10.0.0.1"}
    transport = httpx.MockTransport(hosts)
    async with AsyncVictimClient([NAME], batch=4, patience_s=60.0, transport=transport) as victim:
        assert not await victim.ready()
        names.says = ["10.0.0.9"]
        assert len(await victim.infer(IMAGES)) == 3
    assert {address for address, _ in hosts.asked} == {"10.0.0.9"}


async def test_a_name_that_is_lost_leaves_the_addresses_known_last(names: Names) -> None:
    one = Roster([Replica.at(NAME)])
    await one.refresh()
    known = one.replicas
    names.error = OSError("no such name")
    await one.refresh()
    assert one.replicas == known
    assert len(names.asked) == 2


async def test_a_name_that_was_never_found_is_asked_by_itself(names: Names) -> None:
    names.error = OSError("no such name")
    one = Roster([Replica.at(NAME)])
    await one.refresh()
    assert [replica.url for replica in one.replicas] == ["http://hospital:8000/predict"]


async def test_who_failed_stays_the_same_replica_as_long_as_its_address_remains(names: Names) -> None:
    one = Roster([Replica.at(NAME), Replica.at("http://elsewhere:1")])
    await one.refresh()
    first = one.replicas[0]
    first.failed(0.0, started=0.0, error=UpstreamUnreachable("away"))
    names.says.insert(0, "10.0.0.0")
    await one.refresh()
    assert one.replicas[1].url == first.url
    assert one.replicas[1] is first
    assert [replica.url for replica in one.replicas][-1] == "http://elsewhere:1/predict"


async def test_names_are_looked_up_now_and_then_and_only_where_asked_for(
    names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roster, "REFRESH_S", 1000.0)
    plain = Roster([Replica.at("http://hospital:8000")])
    await plain.refresh()
    assert names.asked == []
    one = Roster([Replica.at(NAME)])
    await one.refresh()
    await one.refresh()
    assert names.asked == ["hospital"]


def test_every_path_of_a_server_is_behind_the_address() -> None:
    one = Replica.at("dns+https://server:8443/v2/models/m").behind("fd00::1")
    assert one.url == "https://[fd00::1]:8443/v2/models/m/infer"
    assert one.health == "https://[fd00::1]:8443/v2/models/m/ready"
    assert one.server is not None
    assert one.server.server == "https://[fd00::1]:8443/v2"
    assert one.host == "server:8443"


@pytest.mark.parametrize("url", ["dns+ftp://hospital", "dns+hospital:80", "dns+", "dns+http://"])
def test_what_is_no_url_behind_the_prefix_is_refused(url: str) -> None:
    with pytest.raises(InvalidInput, match="URL"):
        Replica.at(url)


async def test_the_systems_own_names_are_asked() -> None:
    assert "127.0.0.1" in await roster.addresses("127.0.0.1")
    with pytest.raises(OSError):  # noqa: PT011 - its words are the system's
        await roster.addresses("no-such-name.invalid")


@contextmanager
def listening(address: str, port: int, asked: list[tuple[str, str]]) -> Iterator[int]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            asked.append((address, self.headers["Host"]))
            response = answered(body, self.headers)
            self.send_response(200)
            for name, value in response.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(response.content)

        def log_message(self, *_args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer((address, port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


async def test_over_real_sockets(names: Names) -> None:
    names.says = ["127.0.0.1", "127.0.0.2"]
    asked: list[tuple[str, str]] = []
    with ExitStack() as stack:
        port = stack.enter_context(listening("127.0.0.1", 0, asked))
        stack.enter_context(listening("127.0.0.2", port, asked))
        async with AsyncVictimClient([f"dns+http://hospital:{port}"], batch=1, in_flight=2) as victim:
            for _ in range(4):
                assert (await victim.infer(IMAGES)).shape == (3, 2)
    assert {address for address, _ in asked} == {"127.0.0.1", "127.0.0.2"}
    assert {name for _, name in asked} == {f"hospital:{port}"}
