"""Shares, and a victim that several processes ask: here threads that meet at a barrier."""

import time
from collections.abc import Callable
from threading import Barrier, Thread

import pytest
import torch
from torch import Tensor

from services.protocol.client import HTTPVictim
from services.protocol.errors import Overloaded, ServiceError, Unavailable
from training.command.team import ALONE, SharedEndpoint, Team, TeamBroken, joined, shared


class Met(Team):
    """One of several threads that exchange values as processes do."""

    def __init__(self, rank: int, size: int, barrier: Barrier, board: list[object]) -> None:
        super().__init__(rank, size)
        self._barrier, self._board = barrier, board

    def all(self, value):
        self._board[self.rank] = value
        self._barrier.wait(10)
        values = list(self._board)
        self._barrier.wait(10)
        return values


def together(size: int, work: Callable[[Team], object]) -> list[object]:
    """What `work` returns or raises in each of `size` threads."""
    barrier, board = Barrier(size), [None] * size
    ended: list[object] = [None] * size

    def one(rank: int) -> None:
        try:
            ended[rank] = work(Met(rank, size, barrier, board))
        except Exception as error:
            ended[rank] = error

    threads = [Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ended


class Inner:
    """A victim that answers the mean, and may fail."""

    def __init__(self, fails: ServiceError | None = None) -> None:
        self.seen: list[Tensor] = []
        self.fails = fails
        self.described = 0

    def __call__(self, images: Tensor) -> Tensor:
        self.seen.append(images)
        if self.fails is not None:
            raise self.fails
        mean = images.mean((1, 2, 3))
        return torch.stack([mean, 1 - mean], 1)

    def describe(self, image: Tensor) -> dict[str, object]:
        self.described += 1
        return {"labels": ["a", "b"]}

    def ready(self) -> bool:
        return True


@pytest.mark.parametrize("count", [0, 1, 2, 7, 12])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_shares_cover_everything_once(count: int, size: int) -> None:
    rows = list(range(count))
    assert [row for rank in range(size) for row in rows[Team(rank, size).share(count)]] == rows


def test_one_process_needs_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined() as team:
        assert team is ALONE
    rows, inner = torch.rand(3, 2), Inner()
    assert ALONE.gather(rows) is rows
    assert ALONE.told(lambda: 5) == 5

    with shared(inner, ALONE, print) as endpoint:
        assert endpoint is inner


@pytest.mark.parametrize("size", [1, 2])
def test_what_is_sent_again_over_http_is_told_as_long_as_it_is_asked(size: int) -> None:
    told: list[int] = []

    def before(images: int) -> None:
        raise AssertionError

    with HTTPVictim(["http://victim"], on_resend=before) as victim:
        with shared(victim, Team(0, size), told.append) as endpoint:
            assert victim.on_resend not in (None, before)
            victim.on_resend(3)
            assert told == ([3] if endpoint is victim else [])  # in a team after the answer, with those of the others
        assert victim.on_resend is before


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_each_asks_about_its_share_and_all_get_all_answers(count: int) -> None:
    images, inners = torch.rand(count, 1, 2, 2), [Inner() for _ in range(3)]

    def work(team: Team) -> Tensor:
        endpoint = SharedEndpoint(team, lambda images: None)
        endpoint.inner = inners[team.rank]
        return endpoint(images)

    for scores in together(3, work):
        assert torch.equal(scores, Inner()(images))
    assert torch.equal(torch.cat([seen for inner in inners for seen in inner.seen]), images)


def test_what_any_of_them_sends_again_is_counted_by_all_of_them() -> None:
    counted: dict[int, list[int]] = {0: [], 1: []}

    def work(team: Team) -> None:
        endpoint = SharedEndpoint(team, counted[team.rank].append)
        endpoint.inner = Inner()
        if team.rank == 1:
            endpoint.resend(3)
            endpoint.resend(1)
        endpoint(torch.rand(4, 1, 2, 2))
        endpoint(torch.rand(4, 1, 2, 2))

    together(2, work)
    assert counted == {0: [4], 1: [4]}


def test_the_failure_of_one_is_the_failure_of_all() -> None:
    def work(team: Team) -> None:
        endpoint = SharedEndpoint(team, lambda images: None)
        endpoint.inner = Inner(Overloaded("too much") if team.rank == 1 else None)
        endpoint(torch.rand(4, 1, 2, 2))

    first, second = together(2, work)
    assert isinstance(second, Overloaded)
    assert isinstance(first, Unavailable)
    assert str(first) == "process 1 of this run was not answered: too much"


def test_single_questions_are_asked_by_the_first_alone() -> None:
    inners = [Inner(), Inner()]

    def work(team: Team) -> dict[str, object]:
        endpoint = SharedEndpoint(team, lambda images: None)
        endpoint.inner = inners[team.rank]
        assert endpoint.ready()
        return endpoint.describe(torch.rand(1, 2, 2))

    assert together(2, work) == [{"labels": ["a", "b"]}] * 2
    assert [inner.described for inner in inners] == [1, 0]


def test_when_the_first_fails_to_find_out_the_others_are_told() -> None:
    def work(team: Team) -> object:
        def say() -> object:
            raise ValueError("no such file")

        return team.told(say)

    first, second = together(2, work)
    assert isinstance(first, ValueError)
    assert isinstance(second, TeamBroken)


def test_nobody_sends_before_the_first_has_come_from_its_journal() -> None:
    written: list[bool] = []
    early: list[int] = []

    class Watching(Inner):
        def __call__(self, images: Tensor) -> Tensor:
            early.extend([] if written else [len(images)])
            return super().__call__(images)

    def work(team: Team) -> None:
        endpoint = SharedEndpoint(team, lambda images: None)
        endpoint.inner = Watching()
        if team.is_first:
            time.sleep(0.2)
            written.append(True)
        endpoint(torch.rand(4, 1, 2, 2))

    together(2, work)
    assert early == []
