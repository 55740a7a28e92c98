import json
import shutil
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from zo_fakes import LABELS, SIZE, SPLITS

from defense.artifact import load_artifact
from defense.noise_floor import probe_queries
from training import pretrain, zo_fit
from training.fit.checkpoint import FILE_NAME, JOURNAL_NAME, Checkpoint, Journal

PROBE = probe_queries(32) + 1  # and one for the names of the classes


def test_the_artifact_accounts_for_every_image_the_victim_received(fit, endpoint, tmp_path):
    assert fit("--max-queries", "900") == 0
    manifest = load_artifact(tmp_path / "out").manifest
    assert manifest.queries_spent == endpoint.received <= 900
    assert set(manifest.queries) == {"probe", "targets", "training", "validation", "validation targets"}
    assert manifest.queries["probe"] == PROBE == 385
    assert manifest.queries["validation targets"] == 20
    assert manifest.queries["targets"] <= 60
    assert manifest.labels == LABELS
    assert manifest.provenance.method == "zo-ae-ds"
    assert manifest.provenance.estimator == {
        "kind": "RandomGradientEstimator",
        "directions": 3,
        "mu": 0.005,
        "where": {"kind": "Isotropic", "sampling": "sphere"},
        "difference": "forward",
        "combine": "unbiased",
    }
    assert Journal.total(tmp_path / "out") == endpoint.received


def test_no_step_begins_that_the_budget_cannot_pay_together_with_its_validation(fit, endpoint, tmp_path):
    assert fit("--max-queries", "900") == 0
    history = json.loads((tmp_path / "out" / "history.json").read_text())
    step = 4 * (1 + 3 + 1)
    assert 900 - endpoint.received < step + 20
    assert history[-1]["step"] == Checkpoint.load(tmp_path / "out").state["step"] > 5


def test_the_best_validated_state_is_what_is_saved(fit, tmp_path):
    # A learning rate that ruins the sanitizer: the pre-trained state has to win.
    assert fit("--max-queries", "900", "--learning-rate", "0.5") == 0
    history = json.loads((tmp_path / "out" / "history.json").read_text())
    assert history[0]["loss"] == min(entry["loss"] for entry in history)
    assert load_artifact(tmp_path / "out").manifest.provenance.validation["step"] == 0


@pytest.mark.parametrize(
    ("arguments", "method"),
    [
        (["--estimator", "cge"], "zo-ae-ds"),
        (["--estimator", "cge", "--difference", "forward"], "zo-ae-ds"),
        (["--sampling", "orthonormal", "--difference", "central"], "zo-ae-ds"),
        (["--sanitizer", "denoiser"], "zo-ds"),
    ],
)
def test_every_method_trains(fit, tmp_path, arguments, method):
    assert fit("--steps", "2", *arguments) == 0
    assert load_artifact(tmp_path / "out").manifest.provenance.method == method


def test_training_improves_what_it_validates(fit, tmp_path):
    assert fit("--steps", "60", "--learning-rate", "0.001", "--directions", "8", "--mse-weight", "0") == 0
    history = json.loads((tmp_path / "out" / "history.json").read_text())
    assert min(entry["loss"] for entry in history) < 0.97 * history[0]["loss"]


def test_a_run_whose_victim_vanished_resumes_to_where_the_unbroken_run_ends(fit, endpoint, tmp_path, capsys):
    assert fit("--steps", "6", out="unbroken") == 0
    unbroken = endpoint.received
    endpoint.received = 0
    endpoint.fails_after = PROBE + 115
    assert fit("--steps", "6") == 2
    error = capsys.readouterr().err
    assert "cannot be reached: gone" in error
    assert "Traceback" not in error
    stopped_at = Checkpoint.load(tmp_path / "out").state["step"]
    assert 0 < stopped_at < 6
    assert not (tmp_path / "out" / "manifest.json").exists()
    endpoint.fails_after = None
    assert fit("--steps", "6", "--resume") == 0

    resumed, whole = (Checkpoint.load(tmp_path / name) for name in ("out", "unbroken"))
    assert resumed.tensors.keys() == whole.tensors.keys()
    for name, tensor in whole.tensors.items():
        assert torch.equal(resumed.tensors[name], tensor), name
    ledger = load_artifact(tmp_path / "out").manifest.queries
    # The step that failed was booked and never answered; resuming costs one query, for the names of the classes.
    assert sum(ledger.values()) == Journal.total(tmp_path / "out") == unbroken + 1 + ledger["lost"]
    assert ledger["probe"] == PROBE + 1


