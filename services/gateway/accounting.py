"""Who caused how many victim queries, and who may cause more.

A query is one image handed to the victim, whatever comes back; a failed connection costs nothing. Clients come from
the file of keys (`services.keys`). Without one, a key is a self-chosen name, so budgets only hold back honest clients
or those whose header a proxy sets; the name is stored as a truncated SHA-256, and beyond `MAX_KEYS` names all share one
account. Everything is counted in memory, from the start of the process.
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
    """What one account may spend: `queries` victim queries (None: any number) per `window_s` seconds (None: ever)."""

    queries: int | None = None
    window_s: float | None = None


class Account:
    """One client's queries. Not thread-safe.

    Attributes:
        queries: spent since the start, by purpose: a mode, or "shadow".
        shadow: images compared with their raw form, by outcome.
        refused: requests refused because of the budget.
        suspected: images that looked like a query attack; see `services.gateway.detection`.
    """

    def __init__(self, budget: Budget, clock: Callable[[], float] = time.monotonic) -> None:
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
        """Queries left in the budget, excluding reserved ones; None: any number."""
        if self._budget.queries is None:
            return None
        self._roll()
        return max(self._budget.queries - self._used - self._reserved, 0)

    @property
    def resets_in_s(self) -> float | None:
        """Seconds until the budget is full again; None: it already is, or never will be."""
        self._roll()
        if self._since is None or self._budget.window_s is None:
            return None
        return self._since + self._budget.window_s - self._clock()

    def quote(self) -> dict[str, Any] | None:
        """The budget and what is left of it, in JSON; None without a budget."""
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
        """Reserves `queries`; gives back the unspent ones at the end. Raises BudgetSpent if too few are left."""
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
        """Counts queries about to be sent; a negative number takes back unsent ones."""
        self._roll()
        if self._since is None and queries > 0:
            self._since = self._clock()
        self.queries[purpose] += queries
        self._used = max(self._used + queries, 0)  # what is taken back may have been counted in an earlier window

    def release(self, queries: int) -> None:
        """Ends a reservation."""
        self._reserved -= queries

    def _roll(self) -> None:
        """Refills the budget when its window has ended."""
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
    """One request's queries: how many are still `reserved` and how many `spent`."""

    def __init__(self, account: Account, purpose: str, reserved: int) -> None:
        self.account = account
        self.reserved = reserved
        self.spent = 0
        self._purpose = purpose

    def spend(self, queries: int, purpose: str | None = None) -> None:
        """Counts queries about to be sent, by default for the bill's purpose."""
        self.account.release(queries)
        self.reserved -= queries
        self.account.spend(purpose or self._purpose, queries)
        self.spent += queries

    def refund(self, queries: int, purpose: str | None = None) -> None:
        """Takes back queries that were not sent."""
        self.account.spend(purpose or self._purpose, -queries)
        self.spent -= queries


class Accounts:
    """All accounts.

    Args:
        budget: of each client.
        max_keys: how many keys have accounts of their own.
        clock: seconds, from any start.

    Attributes:
        own: the gateway's own queries: for class names ("labels"), score shapes ("shape"), and images
            sent again to another replica ("resent").
    """

    def __init__(
        self, budget: Budget, *, max_keys: int = MAX_KEYS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.own = Account(Budget())
        self._budget = budget
        self._max_keys = max_keys
        self._clock = clock
        self._by_name: dict[str, Account] = {}

    def of(self, name: str) -> Account:
        """The client's account, opened if need be."""
        if name not in self._by_name:
            self._by_name[name] = Account(self._budget, self._clock)
        return self._by_name[name]

    def quote(self, name: str) -> dict[str, Any] | None:
        """`Account.quote` of a client, without opening an account."""
        return (self._by_name.get(name) or Account(self._budget, self._clock)).quote()

    def snapshot(self) -> dict[str, Any]:
        """All counters, in JSON. They only rise, except when unsent queries are taken back."""
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
        """The account's name for a self-chosen key."""
        if not key:
            return ANONYMOUS
        name = f"sha256:{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        return name if name in self._by_name or len(self._by_name) < self._max_keys else OTHERS
