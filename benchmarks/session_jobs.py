"""The jobs as they are written for our executor: the session is there."""

from __future__ import annotations

from dbpool_executor import session
from jobs import READ, UPDATE, Entry, array, burn, data, rows, sleep, trivial

__all__ = [
    "array",
    "burn",
    "data",
    "insert",
    "read",
    "rows",
    "sleep",
    "trivial",
    "update",
]


def read(key: int) -> int:
    """Read one row."""
    return session.execute(READ, {"id": key}).scalar_one()


def update(key: int) -> int:
    """Write one row; the worker commits."""
    return session.execute(UPDATE, {"id": key}).rowcount


def insert(key: int) -> int:
    """Insert one row; a chunk of such calls is one transaction, and one flush."""
    session.add(Entry(number=key))
    return key
