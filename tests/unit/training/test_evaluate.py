import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from measuring_fakes import (
    GATEWAY_URL,
    VICTIM_URL,
    Brightness,
    FakeEndpoint,
    bare,
    connecting,
    gateway,
    splits,
    victim_config,
)

from defense.artifact import Provenance, save_artifact
from defense.sanitizer import ImageShape, Sanitizer, SanitizerConfig
from training import evaluate
from training.measure.results import Row, read_rows
from training.victim import in_process


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_process, "load_victim", lambda _: (Brightness().eval(), victim_config()))
    monkeypatch.setattr(evaluate, "load_data", lambda *_, **__: splits())


def run(
    results: Path,
    *more: str,
    victim: FakeEndpoint | None = None,
    defended: FakeEndpoint | None = None,
    urls: bool = True,
) -> int:
    connect = connecting(victim=victim or bare(), gateway=defended or gateway())
    gateways = ["--gateway", f"zo={GATEWAY_URL}"] if urls else []
    argv = ["--victim-url", VICTIM_URL, *gateways, "--results", str(results), "--device", "cpu", *more]
    return evaluate.main(argv, connect=connect)


def value(
    rows: Sequence[Row], defense: str, attack: str, epsilon: float | None = None, metric: str = "accuracy"
) -> float:
    wanted = [
        row.value
        for row in rows
        if (row.defense, row.attack, row.metric) == (defense, attack, metric)
        and (epsilon is None or row.epsilon == pytest.approx(epsilon))
    ]
    assert len(wanted) == 1
    assert wanted[0] is not None
    return wanted[0]


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize(("trained_on", "warned"), [("abc", False), ("other", True)])
def test_a_victim_trained_on_another_split_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, trained_on: str, warned: bool
) -> None:
    (tmp_path / "report.json").write_text(json.dumps({"fingerprint": trained_on}))
    assert run(tmp_path / "r.json", "--attacks", "fgsm", "--victim", str(tmp_path)) == 0
    assert ("may have seen images of this test split" in caplog.text) == warned


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("content", ["", "[]", "{}"])
def test_a_victims_report_that_is_none_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    (tmp_path / "report.json").write_text(content)
    assert run(tmp_path / "r.json", "--victim", str(tmp_path)) == 2
    assert "is no report of victim_fit" in capsys.readouterr().err


@pytest.mark.usefixtures("world")
def test_accuracy_with_and_without_the_gateway_is_what_the_closed_form_says(tmp_path: Path) -> None:
    assert run(tmp_path / "r.json", "--attacks", "fgsm,pgd", "--epsilons-linf", "2,8") == 0
    rows = read_rows(tmp_path / "r.json")
    assert value(rows, "none", "none") == value(rows, "zo", "none") == 1.0
    for attack in ("fgsm", "pgd"):
        assert value(rows, "none", attack, 2 / 255) == 1.0  # the boundary is 4/255 away
        assert value(rows, "none", attack, 8 / 255) == 0.0
        assert value(rows, "zo", attack, 8 / 255) == 1.0  # the gateway gives 0.05 back


@pytest.mark.usefixtures("world")
def test_ddn_reports_its_median_norm_and_the_scaled_one_of_every_defense(tmp_path: Path) -> None:
    assert run(tmp_path / "r.json", "--attacks", "ddn") == 0
    rows = read_rows(tmp_path / "r.json")
    boundary = 4 / 255 * 4  # L2: the mean moves by 4/255 in all 16 pixels
    assert value(rows, "none", "ddn") == 0.0
    assert value(rows, "zo", "ddn") == 1.0
    assert value(rows, "none", "ddn", metric="median_l2") == pytest.approx(boundary, rel=0.1)
    assert value(rows, "none", "ddn", metric="median_l2_scaled") == pytest.approx(boundary, rel=0.1)
    assert value(rows, "zo", "ddn", metric="median_l2_scaled") == pytest.approx(boundary + 0.05 * 4, rel=0.1)
    assert not [row for row in rows if row.defense == "zo" and row.metric == "median_l2"]


@pytest.mark.usefixtures("world")
def test_rows_say_everything_about_themselves(tmp_path: Path) -> None:
    run(tmp_path / "r.json", "--attacks", "pgd-l2", "--epsilons-l2", "0.5", "--seed", "3", "--limit", "8")
    clean, _, attacked, defended = read_rows(tmp_path / "r.json")
    assert (clean.attack, clean.norm, clean.epsilon, clean.defense) == ("none", "none", None, "none")
    assert (attacked.attack, attacked.norm, attacked.epsilon) == ("pgd-l2", "l2", 0.5)
    assert (attacked.dataset, attacked.task, attacked.split) == ("toy", "classification", "test")
    assert (attacked.n, attacked.seed, attacked.queries) == (8, 3, 0)
    assert (defended.defense, defended.queries) == ("zo", 4321)
    assert (clean.low, clean.high) == (1.0, 1.0)


@pytest.mark.usefixtures("world")
def test_prints_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "r.json", "--attacks", "fgsm", "--epsilons-linf", "8")
    out = capsys.readouterr().out
    assert "toy, test, 12 images; victim over HTTP; oblivious attacks" in out
    assert "none     100.0    0.0        0\nzo       100.0  100.0    4,321\n" in out