def test_a_finished_run_goes_on_with_a_larger_budget(fit, endpoint, tmp_path):
    assert fit("--max-queries", "700") == 0
    before = Checkpoint.load(tmp_path / "out").state["step"]
    assert fit("--max-queries", "1000", "--resume") == 0
    assert Checkpoint.load(tmp_path / "out").state["step"] > before
    assert load_artifact(tmp_path / "out").manifest.queries_spent == endpoint.received <= 1000


def test_a_finished_run_that_lost_its_artifact_writes_it_again_without_a_query(fit, endpoint, tmp_path):
    assert fit("--max-queries", "700") == 0
    spent = load_artifact(tmp_path / "out").manifest.queries_spent
    (tmp_path / "out" / "manifest.json").unlink()
    assert fit("--max-queries", str(spent), "--resume") == 0
    assert load_artifact(tmp_path / "out").manifest.queries_spent == endpoint.received == spent


def test_a_run_that_ended_before_its_first_checkpoint_begins_anew_and_keeps_its_ledger(fit, endpoint, tmp_path):
    endpoint.fails_after = PROBE + 5  # the probe, and not the first validation
    assert fit("--max-queries", "900") == 2
    assert not (tmp_path / "out" / FILE_NAME).exists()
    sent = Journal.total(tmp_path / "out")
    endpoint.fails_after = None
    assert fit("--max-queries", "900") == 2
    assert fit("--max-queries", "900", "--resume") == 0
    queries = load_artifact(tmp_path / "out").manifest.queries
    assert queries["lost"] == sent >= PROBE
    assert sum(queries.values()) <= 900


def test_resuming_needs_no_pretrained_folder(fit, tmp_path, pretrained):
    copy = tmp_path / "copy"
    shutil.copytree(pretrained, copy)
    assert fit("--steps", "1", "--pretrained", str(copy)) == 0
    shutil.rmtree(copy)
    assert fit("--steps", "2", "--pretrained", str(copy), "--resume") == 0


def test_two_runs_in_one_folder_are_refused(fit, endpoint, tmp_path, capsys):
    running = Journal(tmp_path / "out")
    try:
        assert fit("--steps", "1") == 2
    finally:
        running.close()
    assert "another run is writing to" in capsys.readouterr().err
    assert endpoint.received == 0


def test_a_run_is_never_overwritten(fit, tmp_path, capsys):
    assert fit("--steps", "1") == 0
    before = (tmp_path / "out" / FILE_NAME).read_bytes()
    assert fit("--steps", "1") == 2
    assert "add --resume to continue it, or name another --out" in capsys.readouterr().err
    assert (tmp_path / "out" / FILE_NAME).read_bytes() == before


def test_resuming_with_other_settings_is_refused_by_name(fit, capsys, tmp_path):
    assert fit("--steps", "1") == 0
    assert fit("--steps", "2", "--learning-rate", "0.01", "--resume") == 2
    assert "learning_rate was 3e-05, is 0.01" in capsys.readouterr().err
    assert fit("--resume", out="elsewhere") == 2
    assert "no checkpoint to resume from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda images: torch.full((len(images), 2), float("nan")), "not finite"),
        (lambda images: torch.full((len(images) - 1, 2), 0.5), "shape"),
        (lambda images: torch.full((len(images), 2), 7.0), "no distribution"),
        (lambda images: torch.full((len(images), 3), 1 / 3), "expected (4, 2)"),
    ],
)
def test_a_victim_that_begins_to_answer_nonsense_stops_the_run_and_the_checkpoint_stays(
    fit, endpoint, tmp_path, capsys, answer, message
):
    assert fit("--steps", "1") == 0
    endpoint.answer = answer
    assert fit("--steps", "3", "--resume") == 2
    assert message in capsys.readouterr().err
    assert Checkpoint.load(tmp_path / "out").state["step"] == 1


