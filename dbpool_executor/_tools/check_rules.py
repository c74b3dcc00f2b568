"""What the check concludes: pure functions over what was found and measured.

Runs in both processes; nothing is asked or measured here.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Status(enum.Enum):
    """What a check came to."""

    OK = "ok"
    WARNING = "warning"
    """It works, but there is something to know."""

    FAILED = "FAILED"
    """It will not work."""


class Finding(NamedTuple):
    """One line of the report.

    Attributes:
        name: What was checked.
        status: What it came to.
        what: What was found.
        remedy: What to do now; empty if there is nothing to do.
    """

    name: str
    status: Status
    what: str
    remedy: str = ""


class PoolSize(NamedTuple):
    """How many connections the engine of one worker may open.

    Attributes:
        kind: The class of its pool.
        size: What the pool keeps.
        overflow: What it opens beyond that at need; None for any number.
    """

    kind: str
    size: int
    overflow: int | None

    @property
    def most(self) -> int | None:
        """The sum; None for any number."""
        return None if self.overflow is None else self.size + self.overflow


class Bound(NamedTuple):
    """A number of connections that the server does not exceed.

    Attributes:
        name: What it is a bound of.
        allowed: How many there may be.
        taken: How many there are already, this command's own aside, or are reserved
            for others.
    """

    name: str
    allowed: int
    taken: int

    @property
    def free(self) -> int:
        """How many may still be opened."""
        return max(0, self.allowed - self.taken)


def tightest(bounds: Sequence[Bound]) -> Bound | None:
    """Give the bound that is met first; None if the server tells of none."""
    return min(bounds, key=lambda bound: bound.free, default=None)


def judged_connections(
    workers: int, pool: PoolSize, bounds: Sequence[Bound], *, is_sqlite: bool = False
) -> Finding:
    """Compare what all workers may connect with what the server allows.

    Args:
        workers: How many there are to be.
        pool: Of the engine that each of them has.
        bounds: What the server tells; empty if it tells nothing.
        is_sqlite: Whether there is no server but a file.
    """
    most = pool.most
    total = "any number of" if most is None else str(workers * most)
    what = (
        f"{count_of(workers)} may open {total} connection{'s' * (total != '1')} "
        f"({_described(pool)}), and will open {workers} if jobs use session alone; "
    )
    small = "use create_engine(..., pool_size=1, max_overflow=0) in the engine factory"
    name, bound = "connections", tightest(bounds)
    if bound is None:
        if is_sqlite:
            what += "a SQLite file bounds them only by its one writer at a time"
            return Finding(name, Status.OK, what)
        what += "how many the server allows is not known"
        return Finding(name, Status.WARNING, what, "look it up in its configuration")
    what += (
        f"{bound.name} is {bound.allowed}, of which {bound.taken} are in use or "
        f"reserved and {bound.free} are free"
    )
    if workers > bound.free:
        remedy = f"raise {bound.name}, or close what takes them"
        if bound.free:
            remedy += f", or have at most {count_of(bound.free)} and {small}"
        return Finding(name, Status.FAILED, what, remedy)
    if most is None or workers * most > bound.free:
        remedy = f"{small}, unless jobs open more connections at once"
        return Finding(name, Status.WARNING, what, remedy)
    return Finding(name, Status.OK, what)


def count_of(count: int) -> str:
    """Say how many workers."""
    return f"{count} worker{'s' * (count > 1)}"


def _described(pool: PoolSize) -> str:
    if pool.overflow is None:
        return f"its {pool.kind} has no limit"
    return f"pool_size {pool.size} + max_overflow {pool.overflow} each"


WITHIN = 0.1
"""By how much a rate may miss the best and still count as good as it."""


def recommended(
    rates: Mapping[int, float], free: int | None, within: float = WITHIN
) -> int:
    """Say how many workers to use.

    Args:
        rates: Jobs per second that were measured, by the number of workers.
        free: Connections that the server still allows, one of which each worker takes;
            None if it sets no limit.
        within: By how much a rate may miss the best, as a fraction of it.

    Returns:
        The least number whose rate is as good as the best; of those that the server
        allows, if it allows any.

    Raises:
        ValueError: There are no rates.
    """
    if not rates:
        raise ValueError("there are no rates to choose from; measure one at least")
    allowed = {n: rate for n, rate in rates.items() if free is None or n <= free}
    chosen = allowed or {min(rates): 0.0}
    least = (1 - within) * max(chosen.values())
    return min(n for n, rate in chosen.items() if rate >= least)


def counts_to_measure(most: int) -> list[int]:
    """Say for which numbers of workers to measure the rate.

    Args:
        most: The largest of them, 1 or more.

    Returns:
        Each number up to 4, then steps of a half and a third, and ``most`` itself.
    """
    steps = [1, 2, 3, 4]
    while steps[-1] < most:
        steps.append(steps[-2] * 2)
    return [*(n for n in steps if n < most), most]
