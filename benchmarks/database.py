"""The tables that jobs read and write, and who looks at them from outside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import NullPool, create_engine, text

from jobs import make_engine

ROWS = 3000
"""Accounts, with ids from 1; each has a balance of 100 more than its id."""


def execute(*statements: str) -> Any:
    """Run statements as one transaction; give the last one's only value, if any."""
    engine = create_engine(make_engine().url, poolclass=NullPool)
    with engine.begin() as connection:
        for statement in statements:
            result = connection.execute(text(statement))
        return result.scalar_one() if result.returns_rows else None


@contextmanager
def tables() -> Iterator[None]:
    """Create the tables, and drop them at the end."""
    drop = "DROP TABLE IF EXISTS bench_account, bench_entry"
    execute(
        drop,
        "CREATE TABLE bench_account (id integer PRIMARY KEY, balance integer NOT NULL, "
        "updates integer NOT NULL)",
        "CREATE TABLE bench_entry (id serial PRIMARY KEY, number integer NOT NULL)",
        f"INSERT INTO bench_account SELECT i, 100 + i, 0 FROM generate_series(1, {ROWS}) i",
    )
    try:
        yield
    finally:
        execute(drop)
