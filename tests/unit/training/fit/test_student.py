import torch

from defense.surrogates import Surrogate, SurrogateSettings
from training.fit.student import Student

SHAPE = (1, 8, 8)


def student(folder) -> Student:
    return Student(Surrogate(SHAPE, 2, SurrogateSettings(), seed=0, device=torch.device("cpu")), folder)


def answers(count: int, seed: int = 0):
    """Images and scores of a black box."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(count, 2, generator=generator).softmax(1)
    return torch.rand(count, *SHAPE, generator=generator), scores, "probabilities"


def test_it_outlives_a_kill_as_of_its_last_save(tmp_path):
    first = student(tmp_path)
    first.surrogate.observe(*answers(6, seed=1))
    first.surrogate.learn(2)
    first.trained = True
    tensors = first.save()
    expected = {name: rows.clone() for name, rows in first.surrogate.values.rows().items()}
    first.surrogate.observe(*answers(5, seed=2))
    first.save()  # written, but the checkpoint that names it was not

    second = student(tmp_path)
    second.restore(tensors)
    assert second.trained
    assert len(second.surrogate.values) == 6
    for name, rows in second.surrogate.values.rows().items():
        assert torch.equal(rows, expected[name])
    # It goes on as the first would have from there, and its files with it.
    second.surrogate.observe(*answers(4, seed=3))
    third = student(tmp_path)
    third.restore({name: tensor.clone() for name, tensor in second.save().items()})
    for name, rows in third.surrogate.values.rows().items():
        assert torch.equal(rows, second.surrogate.values.rows()[name])
    third.surrogate.learn(2)
    second.surrogate.learn(2)
    for mine, theirs in zip(third.surrogate.network.parameters(), second.surrogate.network.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_an_empty_one_can_be_saved_and_restored(tmp_path):
    student(tmp_path).restore(student(tmp_path).save())


def test_deleting_leaves_nothing(tmp_path):
    seen = student(tmp_path)
    seen.surrogate.observe(*answers(2))
    seen.save()
    seen.delete()
    assert list(tmp_path.iterdir()) == []
    seen.delete()
