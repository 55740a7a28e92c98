"""Attacks by answers alone, on models whose distance to their border is known."""

import pytest
import torch
from torch import Tensor

from defense.query_attacks import Inquiry, SpentError, hop_skip_jump, square

SIDE = 16
LIMIT = 200


def images(count: int = 6) -> Tensor:
    return torch.rand(count, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def brighter(shown: Tensor) -> Tensor:
    """Probabilities of "dark" and "bright"; the border is |mean - 1/2| away in L-inf, and SIDE times that in L2."""
    score = 20 * (shown.mean((1, 2, 3)) - 0.5)
    return torch.stack([-score, score], dim=1).softmax(1)


def brighter_pixels(shown: Tensor) -> Tensor:
    score = 20 * (shown[:, 0] - 0.5)
    return torch.stack([-score, score], dim=1).softmax(1)


def inquiry(scores=brighter, limit: int = LIMIT) -> Inquiry:
    shown = images()
    return Inquiry(scores, shown, scores(shown).argmax(1), limit)


def test_an_inquiry_counts_and_remembers_what_was_answered() -> None:
    asked = inquiry(limit=2)
    everyone = torch.arange(6)
    assert asked(asked.images, everyone).gt(0).all()
    assert asked.least().eq(1).all()
    assert asked.nearest().isinf().all()
    opposite = 1 - asked.images[1:3]
    assert asked(opposite, torch.tensor([1, 2])).lt(0).all()
    assert asked.asked.tolist() == [1, 2, 2, 1, 1, 1]
    distances = (opposite - asked.images[1:3]).flatten(1).norm(dim=1)
    assert torch.allclose(asked.nearest()[1:3], distances)
    assert asked.least().tolist() == [1, 0, 0, 1, 1, 1]
    assert asked.least(within=float(distances.min()) - 0.1).eq(1).all()
    with pytest.raises(SpentError):
        asked(asked.images, everyone)
    assert asked.asked.tolist() == [1, 2, 2, 1, 1, 1], "what was not asked is not counted"


def test_square_takes_what_lies_within_its_reach_and_nothing_else() -> None:
    asked = inquiry()
    margins = (asked.images.mean((1, 2, 3)) - 0.5).abs()
    epsilon = float(margins.median()) + 1e-4
    square(asked, epsilon)
    assert asked.least()[margins > epsilon].eq(1).all()
    assert asked.least()[margins < 0.8 * epsilon].eq(0).all()
    assert asked.asked.max() <= LIMIT
    assert asked.asked[margins.argmin()] < LIMIT, "what is lost is asked about no more"


def test_square_attacks_only_those_that_it_is_told() -> None:
    asked = inquiry()
    square(asked, 0.1, chosen=torch.tensor([2, 4]))
    assert asked.asked.nonzero().squeeze(1).tolist() == [2, 4]
    square(asked, 0.1, chosen=torch.tensor([], dtype=torch.int64))


@pytest.mark.parametrize("limit", [1, 2, 7])
def test_no_budget_is_exceeded(limit: int) -> None:
    asked = inquiry(limit=limit)
    square(asked, 0.001)
    assert asked.asked.max() <= limit
    walked = inquiry(limit=limit)
    hop_skip_jump(walked, 1 - walked.images)
    assert walked.asked.max() <= limit


def test_square_goes_on_to_the_worst_mask() -> None:
    early, late = inquiry(brighter_pixels), inquiry(brighter_pixels)
    square(early, 0.4)
    square(late, 0.4, to_the_end=True)
    assert late.asked.eq(LIMIT).all()
    assert late.least().mean() < early.least().mean() < 0.5


def test_hop_skip_jump_comes_near_the_smallest_change() -> None:
    asked = inquiry(limit=1000)
    smallest = (asked.images.mean((1, 2, 3)) - 0.5).abs() * SIDE
    hop_skip_jump(asked, 1 - asked.images, batch=4)
    assert (asked.nearest() >= smallest - 1e-4).all()
    assert (asked.nearest() < 4 * smallest + 0.3).all()


@pytest.mark.parametrize("batch", [1, 6])
def test_hop_skip_jump_comes_as_near_as_foolbox_3_3_4_did_with_one_image_at_a_time(batch: int) -> None:
    asked = inquiry(limit=500)
    hop_skip_jump(asked, 1 - asked.images, batch=batch)
    foolbox = torch.tensor([0.626, 0.431, 0.065, 0.096, 0.624, 0.121])  # of all six at once: half as near
    assert asked.nearest().mean() < 1.1 * foolbox.mean()
    assert (asked.nearest() < 1.3 * foolbox).all()


def test_hop_skip_jump_needs_a_start_that_is_answered_wrongly() -> None:
    asked = inquiry()
    starts = torch.where(torch.arange(6).view(-1, 1, 1, 1) < 3, asked.images, 1 - asked.images)
    hop_skip_jump(asked, starts)
    assert asked.asked[:3].eq(1).all()
    assert asked.nearest()[:3].isinf().all()
    assert asked.nearest()[3:].isfinite().all()


def test_answers_that_change_end_the_walk_and_nothing_else() -> None:
    flips = torch.Generator().manual_seed(1)

    def fickle(shown: Tensor) -> Tensor:
        return torch.rand(len(shown), 2, generator=flips).softmax(1)

    asked = Inquiry(fickle, images(), torch.zeros(6, dtype=torch.int64), LIMIT)
    hop_skip_jump(asked, 1 - asked.images)
    assert asked.asked.max() <= LIMIT
    assert asked.nearest().isfinite().any()


def test_attacks_repeat_and_leave_the_global_generator_as_it_was() -> None:
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    found = []
    for _ in range(2):
        asked = inquiry()
        square(asked, 0.02, seed=3)
        hop_skip_jump(asked, 1 - asked.images, seed=3)
        found.append(asked.nearest())
    assert torch.equal(*found)
    assert torch.equal(torch.random.get_rng_state(), before)
