import asyncio
import math

import numpy as np
import pytest
import torch

from services.gateway.accounting import Account, Bill, Budget
from services.gateway.modes import Plan
from services.gateway.voting import CHUNKS_AT_ONCE, Voter
from services.protocol.errors import UpstreamInvalid, UpstreamTimeout

pytestmark = pytest.mark.anyio

IMAGES = np.random.default_rng(0).random((3, 1, 8, 6), dtype=np.float32)


def plan(*copies: int, sigma: float = 0.25) -> Plan:
    return Plan("smooth" if len(copies) == 1 else "certify", copies, sigma, 0.001, 0.75)


class Victim:
    """Remembers the copies that it is asked about; votes for the class that the image's number says."""

    def __init__(self, classes: int = 3) -> None:
        self.classes = classes
        self.asked: list[np.ndarray] = []

    async def __call__(self, copies: np.ndarray, bill: Bill) -> np.ndarray:
        bill.spend(len(copies))
        self.asked.append(copies)
        return self.scores(copies)

    def scores(self, copies: np.ndarray) -> np.ndarray:
        distances = abs(copies[:, None] - IMAGES).mean(axis=(2, 3, 4))
        scores: np.ndarray = np.eye(self.classes, dtype=np.float32)[distances.argmin(axis=1)]
        return scores

    @property
    def copies(self) -> np.ndarray:
        return np.concatenate(self.asked)


class Pixels(Victim):
    """Votes for class 1 wherever a copy is brighter than one half."""

    def scores(self, copies: np.ndarray) -> np.ndarray:
        bright = (copies > 0.5).astype(np.float32)
        return np.concatenate([1 - bright, bright], axis=1)


async def vote(
    victim: Victim, plan: Plan, images: np.ndarray = IMAGES, *, chunk: int = 1000
) -> tuple[torch.Tensor, ...]:
    with Account(Budget()).bill(plan.mode, plan.queries(len(images))) as bill:
        counts = await Voter(victim, chunk=chunk)(images, plan, bill)
    assert bill.reserved == 0
    assert bill.spent == plan.queries(len(images))
    return counts


@pytest.mark.parametrize("chunk", [1, 7, 24, 25, 26, 1000])
@pytest.mark.parametrize("copies", [(25,), (5, 20)])
async def test_every_copy_votes_once_on_its_own_image(chunk: int, copies: tuple[int, ...]) -> None:
    victim = Victim()
    counts = await vote(victim, plan(*copies, sigma=0.01), chunk=chunk)
    assert len(counts) == len(copies)
    for votes, n in zip(counts, copies, strict=True):
        assert votes.dtype == torch.int64
        assert votes.tolist() == (n * torch.eye(3, dtype=torch.int64)).tolist()
    sizes = [len(one) for one in victim.asked]
    assert max(sizes) <= chunk
    assert sum(sizes) == 75
    assert len(sizes) == math.ceil(75 / chunk)


@pytest.mark.parametrize("chunk", [7, 1000])
async def test_every_pixel_is_voted_on_by_itself(chunk: int) -> None:
    victim = Pixels()
    selection, estimation = await vote(victim, plan(5, 20), chunk=chunk)
    assert selection.shape == estimation.shape == (3, 2, 8, 6)
    bright = torch.from_numpy(victim.copies[:, 0] > 0.5).unflatten(0, (3, 25)).long()
    assert torch.equal(selection[:, 1], bright[:, :5].sum(1))
    assert torch.equal(estimation[:, 1], bright[:, 5:].sum(1))
    assert torch.equal(selection.sum(1), torch.full((3, 8, 6), 5))
    assert torch.equal(estimation.sum(1), torch.full((3, 8, 6), 20))


