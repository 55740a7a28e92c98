"""`zo_fit` in front of a victim that answers masks: the same command, told by the answers' shape."""

import json

import pytest
import torch
from zo_fakes import SIZE, segment

from defense.artifact import load_artifact
from training.fit.checkpoint import Checkpoint, Journal

DENOISER = ["--sanitizer", "denoiser"]
SURROGATE = [*DENOISER, "--warm-up", "40", "--warm-up-steps", "4"]


@pytest.fixture(autouse=True)
def segmenter(endpoint):
    endpoint.answer = segment


def history(folder):
    return json.loads((folder / "history.json").read_text())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--directions", "3"],
        [*DENOISER, "--directions", "3", "--subspace", "dct", "--rank", "16"],
        [*DENOISER, "--estimator", "local", "--directions", "3"],
        [*DENOISER, "--estimator", "local", "--directions", "3", "--window", "5"],
        [*SURROGATE, "--estimator", "surrogate", "--extra", "4"],
        [*SURROGATE, "--guided", "--directions", "2"],
        [*DENOISER, "--estimator", "exact"],
    ],
    ids=" ".join,
)
def test_every_method_trains_on_masks_and_accounts_for_what_it_sent(fit, endpoint, tmp_path, arguments):
    assert fit("--steps", "2", *arguments) == 0
    manifest = load_artifact(tmp_path / "out").manifest
    assert manifest.queries_spent == endpoint.received == Journal.total(tmp_path / "out")
    entry = history(tmp_path / "out")[-1]
    assert entry["step"] == 2
    assert 0 < entry["agreement"] < 1
    state = Checkpoint.load(tmp_path / "out")
    assert state.state["positions"] == [SIZE, SIZE]
    assert state.tensors["targets"].shape == (60, SIZE, SIZE)


@pytest.mark.parametrize("method", [["--estimator", "local"], ["--estimator", "surrogate"]])
def test_it_improves_what_is_validated(fit, tmp_path, method):
    learning = ["--learning-rate", "0.001", "--mse-weight", "0", "--batch", "16", "--mu", "0.1"]
    more = (
        ["--directions", "8", "--window", "5"] if "local" in method else ["--warm-up", "200", "--warm-up-steps", "60"]
    )
    assert fit(*DENOISER, *method, *more, *learning, "--steps", "30", "--max-queries", "20000") == 0
    entries = history(tmp_path / "out")
    assert min(entry["loss"] for entry in entries) < 0.95 * entries[0]["loss"]


def test_a_run_resumes_to_where_the_unbroken_run_ends(fit, endpoint, tmp_path):
    run = ["--steps", "5", *SURROGATE, "--estimator", "surrogate", "--keep-surrogate"]
    assert fit(*run, out="unbroken") == 0
    total, endpoint.received = endpoint.received, 0
    endpoint.fails_after = total - 30
    assert fit(*run) == 2
    endpoint.fails_after = None
    assert fit(*run, "--resume") == 0
    resumed, whole = (Checkpoint.load(tmp_path / name) for name in ("out", "unbroken"))
    for name, tensor in whole.tensors.items():
        assert torch.equal(resumed.tensors[name], tensor), name


def test_a_victim_that_changes_its_task_is_found_out(fit, endpoint, capsys):
    assert fit("--steps", "2", *DENOISER) == 0
    endpoint.answer = None
    assert fit("--steps", "4", *DENOISER, "--resume") == 2
    assert "answered scores of shape (4, 2)" in capsys.readouterr().err


def test_a_mask_of_another_size_is_refused(fit, endpoint, capsys):
    endpoint.answer = lambda images: segment(images)[..., ::2, ::2]
    assert fit("--steps", "1", *DENOISER) == 2
    assert f"expected (32, K) or (32, K, {SIZE}, {SIZE})" in capsys.readouterr().err


def test_local_credit_of_a_classifier_is_refused_before_it_trains(fit, endpoint, capsys):
    endpoint.answer = None
    assert fit("--steps", "1", *DENOISER, "--estimator", "local") == 2
    assert "needs a victim that answers masks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*DENOISER, "--estimator", "local", "--window", "4"], "odd number of cells"),
        (["--estimator", "local"], "needs a border with cells"),
        (["--window", "5"], "--window means nothing without --estimator local"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_spent(fit, endpoint, capsys, arguments, message):
    assert fit("--steps", "1", *arguments) == 2
    assert message in capsys.readouterr().err
    assert endpoint.received == 0
