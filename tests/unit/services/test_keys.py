import hashlib
import sys
from pathlib import Path

import pytest
from gateway_fakes import Upstream, gateway, images
from service_fakes import assert_error, serving, tensor_request
from torch import Tensor, nn

from services.hospital.app import make_hospital
from services.hospital.config import HospitalSettings
from services.hospital.model import VictimConfig
from services.keys import MAX_BUCKETS, Access, Client, Keys, Purses, Rate, main, make_key
from services.protocol.errors import InvalidInput, RateLimited, Unauthorized


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A file of two clients, whose keys are "secret-a" and "secret-b"; b may send two images a second."""
    path = tmp_path / "keys.toml"
    path.write_text(
        f'[a]\nsha256 = "{digest("secret-a")}"\n\n'
        f'[b]\nsha256 = "{digest("secret-b")}"\nimages_per_second = 0.001\nburst = 2\n'
    )
    return path


def test_a_key_says_whose_it_is(keys: Path) -> None:
    read = Keys.load(keys)
    assert read.client("secret-a") == Client("a", digest("secret-a"))
    assert read.client("secret-b").rate == Rate(0.001, 2)
    for other in (None, "", "secret", digest("secret-a"), "sécret-a"):
        with pytest.raises(Unauthorized, match="X-API-Key"):
            read.client(other)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no key"),
        ("not toml", "is no TOML"),
        ("[a]\nsha256 = 'k3y'", r"\[a\] needs sha256"),
        ("[a]\nkey = 'k3y'", r"\[a\] has fields"),
        ("a = 'k3y'", r"\[a\] is no table"),
        ("['a b']\nsha256 = 'k3y'", "is no table"),
        (f"[a]\nsha256 = '{'0' * 64}'\nburst = 5", "no images_per_second"),
        (f"[a]\nsha256 = '{'0' * 64}'\nimages_per_second = 0", "number above 0"),
        (f"[a]\nsha256 = '{'0' * 64}'\nimages_per_second = true", "number above 0"),
        (f"[a]\nsha256 = '{'0' * 64}'\nimages_per_second = inf", "number above 0"),
        (f"[a]\nsha256 = '{'0' * 64}'\nimages_per_second = 1\nburst = '9'", "number above 0"),
    ],
)
def test_a_file_that_is_wrong_is_refused_and_not_quoted(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(InvalidInput, match=words) as caught:
        Keys.load(path)
    assert "k3y" not in str(caught.value)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot be read"):
        Keys.load(tmp_path / "nowhere.toml")


def test_the_command_makes_keys_that_work_and_shows_them_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "keys.toml"
    told = {}
    for arguments in (["clinic-a"], ["clinic-b", "--rate", "2.5", "--burst", "9"]):
        assert main(arguments) == 0
        out, err = capsys.readouterr()
        told[arguments[0]] = err.strip().rpartition(" ")[2]
        assert told[arguments[0]] not in out
        with path.open("a") as file:
            file.write(out)
    read = Keys.load(path)
    assert read.client(told["clinic-a"]) == Client("clinic-a", digest(told["clinic-a"]))
    assert read.client(told["clinic-b"]).rate == Rate(2.5, 9)
    assert len({make_key("x")[0] for _ in range(100)}) == 100


@pytest.mark.parametrize(
    "arguments", [["a b"], [""], ["x", "--rate", "0"], ["x", "--rate", "nan"], ["x", "--burst", "3"]]
)
def test_the_command_refuses_what_the_file_would(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        sys.exit(main(arguments))
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


def test_a_purse_holds_a_burst_and_fills_at_its_rate() -> None:
    clock = Clock()
    purses = Purses(Rate(2.0, 6), clock)
    purses.take("a", 4)
    purses.take("a", 2)
    with pytest.raises(RateLimited) as caught:
        purses.take("a", 1)
    assert caught.value.retry_after == pytest.approx(0.5)
    purses.take("b", 6)  # whose purse is another one
    clock.now += 0.5
    purses.take("a", 1)
    clock.now += 1000  # it never holds more than a burst
    purses.take("a", 6)
    with pytest.raises(RateLimited):
        purses.take("a", 1)


def test_more_than_a_burst_is_let_in_when_the_purse_is_full_and_paid_off_later() -> None:
    clock = Clock()
    purses = Purses(Rate(2.0, 6), clock)
    purses.take("a", 20)
    with pytest.raises(RateLimited) as caught:
        purses.take("a", 1)
    assert caught.value.retry_after == pytest.approx((20 - 6 + 1) / 2)
    clock.now += 7.5
    purses.take("a", 1)


def test_in_the_long_run_nobody_sends_faster_than_its_rate() -> None:
    clock = Clock()
    purses = Purses(Rate(10.0, 5), clock)
    sent = 0
    for step in range(10_000):
        clock.now += 0.01
        try:
            purses.take("a", step % 4 + 1)
        except RateLimited:
            continue
        sent += step % 4 + 1
    assert 950 <= sent <= 1005


def test_purses_that_are_full_are_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_BUCKETS > 10_000, "the gateway's accounts"
    monkeypatch.setattr("services.keys.MAX_BUCKETS", 3)
    clock = Clock()
    purses = Purses(Rate(1.0, 1), clock)
    for name in "abc":
        purses.take(name, 1)
    clock.now += 2
    purses.take("d", 1)
    assert set(purses._full_at) == {"d"}


def test_a_clients_own_rate_comes_before_the_services() -> None:
    access = Access(None, Rate(1.0, 1), lambda key: key or "nobody")
    assert access.client(None).name == "nobody"
    access.take(Client("a"), 1)
    with pytest.raises(RateLimited):
        access.take(Client("a"), 1)
    for _ in range(5):
        access.take(Client("b", rate=Rate()), 100)


SENDINGS = [{"X-API-Key": "secret-a"}, {"Authorization": "Bearer secret-a"}, {"authorization": "bearer secret-a"}]


@pytest.mark.anyio
async def test_a_gateway_with_keys_answers_nobody_else_and_counts_by_client(keys: Path) -> None:
    upstream = Upstream()
    question = tensor_request(images(1))
    async with gateway(upstream, keys=keys, usage=True) as http:
        for path in ("/predict", "/v2/models/defended/infer", "/v2/models/nonsense/infer"):
            for sent in ({}, {"X-API-Key": "secret-c"}, {"Authorization": "Basic secret-a"}):
                headers = {**question["headers"], **sent}
                refused = await http.post(path, content=question["content"], headers=headers)
                assert_error(refused, 401, "API key")
                assert refused.headers["WWW-Authenticate"] == "Bearer"
        assert_error(await http.get("/v2/models/defended"), 401)
        assert not upstream.received
        for sent in SENDINGS:
            headers = {**question["headers"], **sent}
            assert (await http.post("/predict", content=question["content"], headers=headers)).status_code == 200
        assert (await http.get("/v2/models/defended", headers=SENDINGS[0])).status_code == 200
        for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/defended/ready"):
            assert (await http.get(path)).status_code == 200, "probes have no keys"
        told = (await http.get("/queries")).json()["keys"]
        assert told["a"]["queries"] == {"sanitize": 3}
        assert set(told) == {"a"}


@pytest.mark.anyio
async def test_who_sends_too_fast_is_told_when_to_come_back(keys: Path) -> None:
    async with gateway(Upstream(), keys=keys) as http:
        question = tensor_request(images(2))
        headers = {**question["headers"], "X-API-Key": "secret-b"}
        assert (await http.post("/predict", content=question["content"], headers=headers)).status_code == 200
        refused = await http.post("/predict", content=question["content"], headers=headers)
        assert_error(refused, 429, "0.001 images a second")
        assert 0 < int(refused.headers["Retry-After"]) <= 2000


@pytest.mark.anyio
async def test_what_everybody_spent_is_told_to_the_operator_where_there_is_one() -> None:
    token = "0123456789abcdef"
    async with gateway(Upstream(), usage=True, admin_token=token) as http:
        assert_error(await http.get("/queries"), 401, "operator")
        assert (await http.get("/queries", headers={"Authorization": f"Bearer {token}"})).status_code == 200


class Flat(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=(1, 2, 3))[:, None].repeat(1, 2)


@pytest.mark.anyio
async def test_a_hospital_with_keys_answers_nobody_else(keys: Path) -> None:
    config = VictimConfig(labels=("a", "b"), channels=1, size=(32, 32))
    settings = HospitalSettings(model="unused", device="cpu", keys=keys)
    question = tensor_request(images(1).repeat(4, axis=2)[:, :, :, :1].repeat(32, axis=3))
    async with serving(make_hospital(Flat(), config, settings)) as http:
        assert_error(await http.post("/predict", **question), 401, "API key")
        headers = {**question["headers"], "X-API-Key": "secret-a"}
        assert (await http.post("/predict", content=question["content"], headers=headers)).status_code == 200
        assert (await http.get("/v2/health/ready")).status_code == 200