async def test_the_noise_is_gaussian_unclipped_and_fresh() -> None:
    seen = []
    for _ in range(2):
        victim = Victim()
        await vote(victim, plan(400, sigma=0.5), chunk=64)
        noise = (victim.copies - IMAGES.repeat(400, axis=0)) / 0.5
        assert len(np.unique(noise[:, 0, 0, 0])) > 1100, "every copy has its own"
        seen.append(noise)
    for noise in seen:
        values = noise.ravel()
        bound = 6 / math.sqrt(values.size)
        assert abs(values.mean()) < bound
        assert abs(values.var() - 1) < bound * math.sqrt(2)
        for quantile, share in ((-2.0, 0.02275), (-1.0, 0.15866), (1.0, 0.84134), (2.0, 0.97725)):
            assert abs((values < quantile).mean() - share) < bound / 2
        assert values.min() < -3, "nothing is clipped"
        assert values.max() > 3
        # Pixels, and copies, are independent of each other.
        assert abs(np.corrcoef(noise.reshape(1200, -1).T) - np.eye(48)).max() < 6 / math.sqrt(1200)
        assert abs((noise[:-1] * noise[1:]).mean()) < bound
    assert np.isin(seen[0][:, 0, 0, 0], seen[1][:, 0, 0, 0]).mean() < 0.01  # float32 may coincide


async def test_the_noise_cannot_be_chosen_by_whoever_seeds_the_global_generators() -> None:
    drawn = []
    for _ in range(2):
        np.random.seed(0)
        torch.manual_seed(0)
        victim = Victim()
        await vote(victim, plan(20))
        drawn.append(victim.copies)
    assert not np.array_equal(*drawn)


async def test_the_share_of_votes_is_the_probability_under_noise() -> None:
    image = np.full((1, 1, 8, 6), 0.6, np.float32)
    (counts,) = await vote(Pixels(), plan(500, sigma=0.2), image)
    share = counts[0, 1].sum().item() / (500 * 48)
    assert share == pytest.approx(0.69146, abs=5 * 0.46 / math.sqrt(500 * 48))  # Phi(0.1 / 0.2)


async def test_a_victim_that_fails_midway_leaves_no_counts_and_ends_the_asking() -> None:
    class Fails(Victim):
        async def __call__(self, copies: np.ndarray, bill: Bill) -> np.ndarray:
            scores = await super().__call__(copies, bill)
            if len(self.asked) == 3:
                raise UpstreamTimeout("late")
            return scores

    victim = Fails()
    account = Account(Budget(200))
    with pytest.raises(UpstreamTimeout), account.bill("smooth", 150) as bill:
        await Voter(victim, chunk=10)(IMAGES, plan(50), bill)
    assert len(victim.asked) == 3
    assert account.queries == {"smooth": 30}
    assert account.left == 170


async def test_a_single_score_is_no_vote() -> None:
    class One(Victim):
        def scores(self, copies: np.ndarray) -> np.ndarray:
            return np.ones((len(copies), 1), np.float32)

    with pytest.raises(UpstreamInvalid, match="one score"):
        await vote(One(), plan(20))


@pytest.mark.parametrize("shape", [(2,), (3, 8, 6)])
async def test_answers_that_change_their_shape_midway_are_not_added_up(shape: tuple[int, ...]) -> None:
    class Changes(Victim):
        def scores(self, copies: np.ndarray) -> np.ndarray:
            return np.ones((len(copies), *(shape if len(self.asked) == 2 else (3,))), np.float32)

    with pytest.raises(UpstreamInvalid):
        await vote(Changes(), plan(20), chunk=10)


async def test_requests_take_turns_and_only_so_many_chunks_are_in_work() -> None:
    class Slow(Victim):
        working = most = 0

        async def __call__(self, copies: np.ndarray, bill: Bill) -> np.ndarray:
            self.working += 1
            self.most = max(self.most, self.working)
            await asyncio.sleep(0.005)
            self.working -= 1
            return await super().__call__(copies, bill)

    victim = Slow()
    voter = Voter(victim, chunk=5)

    async def ask(value: float, n: int) -> None:
        image = np.full((1, 1, 8, 6), value, np.float32)
        with Account(Budget()).bill("smooth", n) as bill:
            await voter(image, plan(n, sigma=0.01), bill)

    long = [asyncio.create_task(ask(0, 200)) for _ in range(2 * CHUNKS_AT_ONCE)]
    await asyncio.sleep(0.02)
    await ask(1, 15)
    assert victim.most == CHUNKS_AT_ONCE
    assert not any(task.done() for task in long), "a short request does not wait for long ones to end"
    await asyncio.gather(*long)
    assert victim.most == CHUNKS_AT_ONCE