@pytest.mark.parametrize("labels", [None, ["only one"], [1, 2]])
def test_a_victim_whose_labels_do_not_fit_its_scores_is_refused(fit, endpoint, capsys, labels):
    endpoint.labels = labels
    assert fit("--steps", "1") == 2
    assert "answers 2 scores, but names its classes" in capsys.readouterr().err


def test_the_classes_of_a_victim_that_takes_tensors_only_are_numbered(fit, endpoint, tmp_path):
    endpoint.refuses_images = True
    assert fit("--steps", "1") == 0
    assert load_artifact(tmp_path / "out").manifest.labels == ["0", "1"]
    assert fit("--steps", "2", "--resume") == 0


def test_another_victim_behind_the_url_is_noticed_on_resuming(fit, endpoint, capsys):
    assert fit("--steps", "1") == 0
    endpoint.labels = ["day", "night"]
    assert fit("--steps", "2", "--resume") == 2
    assert "is it another model?" in capsys.readouterr().err


@pytest.mark.parametrize("budget", [60, 384, 390, 440])
def test_a_budget_below_one_step_and_its_validations_leaves_no_artifact(fit, endpoint, tmp_path, capsys, budget):
    assert fit("--max-queries", str(budget)) == 2
    assert "raise --max-queries" in capsys.readouterr().err
    assert endpoint.received <= min(budget, PROBE)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_more_orthonormal_directions_than_dimensions_are_refused_before_anything_is_spent(fit, endpoint, capsys):
    assert fit("--sampling", "orthonormal", "--directions", "9") == 2
    assert "at most 8 directions here, not 9" in capsys.readouterr().err
    assert endpoint.received == 0


def test_a_gradient_that_is_not_finite_is_not_applied(fit, tmp_path, capsys):
    assert fit("--steps", "2", "--mse-weight", "1e38") == 2
    assert "the gradient of step 1 is not finite" in capsys.readouterr().err
    assert Checkpoint.load(tmp_path / "out").state["step"] == 0


def test_a_run_that_did_not_note_its_task_is_resumed(fit, capsys):
    assert fit("--steps", "1") == 0
    assert fit("--steps", "2", "--resume", "--task", "classification") == 0
    assert fit("--steps", "3", "--resume", "--channels", "3") == 2
    assert "channels was 1, is 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("former", "refused"),
    [
        ({"control_variate": False, "combine": "unbiased", "rotated": 0.0, "slope_weight": 0.0, "checked": 16}, ""),
        ({"control_variate": True}, "control_variate was True, is None"),
        ({"combine": "projection"}, "combine was projection, is None"),
    ],
)
def test_an_older_run_goes_on_where_settings_that_are_gone_had_changed_nothing(fit, tmp_path, capsys, former, refused):
    assert fit("--steps", "1") == 0
    checkpoint = Checkpoint.load(tmp_path / "out")
    del checkpoint.state["settings"]["preset"]
    checkpoint.state["settings"].update(former)
    checkpoint.save(tmp_path / "out")
    assert fit("--steps", "2", "--resume") == (2 if refused else 0)
    assert refused in capsys.readouterr().err


@pytest.mark.parametrize(("checked", "code"), [(0, 0), (8, 2)])
def test_an_older_run_of_a_surrogate_goes_on_unless_its_slopes_were_checked(fit, tmp_path, capsys, checked, code):
    flags = ["--estimator", "surrogate", "--sanitizer", "denoiser", "--warm-up", "40", "--warm-up-steps", "2"]
    assert fit("--steps", "1", *flags) == 0
    checkpoint = Checkpoint.load(tmp_path / "out")
    checkpoint.state["settings"]["checked"] = checked
    checkpoint.save(tmp_path / "out")
    assert fit("--steps", "2", *flags, "--resume") == code
    assert ("checked was 8" in capsys.readouterr().err) == (code == 2)


