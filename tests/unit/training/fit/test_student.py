import torch

from defense.surrogates import Surrogate, SurrogateSettings
from training.fit.student import Student

SHAPE = (1, 8, 8)


def student(folder) -> Student:
    return Student(Surrogate(SHAPE, 2, SurrogateSettings(), seed=0, device=torch.device("cpu")), folder)


def call(count: int, directions: int, seed: int = 0):
    """What one call of the black box shows: around each of `count` points `directions` others, then itself."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.rand(count, *SHAPE, generator=generator)
    around = z.unsqueeze(1) + 0.01 * torch.randn(count, directions, *SHAPE, generator=generator)
    points = torch.cat([around, z.unsqueeze(1)], dim=1).flatten(0, 1)
    owners = torch.arange(count).repeat_interleave(directions + 1)
    scores = torch.rand(len(points), 2, generator=generator).softmax(1)
    return z, points, owners, points.clamp(0, 1), scores


def test_answers_are_taken_at_the_points_themselves(tmp_path):
    seen = student(tmp_path)
    z, points, owners, images, scores = call(3, 4)
    seen.watch(z, points, owners, images, scores, "probabilities")
    assert len(seen.surrogate.values) == 3
    torch.testing.assert_close(seen.surrogate.values.rows()["images"].float() / 255, z, atol=0.003, rtol=0)


def test_of_central_differences_one_point_an_image_is_taken(tmp_path):
    seen = student(tmp_path)
    z, points, owners, images, scores = call(3, 4)
    seen.watch(z + 1, points, owners, images, scores, "probabilities")
    assert len(seen.surrogate.values) == 3


def test_it_outlives_a_kill_as_of_its_last_save(tmp_path):
    first = student(tmp_path)
    first.watch(*call(6, 2, seed=1), "probabilities")
    first.surrogate.learn(2)
    first.trained = True
    tensors = first.save()
    expected = {name: rows.clone() for name, rows in first.surrogate.values.rows().items()}
    first.watch(*call(5, 2, seed=2), "probabilities")
    first.save()  # written, but the checkpoint that names it was not

    second = student(tmp_path)
    second.restore(tensors)
    assert second.trained
    assert len(second.surrogate.values) == 6
    for name, rows in second.surrogate.values.rows().items():
        assert torch.equal(rows, expected[name])
    # It goes on as the first would have from there, and its files with it.
    second.watch(*call(4, 2, seed=3), "probabilities")
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
    seen.watch(*call(2, 2), "probabilities")
    seen.save()
    seen.delete()
    assert list(tmp_path.iterdir()) == []
    seen.delete()
