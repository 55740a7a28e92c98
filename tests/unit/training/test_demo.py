"""What the demo would run: the processes themselves are tests/e2e/test_demo.py's."""

import shlex
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from training import demo
from training.demonstration import stages

URL = "http://127.0.0.1:1"


@pytest.fixture
def commands(monkeypatch):
    """The verbs that the demo ran, as (module, flags)."""
    ran: list[tuple[str, list[str]]] = []

    @contextmanager
    def service(module, arguments, log):
        yield URL

    def run_verb(module, arguments, log):
        ran.append((module.removeprefix("training."), arguments))

    monkeypatch.setattr(demo, "service", service)
    for module in (demo, stages):
        monkeypatch.setattr(module, "run_verb", run_verb)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    return ran


def verbs(commands) -> list[str]:
    return [verb for verb, _ in commands]


def test_every_verb_gets_the_same_data(commands, tmp_path, capsys):
    data = tmp_path / "my images"
    for folder in ("images", "masks"):
        (data / folder).mkdir(parents=True)
    flags = ["--data", str(data), "--task", "segmentation", "--size", "32", "--split-seed", "7", "--published-test"]
    assert demo.main(["--out", str(tmp_path / "out"), *flags, "--seed", "0"]) == 0
    assert verbs(commands) == ["victim_fit", "pretrain", "zo_fit", "zo_fit", "evaluate", "grid", "samples", "report"]
    for verb, arguments in commands:
        assert verb == "report" or shlex.join(flags) in shlex.join(arguments)
    told = capsys.readouterr().out
    for verb in ("certify", "zo_fit"):
        (line,) = [line for line in told.splitlines() if f"training.{verb}" in line]
        assert shlex.join(flags) in line


def test_other_settings_in_the_same_folder_are_refused_and_nothing_is_run(commands, tmp_path, capsys):
    assert demo.main(["--out", str(tmp_path), "--pretrain-steps", "5"]) == 0
    commands.clear()
    assert demo.main(["--out", str(tmp_path), "--pretrain-steps", "5", "--seed", "3"]) == 2
    assert "was made with other settings" in capsys.readouterr().err
    assert commands == []
    assert demo.main(["--out", str(tmp_path), "--pretrain-steps", "5", "--limit", "9"]) == 0


def test_what_is_finished_is_used_again_and_a_larger_budget_continues(commands, tmp_path, monkeypatch):
    out = tmp_path / "phantom"
    for name in ("pretrained/denoiser", "pretrained/denoiser+autoencoder", "zo-ds", "zo-ae-ds"):
        (out / name).mkdir(parents=True)
        (out / name / "manifest.json").write_text("")
    for name in ("zo-ds", "zo-ae-ds"):
        (out / name / "queries.journal").write_text("training 900\n")
    (out / "victim").mkdir()
    (out / "victim" / "report.json").write_text("")
    provenance = SimpleNamespace(settings={"max_queries": 1000})
    learned = SimpleNamespace(manifest=SimpleNamespace(provenance=provenance))
    monkeypatch.setattr(stages, "load_artifact", lambda _: learned)
    assert demo.main(["--out", str(tmp_path), "--max-queries", "1000"]) == 0
    assert verbs(commands) == ["evaluate", "samples", "report"]
    commands.clear()
    assert demo.main(["--out", str(tmp_path), "--max-queries", "2000"]) == 0
    assert verbs(commands) == ["zo_fit", "zo_fit", "evaluate", "samples", "report"]
    for _, arguments in commands[:2]:
        assert "--resume" in arguments
        assert arguments[arguments.index("--max-queries") + 1] == "2000"