def test_pretraining_on_another_split_is_told(fit, monkeypatch, caplog):
    monkeypatch.setattr(zo_fit, "load_data", lambda *_, **__: replace(SPLITS, fingerprint="e" * 64))
    assert fit("--steps", "1") == 0
    assert "pre-trained on other images or another split" in caplog.text


def test_pretrained_parts_that_do_not_fit_are_refused(fit, capsys):
    assert fit("--sigma", "0.5") == 2
    assert "was pre-trained for sigma 0.25, not 0.5" in capsys.readouterr().err


def test_replicas_are_handed_to_the_client(fit, endpoint):
    assert fit("--steps", "1", "--victim-url", "http://other") == 0
    assert endpoint.urls == ("http://victim", "http://other")


def test_without_pretrained_parts_it_pretrains_first(endpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(zo_fit, "load_data", lambda *_, **__: SPLITS)
    arguments = ["--victim-url", "http://victim", "--pretrain-steps", "2", "--code", "8", "--steps", "1"]
    quick = ["--batch", "2", "--directions", "1", "--device", "cpu"]
    assert zo_fit.main([*arguments, *quick, "--out", str(tmp_path)], connect=endpoint.connect) == 0
    assert load_artifact(tmp_path / "pretrained" / "denoiser").manifest.queries_spent == 0
    assert (tmp_path / JOURNAL_NAME).exists()


def test_pretraining_beats_doing_nothing_and_spends_nothing(pretrained):
    manifest = load_artifact(pretrained / "denoiser").manifest
    identity_psnr = 12.04  # of noise of 0.25
    assert manifest.provenance.validation["psnr_sigma_0.25"] > identity_psnr + 6
    assert manifest.provenance.method == "mse"
    assert (manifest.queries_spent, manifest.labels) == (0, [])


def test_images_too_few_for_the_components_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretrain, "load_data", lambda *_, **__: SPLITS)
    assert pretrain.main(["--code", "100", "--out", str(tmp_path)]) == 2
    assert "100 principal components need more than 100 images, got 60" in capsys.readouterr().err


