"""The curves of a run hold what its history and its ledger hold, also after it was interrupted."""

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training.fit.checkpoint import Checkpoint
from training.fit.progress import CURVES


def curves(folder) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / CURVES))
    events.Reload()
    return {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_curves_hold_every_step_and_validation(fit, tmp_path):
    assert fit("--steps", "6") == 0
    drawn = curves(tmp_path / "out")
    assert [step for step, _ in drawn["training/loss"]] == [1, 2, 3, 4, 5, 6]
    history = json.loads((tmp_path / "out" / "history.json").read_text())
    expected = [(entry["step"], pytest.approx(entry["loss"], rel=1e-6)) for entry in history]
    assert drawn["validation/loss"] == expected
    spent = Checkpoint.load(tmp_path / "out").state["ledger"]
    assert drawn["queries/training"][-1] == (6, spent["training"])
    (step, total), before = drawn["queries/all"][-1], history[-1]["queries"]
    assert step == 6
    assert total == sum(drawn[f"queries/{purpose}"][-1][1] for purpose in spent) <= before == sum(spent.values())


def test_a_resumed_run_draws_on_where_its_checkpoint_was(fit, endpoint, tmp_path):
    endpoint.fails_after = 385 + 115
    assert fit("--steps", "6") == 2
    endpoint.fails_after = None
    assert fit("--steps", "6", "--resume") == 0
    steps = [step for step, _ in curves(tmp_path / "out")["training/loss"]]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_nothing_but_numbers_is_written(fit, tmp_path):
    assert fit("--steps", "2") == 0
    events = EventAccumulator(str(tmp_path / "out" / CURVES))
    events.Reload()
    assert events.Tags()["images"] == []
    assert events.Tags()["tensors"] == []
