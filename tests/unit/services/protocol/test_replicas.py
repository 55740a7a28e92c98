import pytest

from services.protocol import replicas
from services.protocol.errors import Overloaded, Unavailable
from services.protocol.replicas import BACKOFF_FIRST_S, BACKOFF_LAST_S, Replica


@pytest.fixture(autouse=True)
def _no_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas.random, "uniform", lambda _low, high: high)


def fail_in_a_row(replica: Replica, times: int) -> list[float]:
    """Fails as soon as the replica has rested, again and again; gives the rests."""
    rests = []
    for _ in range(times):
        now = replica.rests_until
        replica.failed(now, started=now, error=Unavailable("down"))
        rests.append(replica.rests_until - now)
    return rests


def test_rests_double_up_to_a_bound_and_start_anew_after_a_success() -> None:
    replica = Replica.at("http://h")
    doubling = [0.1, 0.2, 0.4, 0.8, 1.6, 3.2]
    assert doubling[0] == BACKOFF_FIRST_S
    assert fail_in_a_row(replica, 2000) == pytest.approx([*doubling, *[BACKOFF_LAST_S] * 1994])
    replica.succeeded()
    assert fail_in_a_row(replica, 2) == pytest.approx(doubling[:2])


def test_requests_that_fail_together_count_as_one_failure() -> None:
    replica = Replica.at("http://h")
    for _ in range(20):
        replica.failed(60.0, started=0.0, error=Unavailable("down"))
    assert replica.failures == 1
    assert replica.rests_until <= 60 + 2 * BACKOFF_FIRST_S


def test_a_rest_that_was_asked_for_is_neither_cut_by_success_nor_by_a_shorter_one() -> None:
    replica = Replica.at("http://h")
    replica.failed(0.0, started=0.0, error=Overloaded("busy", retry_after=30))
    assert replica.overloaded
    replica.succeeded()
    replica.failed(1.0, started=0.0, error=None)
    assert not replica.overloaded
    assert replica.rests_until == 30


def test_the_rested_are_asked_first_then_the_idle_and_failing_ones_on_trial_only() -> None:
    def replica(rests_until: float, outstanding: int, failures: int) -> Replica:
        return Replica("", "", outstanding=outstanding, failures=failures, rests_until=rests_until)

    expected = [
        replica(0, 0, 3),
        replica(9, 2, 0),
        replica(0, 7, 0),
        replica(0, 1, 1),
        replica(11, 5, 1),
        replica(12, 0, 1),
    ]
    asked = expected[::-1]
    asked.sort(key=lambda one: one.rank(10.0))
    assert asked == expected
