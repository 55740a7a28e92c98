"""`zo_fit` with a surrogate, subspaces, averaged weights and a choice of the reconstruction."""

import json
import sys

import pytest
import torch
from zo_fakes import SIZE, SPLITS

from defense.artifact import load_artifact
from training import zo_fit
from training.fit.checkpoint import Checkpoint, Journal
from training.fit.progress import CURVES
from training.fit.student import FOLDER_NAME, Student

SURROGATE = ["--sanitizer", "denoiser", "--warm-up", "40", "--warm-up-steps", "4"]
GUIDED = [*SURROGATE, "--guided"]


def history(folder):
    return json.loads((folder / "history.json").read_text())


@pytest.mark.parametrize(
    "arguments",
    [
        GUIDED,
        [*SURROGATE, "--estimator", "surrogate"],
        [*GUIDED, "--subspace", "dct", "--rank", "16", "--sampling", "orthonormal"],
        ["--guided", "--warm-up", "40", "--warm-up-steps", "4"],  # over the code
        ["--sanitizer", "denoiser", "--subspace", "dct", "--rank", "16"],
        [*GUIDED, "--extra", "6"],
        [*SURROGATE, "--estimator", "surrogate", "--extra", "6"],
        ["--sanitizer", "auto", "--schedule", "cosine", "--averaging", "0.5", "--less-noise", "0.5"],
    ],
    ids=" ".join,
)
def test_every_method_trains_and_accounts_for_what_it_sent(fit, endpoint, tmp_path, arguments):
    assert fit("--steps", "2", *arguments) == 0
    manifest = load_artifact(tmp_path / "out").manifest
    assert manifest.queries_spent == endpoint.received == Journal.total(tmp_path / "out")
    assert history(tmp_path / "out")[-1]["step"] == 2
    assert manifest.queries.get("surrogate", 0) == (40 if "--warm-up" in arguments else 0)


def test_the_surrogate_is_deleted_when_training_ends(fit, tmp_path):
    assert fit("--steps", "2", *GUIDED) == 0
    assert not (tmp_path / "out" / FOLDER_NAME).exists()
    assert not [name for name in Checkpoint.load(tmp_path / "out").tensors if name.startswith("surrogate")]
    weights = load_artifact(tmp_path / "out").manifest.weights_file
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("manifest.json", weights, "history.json", "checkpoint.safetensors", "queries.journal", CURVES)
    }


def test_what_training_ended_with_is_what_a_larger_budget_goes_on_from(fit, tmp_path):
    assert fit("--steps", "3", *GUIDED, "--averaging", "0.5", "--keep-surrogate", out="kept") == 0
    assert fit("--steps", "3", *GUIDED, "--averaging", "0.5", out="forgotten") == 0
    kept, forgotten = (Checkpoint.load(tmp_path / name).tensors for name in ("kept", "forgotten"))
    assert set(forgotten) == {name for name in kept if not name.startswith("surrogate")}
    for name, tensor in forgotten.items():
        assert torch.equal(kept[name], tensor), name


def test_a_kill_between_forgetting_and_deleting_leaves_a_run_that_resumes(fit, tmp_path, monkeypatch):
    monkeypatch.setattr(Student, "delete", lambda _: sys.exit("killed"))
    assert fit("--steps", "2", *GUIDED) == "killed"
    assert not (tmp_path / "out" / "manifest.json").exists()  # not finished, so nobody serves what stands there
    monkeypatch.undo()
    monkeypatch.setattr(zo_fit, "load_data", lambda *_, **__: SPLITS)
    assert fit("--steps", "2", *GUIDED, "--resume") == 0
    assert not (tmp_path / "out" / FOLDER_NAME).exists()
    assert load_artifact(tmp_path / "out").manifest.queries["surrogate"] == 40  # and no other was paid for


def test_the_surrogate_is_kept_when_asked_for(fit, tmp_path):
    assert fit("--steps", "2", *GUIDED, "--keep-surrogate") == 0
    assert list((tmp_path / "out" / FOLDER_NAME).iterdir())


def test_a_finished_run_that_goes_on_pays_for_another_surrogate(fit, tmp_path):
    assert fit("--steps", "2", *GUIDED) == 0
    assert fit("--steps", "4", *GUIDED, "--resume") == 0
    assert load_artifact(tmp_path / "out").manifest.queries["surrogate"] == 2 * 40


DCT = ["--sanitizer", "denoiser", "--subspace", "dct", "--rank", "16"]


