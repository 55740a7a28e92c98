import pytest
from zo_fakes import SPLITS, Endpoint, pretrain_into

from training import zo_fit


@pytest.fixture
def endpoint() -> Endpoint:
    return Endpoint()


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    return pretrain_into(tmp_path_factory.mktemp("pretrained"), SPLITS, steps=60)


@pytest.fixture
def fit(endpoint, pretrained, tmp_path, monkeypatch):
    monkeypatch.setattr(zo_fit, "load_data", lambda *_, **__: SPLITS)

    def run(*arguments: str, out: str = "out") -> int:
        common = ["--victim-url", "http://victim", "--pretrained", str(pretrained), "--batch", "4"]
        quick = ["--validate-every", "2", "--checkpoint-every", "1", "--device", "cpu"]
        if "--estimator" not in arguments and "--directions" not in arguments:  # others take none
            quick += ["--directions", "3"]
        try:
            return zo_fit.main([*common, *quick, "--out", str(tmp_path / out), *arguments], connect=endpoint.connect)
        except SystemExit as refused:
            return refused.code

    return run
