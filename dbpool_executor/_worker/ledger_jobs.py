"""Jobs of the executor itself that ask the ledger.

Runs in a worker; the parent names them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .._ledger.claims import Entry
from .once import Once
from .transaction import here, session


def look_up(keys: Sequence[str]) -> dict[str, Entry]:
    """Give what is committed of some keys."""
    return _once().look_up(session(), keys)


def settle(keys: Sequence[str]) -> Any:
    """Find out what became of a job whose worker or connection was lost.

    Returns:
        The list of its results, once it is unpickled; None if it is rolled back.
    """
    return _once().settle(session(), keys)


def _once() -> Once:
    assert here.database is not None  # noqa: S101 - a job runs
    assert here.database.once is not None  # noqa: S101 - or nobody would ask
    return here.database.once
