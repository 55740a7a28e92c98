"""The gateway on Ray Serve, as far as it needs no Ray: its settings, and what it says before it starts anything."""

from pathlib import Path

import pytest

from services.gateway import on_ray
from services.gateway.on_ray import RayGatewaySettings
from services.server import read_settings

NEEDED = ["--artifact", "artifacts/defense", "--victim-url", "http://victim"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--metrics-port", "9100"],
        ["--admin-token", "sixteen letters!"],
        ["--tls-cert", "cert.pem"],
        ["--budget", "100"],
        ["--rate", "5"],
    ],
)
def test_what_only_one_process_can_keep_is_refused(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_settings(RayGatewaySettings, [*NEEDED, *flags])
    told = capsys.readouterr().err
    assert f"{flags[0]}: a replica knows nothing of the others" in told


def test_fewer_replicas_at_most_than_at_least_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_settings(RayGatewaySettings, [*NEEDED, "--min-replicas", "5"])
    assert "--min-replicas must not exceed --max-replicas" in capsys.readouterr().err


def test_an_artifact_that_is_none_is_told_before_anything_is_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert on_ray.main(["--artifact", str(tmp_path), "--victim-url", "http://victim"]) == 2
    assert "python -m services.gateway.on_ray: error: " in capsys.readouterr().err


def test_without_ray_it_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(on_ray, "find_spec", lambda name: None)
    assert on_ray.main(["--artifact", str(tmp_path), "--victim-url", "http://victim"]) == 2
    assert "Ray is not installed: pip install 'zo-gateway[ray]'" in capsys.readouterr().err
