from collections.abc import Callable, Sequence

import pytest
from fastapi import FastAPI

from services import server
from services.device import resolve_device
from services.gateway.__main__ import main as gateway
from services.gateway.config import GatewaySettings
from services.hospital.__main__ import main as hospital
from services.hospital.config import HospitalSettings
from services.protocol.errors import ServiceError
from services.server import ServiceSettings, read_settings, run_service

Main = Callable[[Sequence[str]], int]


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (HospitalSettings, GatewaySettings):
        for name in kind.model_fields:
            monkeypatch.delenv(f"{kind.model_config['env_prefix']}{name.upper()}", raising=False)


def test_flags_come_before_the_environment_and_that_before_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOSPITAL_PORT", "1234")
    monkeypatch.setenv("HOSPITAL_MAX_BATCH", "7")
    settings = read_settings(HospitalSettings, ["--model", "here", "--port", "5678"])
    assert (settings.port, settings.max_batch, settings.host) == (5678, 7, "127.0.0.1")
    assert settings.max_body_bytes == settings.max_body_mb * 1024 * 1024


def test_repeated_victim_urls_and_a_variable_with_commas_mean_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    urls = ("http://a:1", "http://b:2")
    flags = ["--artifact", "x", "--victim-url", urls[0], "--victim-url", urls[1]]
    assert read_settings(GatewaySettings, flags).victim_url == urls
    monkeypatch.setenv("GATEWAY_VICTIM_URL", ",".join(urls))
    assert read_settings(GatewaySettings, flags[:2]).victim_url == urls


@pytest.mark.parametrize("kind", [HospitalSettings, GatewaySettings])
def test_every_setting_is_explained_in_the_help(
    kind: type[HospitalSettings], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        read_settings(kind, ["--help"])
    assert caught.value.code == 0
    told = capsys.readouterr().out
    for name, field in kind.model_fields.items():
        assert f"--{name.replace('_', '-')}" in told
        assert field.description


@pytest.mark.parametrize(
    ("main", "arguments", "words"),
    [
        (hospital, [], "--model (or HOSPITAL_MODEL)"),
        (hospital, ["--model", "nowhere", "--port", "many"], "--port (or HOSPITAL_PORT)"),
        (gateway, ["--artifact", "nowhere"], "--victim-url (or GATEWAY_VICTIM_URL)"),
        (gateway, ["--artifact", "nowhere", "--victim-url", ","], "--victim-url (or GATEWAY_VICTIM_URL)"),
        (hospital, ["--model", "nowhere", "--host", "0.0.0.0"], "--open-to-anyone"),
        (hospital, ["--model", "nowhere", "--host", "::"], "--keys FILE"),
        (gateway, ["--artifact", "nowhere", "--victim-url", "http://h", "--host", "example.org"], "--open-to-anyone"),
        (hospital, ["--model", "nowhere", "--tls-key", "key.pem"], "--tls-key needs --tls-cert"),
        (hospital, ["--model", "nowhere", "--burst", "5"], "--burst needs --rate"),
    ],
)
def test_wrong_settings_end_with_one_clear_line(
    main: Main, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (hospital, ["--model", "nowhere"]),
        (gateway, ["--artifact", "nowhere", "--victim-url", "http://h"]),
    ],
)
def test_a_missing_model_ends_with_one_clear_line(
    main: Main, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert "nowhere" in told
    assert told.count("\n") == 1


def test_a_service_is_built_from_its_settings_and_served_under_its_title(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[tuple[str, ServiceSettings]] = []
    monkeypatch.setattr(server, "serve", lambda app, name, settings: served.append((name, settings)))
    arguments = ["--model", "here", "--port", "5678"]
    assert run_service(HospitalSettings, lambda settings: FastAPI(title=str(settings.model)), arguments) == 0
    assert served == [("here", read_settings(HospitalSettings, arguments))]


@pytest.mark.parametrize("error", [ServiceError("no device"), OSError("no port"), KeyError("no artifact")])
def test_known_errors_end_with_one_clear_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def build(_settings: HospitalSettings) -> FastAPI:
        raise error

    assert run_service(HospitalSettings, build, ["--model", "here"], errors=(KeyError,)) == 2
    assert capsys.readouterr().err == f"python -m services.hospital: error: {error}\n"


def test_errors_of_the_program_itself_are_not_hidden() -> None:
    def build(_settings: HospitalSettings) -> FastAPI:
        raise KeyError("a mistake")

    with pytest.raises(KeyError, match="a mistake"):
        run_service(HospitalSettings, build, ["--model", "here"])


def test_devices_that_are_not_here_are_refused() -> None:
    assert resolve_device("cpu").type == "cpu"
    assert resolve_device("auto").type in ("cpu", "cuda")
    for name in ("abacus", "cuda:99"):
        with pytest.raises(ServiceError, match=name):
            resolve_device(name)


def test_a_device_that_torch_refuses_in_many_lines_is_told_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr("torch.empty", refuse)
    with pytest.raises(ServiceError, match=r"cannot be used here: CUDA error: out of memory$"):
        resolve_device("cpu")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_this_machine_may_ask_without_keys(host: str) -> None:
    assert read_settings(HospitalSettings, ["--model", "m", "--host", host]).host == host


@pytest.mark.parametrize("more", [["--keys", "keys.toml"], ["--open-to-anyone"]])
def test_others_may_with_keys_or_if_so_told(more: list[str]) -> None:
    assert read_settings(HospitalSettings, ["--model", "m", "--host", "0.0.0.0", *more]).host == "0.0.0.0"
