"""Who caused how many victim queries, and who may cause more.

A query is one image handed to the victim, whatever comes back; only where no connection came about, nothing was asked.
Clients are those of the file of keys (`services.keys`). Without one, a key is a name that anybody may use or invent,
and those without any are a client too: budgets hold back clients that are honest then, or whose header a proxy sets.
Such keys are remembered as the first 16 hexadecimal digits of their SHA-256, and only so many of them: later ones share
one account, budget included.

Everything is counted in memory, from the start of the process.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal

from services.protocol.errors import BudgetSpent

ANONYMOUS: Final = "anonymous"
"""The account of requests without a key."""

OTHERS: Final = "others"
"""The account of keys that came when too many were known already."""

MAX_KEYS: Final = 10_000
"""How many keys have accounts of their own."""

Comparison = Literal["agreed", "disagreed", "failed", "skipped"]
"""What came of comparing the answer to an image with that to its raw form; see `services.gateway.shadow`."""


@dataclass(frozen=True)
class Budget:
    """What one account may spend.

    Attributes:
        queries: victim queries; None: any number.
        window_s: seconds, from the first query on, after which it is full again; None: never.
    """

    queries: int | None = None
    window_s: float | None = None


class Account:
    """One client's queries. Not safe to use from several threads.

    Attributes:
        queries: what was spent since the start, by purpose: a mode, or "shadow".
        shadow: images whose answers were to be compared, by what came of it.
        refused: requests that the budget did not hold.
        suspected: images that looked like an attack by queries; see `services.gateway.detection`.
    """

    def __init__(self, budget: Budget, clock: Callable[[], float] = time.monotonic) -> None:
        """Opens an account on which nothing was spent."""
        self.queries: Counter[str] = Counter()
        self.shadow: Counter[Comparison] = Counter()
        self.refused = 0
        self.suspected = 0
        self._budget = budget
        self._clock = clock
        self._used = 0  # of the budget, in the present window
        self._reserved = 0
        self._since: float | None = None

    @property
    def left(self) -> int | None:
        """Queries that the budget still holds, those reserved for requests in work not counted; None: any number."""
        if self._budget.queries is None:
            return None
        self._roll()
        return max(self._budget.queries - self._used - self._reserved, 0)

    @property
    def resets_in_s(self) -> float | None:
        """Seconds until the budget is full again; None: it is, or it never will be."""
        self._roll()
        if self._since is None or self._budget.window_s is None:
            return None
        return self._since + self._budget.window_s - self._clock()

    def quote(self) -> dict[str, Any] | None:
        """The budget and what is left of it, in JSON; None without one."""
        if self._budget.queries is None:
            return None
        return {
            "queries": self._budget.queries,
            "window_s": self._budget.window_s,
            "left": self.left,
            "resets_in_s": self.resets_in_s,
        }

    @contextmanager
    def bill(self, purpose: str, queries: int) -> Iterator["Bill"]:
        """Reserves what a request may cost; what it has not spent when the context ends is given back.

        Raises:
            BudgetSpent: the budget does not hold it.
        """
        left = self.left
        if left is not None and queries > left:
            self.refused += 1
            raise self._refusal(queries, left)
        self._reserved += queries
        bill = Bill(self, purpose, queries)
        try:
            yield bill
        finally:
            self.release(bill.reserved)
            bill.reserved = 0

    def spend(self, purpose: str, queries: int) -> None:
        """Counts queries that are about to be sent; a negative number takes back what was not sent after all."""
        self._roll()
        if self._since is None and queries > 0:
            self._since = self._clock()
        self.queries[purpose] += queries
        self._used = max(self._used + queries, 0)  # what is taken back may have been counted in an earlier window

    def release(self, queries: int) -> None:
        """Ends a reservation."""
        self._reserved -= queries

    def _roll(self) -> None:
        """Fills the budget again when its window has ended."""
        window_s = self._budget.window_s
        if self._since is not None and window_s is not None and self._clock() >= self._since + window_s:
            self._used = 0
            self._since = None

    def _refusal(self, queries: int, left: int) -> BudgetSpent:
        held = self._budget.queries
        assert held is not None
        if queries > held:
            return BudgetSpent(
                f"the request costs {queries} victim queries, more than the whole budget of {held}: send fewer images, "
                "or ask for a smaller n or another mode"
            )
        return BudgetSpent(
            f"the request costs {queries} victim queries, and {left} are left of this key's budget of {held}",
            retry_after=self.resets_in_s,
        )


class Bill:
    """One request's queries.

    Attributes:
        account: who pays.
        reserved: what it may still spend.
        spent: what it has spent.
    """

    def __init__(self, account: Account, purpose: str, reserved: int) -> None:
        """Made by `Account.bill`."""
        self.account = account
        self.reserved = reserved
        self.spent = 0
        self._purpose = purpose

    def spend(self, queries: int, purpose: str | None = None) -> None:
        """Counts queries that are about to be sent, by default for the purpose of the bill."""
        self.account.release(queries)
        self.reserved -= queries
        self.account.spend(purpose or self._purpose, queries)
        self.spent += queries

    def refund(self, queries: int, purpose: str | None = None) -> None:
        """Takes back queries that were not sent after all."""
        self.account.spend(purpose or self._purpose, -queries)
        self.spent -= queries


class Accounts:
    """All accounts.

    Args:
        budget: of each client.
        max_keys: how many keys have accounts of their own.
        clock: seconds, from any start.

    Attributes:
        own: the gateway's: what it asked to learn the classes' names ("labels") and the shape of the scores ("shape"),
            and images that it sent again to another replica ("resent").
    """

    def __init__(
        self, budget: Budget, *, max_keys: int = MAX_KEYS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Knows no client yet."""
        self.own = Account(Budget())
        self._budget = budget
        self._max_keys = max_keys
        self._clock = clock
        self._by_name: dict[str, Account] = {}

    def of(self, name: str) -> Account:
        """The account of a client, opened if need be."""
        if name not in self._by_name:
            self._by_name[name] = Account(self._budget, self._clock)
        return self._by_name[name]

    def quote(self, name: str) -> dict[str, Any] | None:
        """What `Account.quote` says of a client, for whom no account is opened."""
        return (self._by_name.get(name) or Account(self._budget, self._clock)).quote()

    def snapshot(self) -> dict[str, Any]:
        """Everything that is counted, in JSON. Counters only rise, but for queries that were not sent after all."""
        total: Counter[str] = Counter()
        for account in self._by_name.values():
            total.update(account.queries)
        return {
            "queries": dict(total),
            "gateway": dict(self.own.queries),
            "keys": {
                name: {
                    "queries": dict(account.queries),
                    "refused": account.refused,
                    "suspected": account.suspected,
                    "shadow": dict(account.shadow),
                    "budget": account.quote(),
                }
                for name, account in self._by_name.items()
            },
        }

    def name(self, key: str | None) -> str:
        """The client that a key belongs to where keys are names: its account's name, or what that would be now."""
        if not key:
            return ANONYMOUS
        name = f"sha256:{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        return name if name in self._by_name or len(self._by_name) < self._max_keys else OTHERS
