import json
from dataclasses import replace

import pytest
import torch

from defense.artifact import Provenance, save_artifact
from defense.sanitizer import ImageShape, Sanitizer, SanitizerConfig
from training.command.errors import UserError
from training.comparison.methods import METHODS, known_method
from training.comparison.runs import Record, Run, build_front, plan, read_groups, read_records

RECORD = Record(Run("mse", 0, 0), False, "in process", "abc", 0, [(3, True), (1, False)])


def test_only_those_with_exact_gradients_are_white_boxes():
    assert {name for name, method in METHODS.items() if method.white_box} == {"fo-ds", "fo-ae-ds"}


def test_the_plan_begins_with_what_needs_no_training_and_goes_seed_by_seed():
    runs = plan(["zo-ds", "mse", "fo-ds", "zo-ae-ds-cge"], [10, 20], [0, 1], 800)
    assert list(map(str, runs)) == [
        "mse/0-0",
        "fo-ds/800steps-0",
        *("zo-ds/10-0", "zo-ae-ds-cge/10-0", "zo-ds/20-0", "zo-ae-ds-cge/20-0"),
        "fo-ds/800steps-1",
        *("zo-ds/10-1", "zo-ae-ds-cge/10-1", "zo-ds/20-1", "zo-ae-ds-cge/20-1"),
    ]


def test_names_are_checked():
    assert known_method("mse") == "mse"
    with pytest.raises(ValueError, match="unknown: x; there are none"):
        known_method("x")


def test_records_come_back_in_the_order_of_the_table(tmp_path):
    records = [RECORD, *(replace(RECORD, run=Run("zo-ds", *run)) for run in ((9, 1), (10, 0), (9, 0)))]
    records.insert(0, replace(RECORD, run=Run("noise", 0, 0)))
    for record in reversed(records):
        record.save(tmp_path)
    assert read_records(tmp_path) == [*records[:2], records[4], records[2], records[3]]


@pytest.mark.parametrize("content", ["", "{}", json.dumps({"run": 1})])
def test_a_file_that_is_no_record_is_told(tmp_path, content):
    path = tmp_path / "certify" / "mse" / "0-0.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(UserError, match="no record of a run"):
        read_records(tmp_path)


def test_a_run_without_certificates_is_unfinished(tmp_path):
    RECORD.save(tmp_path)
    assert read_groups(tmp_path, 2) == ([], ["mse/0-0: 0 of 2 images"])


def test_the_bare_victim_is_finished_without_certificates(tmp_path):
    replace(RECORD, run=Run("none", 0, 0)).save(tmp_path)
    (group,), unfinished = read_groups(tmp_path, 2)
    assert (group.clean.tolist(), group.radii, unfinished) == ([[1.0, 0.0]], None, [])


def test_the_autoencoder_alone_leaves_the_denoiser_out(tmp_path):
    torch.manual_seed(0)
    shape = ImageShape(channels=1, height=16, width=16)
    sanitizer = Sanitizer(SanitizerConfig(input=shape, denoiser="dncnn-small", autoencoder="conv", code=16)).eval()
    save_artifact(
        tmp_path / "denoiser+autoencoder",
        sanitizer,
        name="x",
        labels=[],
        sigma=0.25,
        queries={},
        provenance=Provenance(
            method="mse", estimator=None, data="d", data_fingerprint="f", settings={}, versions={}, validation={}
        ),
    )
    images = torch.rand(3, 1, 16, 16)
    for name in ("ae", "mse-ae"):
        front, artifact = build_front(Run(name, 0, 0), tmp_path, tmp_path, torch.device("cpu"))
        assert artifact is not None
        with torch.no_grad():
            expected = sanitizer.autoencoder(images).clamp(0, 1) if name == "ae" else sanitizer(images)
            torch.testing.assert_close(front(images), expected)
    with torch.no_grad():
        assert not torch.allclose(sanitizer(images), sanitizer.autoencoder(images).clamp(0, 1))