def labels_only(images: Tensor) -> Tensor:
    difference = (images[..., : SIZE // 2] - images[..., SIZE // 2 :]).mean((1, 2, 3))
    return torch.nn.functional.one_hot((difference < 0).long(), 2).float()


def coarse(images: Tensor) -> Tensor:
    """Probabilities rounded to 2 digits."""
    difference = (images[..., : SIZE // 2] - images[..., SIZE // 2 :]).mean((1, 2, 3))
    return torch.round(torch.stack([30 * difference, -30 * difference], dim=1).softmax(1), decimals=2)


def test_the_step_that_the_probe_found_is_said_kept_and_resumed(fit, endpoint, tmp_path, caplog):
    caplog.set_level("INFO")
    endpoint.answer = coarse
    assert fit("--steps", "1") == 0
    state = Checkpoint.load(tmp_path / "out").state
    assert state["settings"]["mu"] == "auto"
    assert state["rounding"] == 0.01
    assert state["mu"] > 0.005
    said = next(record.message for record in caplog.records if "formula 5" in record.message)
    for part in ("rounded to 0.01", "noise floor s = ", "curvature", f"mu = {state['mu']:.3g}", "is resolved"):
        assert part in said
    assert fit("--steps", "2", "--resume") == 0
    assert load_artifact(tmp_path / "out").manifest.provenance.estimator["mu"] == state["mu"]
    assert Checkpoint.load(tmp_path / "out").state["mu"] == state["mu"]


def test_a_given_step_is_kept_and_the_probes_doubts_are_told(fit, endpoint, tmp_path, caplog):
    endpoint.answer = coarse
    assert fit("--steps", "1", "--mu", "0.001") == 0
    assert load_artifact(tmp_path / "out").manifest.provenance.estimator["mu"] == 0.001
    warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert any("mu = 0.001 (given) is NOT resolved" in message for message in warned)


@pytest.mark.parametrize("mu", ["-1", "0", "nan", "automatic"])
def test_a_step_that_is_none_is_refused(fit, endpoint, capsys, mu):
    assert fit("--mu", mu) == 2
    assert "--mu" in capsys.readouterr().err
    assert endpoint.received == 0


def test_a_victim_of_noise_is_refused_before_anything_else_is_spent(fit, endpoint, tmp_path, capsys):
    noise = torch.Generator().manual_seed(0)
    endpoint.answer = lambda images: torch.randn(len(images), 2, generator=noise)
    assert fit("--steps", "1") == 2
    assert "no step of finite differences stands clear of the victim's noise" in capsys.readouterr().err
    assert endpoint.received == Journal.total(tmp_path / "out") == PROBE - 1


def test_a_victim_that_answers_labels_only_is_refused_by_name(fit, endpoint, capsys):
    endpoint.answer = labels_only
    assert fit("--steps", "1") == 2
    error = capsys.readouterr().err
    assert "were labels" in error
    assert "--votes V" in error
    assert endpoint.received == PROBE - 1


def test_a_victim_that_answers_labels_only_is_learned_from_by_votes_and_each_is_counted(fit, endpoint, tmp_path):
    endpoint.answer = labels_only
    votes = ["--votes", "32", "--vote-noise", "0.3", "--mu", "1"]
    assert fit("--steps", "2", "--max-queries", "100000", *votes) == 0
    manifest = load_artifact(tmp_path / "out").manifest
    assert manifest.queries_spent == endpoint.received == Journal.total(tmp_path / "out")
    assert manifest.queries["probe"] == 32 * (PROBE - 1) + 1
    assert manifest.queries["training"] == 2 * 4 * 4 * 32
    assert fit("--steps", "3", "--max-queries", "100000", *votes, "--resume") == 0


def test_a_method_without_differences_learns_from_labels_and_probes_for_less(fit, endpoint, tmp_path):
    endpoint.answer = labels_only
    flags = ["--estimator", "surrogate", "--warm-up", "40", "--warm-up-steps", "2"]
    assert fit("--steps", "1", "--max-queries", "5000", *flags) == 0
    manifest = load_artifact(tmp_path / "out").manifest
    assert manifest.queries["probe"] == probe_queries(32, needs_differences=False) + 1 == 81
    assert manifest.queries_spent == endpoint.received


@pytest.mark.parametrize("wire", ["tensor", "image"])
def test_the_wire_is_handed_to_the_client(fit, endpoint, wire):
    assert fit("--steps", "1", "--wire", wire) == 0
    assert endpoint.options["wire"] == wire


def test_the_mapping_is_handed_to_the_client_and_may_change_when_the_run_is_resumed(fit, endpoint, tmp_path):
    for steps, label in (("1", "x"), ("2", "y")):
        (tmp_path / f"{label}.toml").write_text(f'labels = ["{label}", "z"]')
        resumed = ["--resume"] if steps == "2" else []
        assert fit("--steps", steps, "--victim-mapping", str(tmp_path / f"{label}.toml"), *resumed) == 0
        assert endpoint.options["mapping"].labels == (label, "z")
    assert fit("--steps", "1", out="other") == 0
    assert endpoint.options["mapping"] is None


def test_a_mapping_that_is_none_is_told_before_anything_is_trained_or_spent(fit, endpoint, tmp_path, capsys):
    assert fit("--victim-mapping", str(tmp_path / "missing.toml")) == 2
    assert "missing.toml cannot be read" in capsys.readouterr().err
    assert endpoint.received == 0
    assert not (tmp_path / "out" / "pretrained").exists()