@pytest.mark.parametrize(
    ("fails_after", "method"),
    [
        (440, [*GUIDED, "--keep-surrogate"]),  # in the warm-up's queries
        (520, [*GUIDED, "--extra", "3", "--keep-surrogate"]),  # in the first steps'
        (490, DCT),
    ],
)
def test_a_run_resumes_to_where_the_unbroken_run_ends(fit, endpoint, tmp_path, fails_after, method):
    run = ["--steps", "6", *method, "--schedule", "cosine", "--averaging", "0.5"]
    assert fit(*run, out="unbroken") == 0
    endpoint.received = 0
    endpoint.fails_after = fails_after
    assert fit(*run) == 2
    assert Checkpoint.load(tmp_path / "out").state["step"] < 6
    endpoint.fails_after = None
    assert fit(*run, "--resume") == 0
    resumed, whole = (Checkpoint.load(tmp_path / name) for name in ("out", "unbroken"))
    assert resumed.tensors.keys() == whole.tensors.keys()
    for name, tensor in whole.tensors.items():
        assert torch.equal(resumed.tensors[name], tensor), name


def test_following_the_surrogate_under_its_check_improves_what_is_validated(fit, tmp_path):
    learning = ["--learning-rate", "0.001", "--mse-weight", "0", "--batch", "16", "--warm-up", "400"]
    steps = ["--steps", "40", "--warm-up-steps", "100", "--directions", "1"]
    assert fit("--sanitizer", "denoiser", "--guided", *learning, *steps) == 0
    entries = history(tmp_path / "out")
    assert min(entry["loss"] for entry in entries) < 0.97 * entries[0]["loss"]


def test_averaged_weights_are_what_is_served(fit, tmp_path):
    """With weights that hardly move in the average, what is served is nearly the pre-trained state."""
    run = ["--steps", "4", "--sanitizer", "denoiser", "--learning-rate", "0.01", "--mse-weight", "0"]
    assert fit(*run, "--averaging", "0.999", out="slow") == 0
    assert fit(*run, out="fast") == 0
    before, slow, fast = history(tmp_path / "slow")[0], history(tmp_path / "slow")[-1], history(tmp_path / "fast")[-1]
    assert abs(slow["loss"] - before["loss"]) < 0.1 * abs(fast["loss"] - before["loss"])


def test_the_reconstruction_is_dropped_where_that_validates_better(fit, tmp_path):
    assert fit("--steps", "2", "--sanitizer", "auto") == 0
    entries = history(tmp_path / "out")
    assert [entry["reconstruction"] for entry in entries] == [True, False] * (len(entries) // 2)
    best = min(entries, key=lambda entry: entry["loss"])
    artifact = load_artifact(tmp_path / "out")
    assert (artifact.sanitizer.autoencoder is not None) == best["reconstruction"]
    assert artifact.manifest.provenance.validation["loss"] == best["loss"]


def test_the_exact_gradient_of_a_black_box_is_refused(fit, endpoint, capsys):
    endpoint.answer = lambda images: torch.full((len(images), 2), 0.5)
    assert fit("--steps", "1", "--estimator", "exact") == 2
    assert "needs an open model in process" in capsys.readouterr().err


def test_the_exact_gradient_of_an_open_model_trains(fit, tmp_path):
    run = ["--steps", "30", "--learning-rate", "0.001", "--mse-weight", "0", "--batch", "16"]
    assert fit(*run, "--estimator", "exact", "--sanitizer", "denoiser") == 0
    assert load_artifact(tmp_path / "out").manifest.provenance.method == "fo-ds"
    entries = history(tmp_path / "out")
    assert min(entry["loss"] for entry in entries) < 0.97 * entries[0]["loss"]


def test_a_run_of_an_older_version_goes_on_where_settings_that_are_gone_changed_nothing(fit, tmp_path, capsys):
    run = ["--sanitizer", "denoiser", "--averaging", "0.5"]
    assert fit("--steps", "2", *run) == 0
    checkpoint = Checkpoint.load(tmp_path / "out")
    former = {"checked": 16, "combine": "unbiased", "control_variate": False, "rotated": 0.0, "slope_weight": 0.0}
    checkpoint.state["settings"].update(former)
    checkpoint.save(tmp_path / "out")
    assert fit("--steps", "3", *run, "--resume") == 0
    checkpoint.state["settings"]["control_variate"] = True
    checkpoint.save(tmp_path / "out")
    assert fit("--steps", "4", *run, "--resume") == 2
    assert "control_variate was True" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--subspace", "dct"], "add --sanitizer denoiser"),
        (["--sanitizer", "denoiser", "--subspace", "dct", "--rank", str(4 * SIZE**2)], "choose another --rank"),
        (["--estimator", "cge", "--guided"], "--guided means nothing without --estimator rge"),
        (["--rank", "16"], "--rank means nothing without --subspace dct"),
        (["--student-steps", "1"], "--student-steps means nothing without a method with a surrogate"),
        (["--sanitizer", "denoiser", "--subspace", "dct", "--rank", "60"], "for instance 64"),
        (["--guided", "--warm-up", "900", "--max-queries", "900"], "leaves nothing of --max-queries 900"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_spent(fit, endpoint, capsys, arguments, message):
    assert fit("--steps", "1", *arguments) == 2
    assert message in capsys.readouterr().err
    assert endpoint.received == 0
