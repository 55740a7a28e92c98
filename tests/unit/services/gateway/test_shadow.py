import asyncio
from collections import Counter

import numpy as np
import pytest

from services.gateway.accounting import Account, Budget
from services.gateway.shadow import Shadow, disagreements
from services.protocol import deadlines
from services.protocol.errors import UpstreamTimeout, UpstreamUnreachable
from services.upstream import Payer

pytestmark = pytest.mark.anyio

IMAGES = np.random.default_rng(0).random((4, 1, 8, 6), dtype=np.float32)
CLASSES = np.eye(2, dtype=np.float32)


def masks(*lesions: list[int]) -> np.ndarray:
    """Scores (N,3,2,4) of masks with these class numbers."""
    return np.eye(3, dtype=np.float32)[np.array(lesions)].reshape(-1, 2, 4, 3).transpose(0, 3, 1, 2)


def test_classes_differ_or_not() -> None:
    assert disagreements(CLASSES[[0, 1, 1]], np.float32([[0.6, 0.4], [0.7, 0.3], [0, 1]]), 0.8) == 1


@pytest.mark.parametrize(
    ("one", "other", "dice"),
    [
        ([1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0], 0.0),
        ([1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0], 6 / 7),
        ([1, 1, 0, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0, 0, 0], 0.5),
        ([1, 1, 2, 2, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0], 0.5),
    ],
)
def test_masks_differ_where_their_dice_is_below_the_bound(one: list[int], other: list[int], dice: float) -> None:
    assert disagreements(masks(one), masks(other), dice) == 0
    assert disagreements(masks(one), masks(other), dice + 1e-6) == 1
    assert disagreements(masks(one, one), masks(other, one), dice + 1e-6) == 1


def test_masks_without_any_lesion_agree() -> None:
    assert disagreements(masks([0] * 8), masks([0] * 8), 1.0) == 0


async def settle(account: Account, images: int) -> None:
    async with asyncio.timeout(5):
        while account.shadow.total() < images:
            await asyncio.sleep(0.001)


async def test_disagreements_are_counted_behind_the_requests_back() -> None:
    asked = []

    async def forward(images: np.ndarray, _payer: Payer) -> np.ndarray:
        asked.append(images)
        return CLASSES[[0, 1, 1, 0]]

    account = Account(Budget(10))
    async with Shadow(forward, max_images=8, least_dice=0.8) as shadow:
        with account.bill("sanitize", 8) as bill:
            bill.spend(4)
            shadow.watch(IMAGES * 3 - 1, CLASSES[[0, 0, 1, 1]], bill)
            assert not asked, "the request goes on"
            assert bill.spent == 8
        await settle(account, 4)
    assert account.shadow == {"agreed": 2, "disagreed": 2}
    assert account.queries == {"sanitize": 4, "shadow": 4}
    assert np.array_equal(asked[0], (IMAGES * 3 - 1).clip(0, 1))


@pytest.mark.parametrize("error", [UpstreamTimeout("late"), RuntimeError("broken")])
async def test_a_failure_is_counted_and_nothing_else(error: Exception) -> None:
    async def forward(_images: np.ndarray, _payer: Payer) -> np.ndarray:
        raise error

    account = Account(Budget(10))
    async with Shadow(forward, max_images=8, least_dice=0.8) as shadow:
        with account.bill("sanitize", 4) as bill:
            shadow.watch(IMAGES, CLASSES[[0, 0, 0, 0]], bill)
        await settle(account, 4)
    assert account.shadow == {"failed": 4}
    assert account.left == 6


async def test_answers_of_another_shape_are_a_failure() -> None:
    async def forward(_images: np.ndarray, _payer: Payer) -> np.ndarray:
        return np.ones((4, 3), np.float32)

    account = Account(Budget())
    async with Shadow(forward, max_images=8, least_dice=0.8) as shadow:
        with account.bill("sanitize", 4) as bill:
            shadow.watch(IMAGES, CLASSES[[0, 0, 0, 0]], bill)
        await settle(account, 4)
    assert account.shadow == {"failed": 4}


async def test_what_was_not_sent_is_taken_back() -> None:
    async def forward(images: np.ndarray, payer: Payer) -> np.ndarray:
        payer.spend(len(images))
        payer.refund(len(images))
        raise UpstreamUnreachable("away")

    account = Account(Budget(10))
    async with Shadow(forward, max_images=8, least_dice=0.8) as shadow:
        with account.bill("sanitize", 8) as bill:
            bill.spend(4)
            shadow.watch(IMAGES, CLASSES[[0, 0, 0, 0]], bill)
        await settle(account, 4)
    assert account.queries == {"sanitize": 4, "shadow": 0}
    assert account.left == 6


async def test_where_there_is_no_room_images_are_skipped_and_cost_nothing() -> None:
    gate = asyncio.Event()

    async def forward(images: np.ndarray, _payer: Payer) -> np.ndarray:
        await gate.wait()
        return CLASSES[np.zeros(len(images), int)]

    account = Account(Budget(100))
    async with Shadow(forward, max_images=6, least_dice=0.8) as shadow:
        for _ in range(3):
            with account.bill("sanitize", 4) as bill:
                shadow.watch(IMAGES, CLASSES[[0, 0, 0, 0]], bill)
        assert account.shadow == {"skipped": 8}
        assert account.left == 96
        gate.set()
        await settle(account, 12)
        with account.bill("sanitize", 4) as bill:
            shadow.watch(IMAGES, CLASSES[[0, 0, 0, 0]], bill)
        await settle(account, 16)
    assert account.shadow == Counter(skipped=8, agreed=8)


async def test_what_is_in_work_at_the_end_is_given_up() -> None:
    ended = []

    async def forward(_images: np.ndarray, _payer: Payer) -> np.ndarray:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)
        raise AssertionError

    account = Account(Budget())
    async with Shadow(forward, max_images=6, least_dice=0.8) as shadow:
        with account.bill("sanitize", 4) as bill:
            shadow.watch(IMAGES, CLASSES[[0, 0, 0, 0]], bill)
        await asyncio.sleep(0.01)
    assert ended
    assert not account.shadow


async def test_the_deadline_of_the_request_does_not_hold_for_what_goes_on_behind_its_back() -> None:
    left: list[float] = []

    async def forward(_images: np.ndarray, _payer: Payer) -> np.ndarray:
        left.append(deadlines.left_s())
        return CLASSES[[0, 1, 1, 0]]

    async def request() -> None:
        deadlines.narrow(1.0)
        with account.bill("sanitize", 4) as bill:
            shadow.watch(IMAGES, CLASSES[[0, 1, 1, 0]], bill)
        assert deadlines.left_s() <= 1.0

    account = Account(Budget(10))
    async with Shadow(forward, max_images=8, least_dice=0.8) as shadow:
        await asyncio.create_task(request())
        await settle(account, 4)
    assert left == [float("inf")]