@pytest.mark.usefixtures("world")
def test_runs_without_any_gateway_and_on_the_validation_split(tmp_path: Path) -> None:
    assert run(tmp_path / "r.json", "--attacks", "fgsm", "--split", "validation", urls=False) == 0
    rows = read_rows(tmp_path / "r.json")
    assert {row.defense for row in rows} == {"none"}
    assert {(row.split, row.n) for row in rows} == {("validation", 2)}


@pytest.mark.usefixtures("world")
def test_weights_of_another_victim_are_a_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = FakeEndpoint(Brightness(threshold=0.9))
    assert run(tmp_path / "r.json", victim=other) == 2
    assert "disagree about 6 of 12 clean images" in capsys.readouterr().err
    assert not (tmp_path / "r.json").exists()


@pytest.mark.usefixtures("world")
def test_undecided_images_are_no_reason_to_doubt_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flat = Brightness().eval()
    torch.nn.init.constant_(flat.slope, 0.01)  # a margin of 0.0003 everywhere
    monkeypatch.setattr(in_process, "load_victim", lambda _: (flat, victim_config()))
    assert run(tmp_path / "r.json", "--attacks", "fgsm", victim=FakeEndpoint(Brightness(threshold=0.9))) == 0


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--gateway", f"zo={GATEWAY_URL}"], "a name of its own"),
        (["--gateway", f"bare={VICTIM_URL}"], "--gateway bare needs a gateway"),
        (["--victim-url", GATEWAY_URL], "must name the bare victim"),
    ],
)
def test_urls_that_make_no_sense_are_clear_errors(
    more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with suppress(SystemExit):  # of what needs no look at anything
        assert run(tmp_path / "r.json", *more) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.usefixtures("world")
def test_service_that_is_not_ready_is_a_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    down = gateway()
    down.up = False
    assert run(tmp_path / "r.json", defended=down) == 2
    assert f"nothing is ready at {GATEWAY_URL}" in capsys.readouterr().err


@pytest.mark.usefixtures("world")
def test_victim_of_other_images_or_classes_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(in_process, "load_victim", lambda _: (Brightness().eval(), victim_config(size=(32, 32))))
    assert run(tmp_path / "r.json") == 2
    assert "use --size 32 --channels 1" in capsys.readouterr().err
    monkeypatch.setattr(in_process, "load_victim", lambda _: (Brightness().eval(), victim_config()))
    monkeypatch.setattr(evaluate, "load_data", lambda *_, **__: splits(names=("cat", "dog")))
    assert run(tmp_path / "r.json") == 2
    assert "the data has ['cat', 'dog']" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more",
    [["--attacks", "cw"], ["--gateway", "http://x"], ["--gateway", "none=http://x"], ["--epsilons-linf", "-1"]],
)
def test_malformed_arguments_exit_with_code_2(more: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "r.json", *more)
    assert stopped.value.code == 2


@pytest.mark.usefixtures("world")
def test_malformed_results_file_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.json"
    path.write_text("mine")
    assert run(path, "--attacks", "fgsm", "--epsilons-linf", "1") == 2
    assert path.read_text() == "mine"
    assert "is not a results file" in capsys.readouterr().err


# In this process


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """An untrained denoiser."""
    config = SanitizerConfig(
        input=ImageShape(channels=1, height=4, width=4), denoiser="dncnn-small", autoencoder=None, code=4
    )
    made_by = Provenance(
        method="zo-ds", estimator=None, data="toy", data_fingerprint="abc", settings={}, versions={}, validation={}
    )
    folder = tmp_path / "artifact"
    save_artifact(
        folder, Sanitizer(config), name="ours", labels=[], sigma=0.1, queries={"training": 77}, provenance=made_by
    )
    return folder


@pytest.mark.usefixtures("world")
def test_victim_baselines_and_artifacts_run_in_this_process(
    tmp_path: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = ["--baselines", "noise,jpeg,blur,median", "--artifact", f"ours={artifact}", "--sigma", "0.001"]
    argv = ["--results", str(tmp_path / "r.json"), "--device", "cpu", "--attacks", "fgsm", "--epsilons-linf", "8"]
    assert evaluate.main([*argv, *here]) == 0
    rows = read_rows(tmp_path / "r.json")
    assert [row.defense for row in rows if row.attack == "none"] == ["none", "noise", "jpeg", "blur", "median", "ours"]
    assert {row.defense: row.queries for row in rows}["ours"] == 77
    assert value(rows, "none", "fgsm") == 0.0 <= value(rows, "ours", "fgsm")
    assert "victim in process" in capsys.readouterr().out


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--baselines", "mse"], "name --pretrained"),
        (["--artifact", "noise=ARTIFACT", "--baselines", "noise"], "a name of its own"),
        (["--artifact", "ours=nowhere"], "nowhere"),
    ],
)
def test_parts_that_are_not_there_are_clear_errors(
    more: list[str],
    message: str,
    tmp_path: Path,
    artifact: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["--results", str(tmp_path / "r.json"), "--device", "cpu"]
    with suppress(SystemExit):  # of what needs no look at anything
        assert evaluate.main([*argv, *(word.replace("ARTIFACT", str(artifact)) for word in more)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "r.json").exists()


@pytest.mark.parametrize("more", [["--baselines", "zo-ds"], ["--artifact", "x"], ["--artifact", "none=x"]])
def test_malformed_parts_exit_with_code_2(more: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(["--results", str(tmp_path / "r.json"), *more])
