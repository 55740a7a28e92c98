import hashlib

import pytest

from services.gateway.accounting import ANONYMOUS, OTHERS, Account, Accounts, Budget
from services.protocol.errors import BudgetSpent


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_what_is_reserved_and_not_spent_is_given_back() -> None:
    account = Account(Budget(100))
    with account.bill("certify", 90) as bill:
        assert account.left == 10
        bill.spend(30)
        bill.spend(20)
        assert account.left == 10
    assert account.left == 50
    assert bill.spent == 50
    assert account.queries == {"certify": 50}


def test_it_is_given_back_after_a_failure_too() -> None:
    account = Account(Budget(100))

    def fails() -> None:
        with account.bill("smooth", 100) as bill:
            bill.spend(1)
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert account.left == 99


def test_a_budget_holds_for_requests_in_work_together() -> None:
    account = Account(Budget(100))
    with (
        account.bill("smooth", 60),
        pytest.raises(BudgetSpent, match=r"costs 41 victim queries, and 40 are left of .* 100"),
        account.bill("smooth", 41),
    ):
        pass
    assert account.refused == 1
    with account.bill("smooth", 100):
        pass


def test_a_bill_may_be_spent_for_two_purposes_and_taken_back_for_each() -> None:
    account = Account(Budget(10))
    with account.bill("sanitize", 4) as bill:
        bill.spend(2)
        bill.spend(2, "shadow")
    bill.refund(1)
    bill.refund(2, purpose="shadow")
    assert account.queries == {"sanitize": 1, "shadow": 0}
    assert bill.spent == 1
    assert account.left == 9


def test_without_a_budget_everything_is_counted_and_nothing_refused() -> None:
    account = Account(Budget())
    with account.bill("certify", 10**9) as bill:
        bill.spend(10**9)
    assert account.left is None
    assert account.quote() is None
    assert account.queries == {"certify": 10**9}


def test_a_budget_without_a_window_never_comes_back() -> None:
    clock = Clock()
    account = Account(Budget(10), clock)
    account.spend("sanitize", 10)
    clock.now += 1e9
    with pytest.raises(BudgetSpent) as refused, account.bill("sanitize", 1):
        pass
    assert refused.value.retry_after is None
    assert account.quote() == {"queries": 10, "window_s": None, "left": 0, "resets_in_s": None}


def test_a_window_begins_with_its_first_query_and_ends_with_a_full_budget() -> None:
    clock = Clock()
    account = Account(Budget(10, 60), clock)
    clock.now += 100
    account.spend("sanitize", 4)
    clock.now += 20
    account.spend("sanitize", 6)
    with pytest.raises(BudgetSpent) as refused, account.bill("sanitize", 1):
        pass
    assert refused.value.retry_after == 40
    assert refused.value.headers() == {"Retry-After": "40"}
    assert account.quote() == {"queries": 10, "window_s": 60, "left": 0, "resets_in_s": 40}
    clock.now += 40
    assert account.quote() == {"queries": 10, "window_s": 60, "left": 10, "resets_in_s": None}
    with account.bill("sanitize", 10):
        pass
    assert account.queries == {"sanitize": 10}, "counters do not begin anew"


def test_a_refund_for_an_earlier_window_does_not_enlarge_this_one() -> None:
    clock = Clock()
    account = Account(Budget(10, 60), clock)
    with account.bill("sanitize", 5) as bill:
        bill.spend(5)
        clock.now += 60
        bill.refund(5)
    assert account.left == 10
    assert account.resets_in_s is None
    assert account.queries == {"sanitize": 0}


def test_a_request_beyond_the_whole_budget_is_told_so_and_not_to_wait() -> None:
    account = Account(Budget(10, 60), Clock())
    account.spend("sanitize", 1)
    with pytest.raises(BudgetSpent, match="costs 11 victim queries, more than the whole budget of 10") as refused:
        account.bill("certify", 11).__enter__()
    assert refused.value.retry_after is None


def test_keys_have_accounts_of_their_own_and_are_not_kept() -> None:
    accounts = Accounts(Budget(10))
    accounts.of(accounts.name("secret")).spend("sanitize", 1)
    accounts.of(accounts.name("secret")).spend("smooth", 2)
    accounts.of(accounts.name("other")).spend("smooth", 3)
    for anonymous in (None, ""):
        accounts.of(accounts.name(anonymous)).spend("sanitize", 4)
    accounts.own.spend("labels", 1)
    told = accounts.snapshot()
    name = f"sha256:{hashlib.sha256(b'secret').hexdigest()[:16]}"
    assert told["keys"][name] == {
        "queries": {"sanitize": 1, "smooth": 2},
        "refused": 0,
        "suspected": 0,
        "shadow": {},
        "budget": {"queries": 10, "window_s": None, "left": 7, "resets_in_s": None},
    }
    assert told["keys"][ANONYMOUS]["queries"] == {"sanitize": 8}
    assert len(told["keys"]) == 3
    assert told["queries"] == {"sanitize": 9, "smooth": 5}
    assert told["gateway"] == {"labels": 1}
    assert "secret" not in str(told)


def test_beyond_their_number_keys_share_an_account_and_its_budget() -> None:
    accounts = Accounts(Budget(10), max_keys=2)
    for key in ("a", "b", "c", "d"):
        accounts.of(accounts.name(key)).spend("sanitize", 6)
    assert set(accounts.snapshot()["keys"]) - {OTHERS} == {accounts.name("a"), accounts.name("b")}
    assert accounts.of(accounts.name("a")).left == 4
    assert accounts.of(accounts.name("e")).left == 0


def test_a_quote_opens_no_account() -> None:
    accounts = Accounts(Budget(10))
    assert accounts.quote(accounts.name("new")) == {"queries": 10, "window_s": None, "left": 10, "resets_in_s": None}
    assert accounts.snapshot()["keys"] == {}
    accounts.of(accounts.name("new")).spend("sanitize", 3)
    told = accounts.quote(accounts.name("new"))
    assert told is not None
    assert told["left"] == 7
