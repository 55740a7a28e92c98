import asyncio

import pytest

from services.gateway.readiness import FRESH_S, Readiness

pytestmark = pytest.mark.anyio


class Victim:
    def __init__(self) -> None:
        self.asked = 0
        self.ready = True
        self.now = 100.0

    async def __call__(self) -> bool:
        self.asked += 1
        await asyncio.sleep(0)
        return self.ready


async def test_many_probes_ask_once_and_see_a_change_when_the_answer_is_old() -> None:
    victim = Victim()
    readiness = Readiness(victim, lambda: victim.now)
    assert await asyncio.gather(*(readiness() for _ in range(50))) == [True] * 50
    assert victim.asked == 1
    victim.ready = False
    victim.now += FRESH_S
    assert await readiness()
    victim.now += 0.01
    assert not await readiness()
    assert victim.asked == 2


async def test_a_question_that_fails_leaves_no_answer_behind() -> None:
    fails = True

    async def ask() -> bool:
        if fails:
            raise RuntimeError
        return True

    readiness = Readiness(ask)
    with pytest.raises(RuntimeError):
        await readiness()
    fails = False
    assert await readiness()
