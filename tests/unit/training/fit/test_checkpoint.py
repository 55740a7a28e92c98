import pytest
import torch

from training.command.errors import UserError
from training.fit.checkpoint import (
    FILE_NAME,
    JOURNAL_NAME,
    Checkpoint,
    Journal,
    optimizer_tensors,
    prefixed,
    restore_optimizer,
    resumed_ledger,
    under,
)


def test_a_checkpoint_comes_back_whole(tmp_path):
    tensors = {**prefixed("a", {"x": torch.rand(3)}), **prefixed("ab", {"x": torch.arange(4)})}
    Checkpoint({"step": 3, "ledger": {"probe": 1}}, tensors).save(tmp_path)
    loaded = Checkpoint.load(tmp_path)
    assert loaded.state == {"step": 3, "ledger": {"probe": 1}}
    assert torch.equal(under("a", loaded.tensors)["x"], tensors["a/x"])
    assert torch.equal(under("ab", loaded.tensors)["x"], torch.arange(4))


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    Checkpoint({"step": 1}, {"x": torch.zeros(1)}).save(tmp_path)
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        Checkpoint({"step": 2}, {"x": torch.zeros(1)}).save(tmp_path)
    assert Checkpoint.load(tmp_path).state == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


@pytest.mark.parametrize("content", [b"", b"\x08\0\0\0\0\0\0\0{}      ", b"nonsense that is no safetensors file"])
def test_what_is_no_checkpoint_is_named(tmp_path, content):
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(UserError, match=r"checkpoint\.safetensors is no checkpoint of zo_fit"):
        Checkpoint.load(tmp_path)


def test_nothing_to_resume_is_said(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint to resume from"):
        Checkpoint.load(tmp_path)


def test_an_optimizer_goes_on_as_if_it_had_not_stopped():
    def problem():
        weight = torch.nn.Parameter(torch.ones(3))
        return weight, torch.optim.Adam([weight], 0.1)

    def step(weight, optimizer):
        optimizer.zero_grad()
        (weight**2 * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
        optimizer.step()

    weight, optimizer = problem()
    for _ in range(3):
        step(weight, optimizer)
    resumed, other = problem()
    resumed.data.copy_(weight.data)
    restore_optimizer(other, {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer).items()})
    step(weight, optimizer)
    step(resumed, other)
    assert torch.equal(weight, resumed)


def test_the_journal_outlives_its_writer_and_what_it_holds_beyond_the_checkpoint_is_lost(tmp_path):
    journal = Journal(tmp_path)
    journal.write("validation targets", 100)
    journal.write("training", 20)
    journal.close()
    assert Journal.total(tmp_path) == 120
    assert resumed_ledger(tmp_path, {"validation targets": 100}) == {"validation targets": 100, "lost": 20}
    assert resumed_ledger(tmp_path, {"validation targets": 100, "training": 20}) == {
        "validation targets": 100,
        "training": 20,
    }


def test_lost_queries_add_up_over_several_kills(tmp_path):
    journal = Journal(tmp_path)
    journal.write("training", 50)
    journal.close()
    once = resumed_ledger(tmp_path, {"training": 40})
    assert once == {"training": 40, "lost": 10}
    journal = Journal(tmp_path)
    journal.write("training", 5)
    journal.close()
    assert resumed_ledger(tmp_path, once) == {"training": 40, "lost": 15}


def test_a_line_that_was_cut_before_its_request_left_does_not_count(tmp_path):
    (tmp_path / JOURNAL_NAME).write_bytes(b"training 50\ntraining 6")
    assert Journal.total(tmp_path) == 50


def test_a_journal_that_was_cut_or_is_none_is_refused(tmp_path):
    (tmp_path / JOURNAL_NAME).write_bytes(b"training 5\n")
    with pytest.raises(UserError, match="records fewer queries than the checkpoint"):
        resumed_ledger(tmp_path, {"training": 6})
    (tmp_path / JOURNAL_NAME).write_bytes(b"what\n")
    with pytest.raises(UserError, match="is no journal"):
        Journal.total(tmp_path)
