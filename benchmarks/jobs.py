"""What the contenders run that know nothing of SQLAlchemy; imported by their workers.

Each worker is given its engine by the initializer ``connect``. The functions of the same
names in ``session_jobs`` are for our executor, those in ``engine_jobs`` for jobs that
make an engine each. This module does not import ours, so that no peer pays for it.
"""

from __future__ import annotations

import functools
import os
import time
from typing import Any

from sqlalchemy import Engine, create_engine, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

READ = text("SELECT balance FROM bench_account WHERE id = :id")
UPDATE = text("UPDATE bench_account SET updates = updates + 1 WHERE id = :id")

URL = "postgresql+psycopg://postgres@127.0.0.1/test"  # unless DBPOOL_BENCH_URL says

engine: Engine  # of this worker


class Base(DeclarativeBase):
    """Of the mapped classes."""


class Entry(Base):
    """A row that is inserted."""

    __tablename__ = "bench_entry"
    id: Mapped[int] = mapped_column(primary_key=True)  # the server's choice
    number: Mapped[int]


def make_engine() -> Engine:
    """Make the engine that every contender uses; it connects when a job asks for it."""
    return create_engine(os.environ.get("DBPOOL_BENCH_URL", URL))


def connect() -> None:
    """Do by hand what our executor's worker does: the initializer of other pools."""
    global engine
    engine = make_engine()


def read(key: int) -> int:
    """Read one row."""
    with Session(engine) as session, session.begin():
        return session.execute(READ, {"id": key}).scalar_one()


def update(key: int) -> int:
    """Write one row, and commit."""
    with Session(engine) as session, session.begin():
        return session.execute(UPDATE, {"id": key}).rowcount


def insert_all(keys: list[int]) -> list[int]:
    """Insert some rows in one transaction."""
    with Session(engine) as session, session.begin():
        for key in keys:
            session.add(Entry(number=key))
        return keys


def trivial(x: int) -> int:
    """Do nothing."""
    return x


def data(size: int) -> bytes:
    """Give a result of some size."""
    return bytes(size)


@functools.cache  # what is measured is the way to the parent
def rows(count: int) -> list[tuple[int, str]]:
    """Give as many rows as a report has."""
    return [(number, f"row {number}") for number in range(count)]


@functools.cache
def array(count: int) -> Any:
    """Give a numpy array of as many floats."""
    import numpy as np

    return np.arange(count, dtype=float)


def burn(seconds: float) -> float:
    """Compute until the time is over."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass
    return seconds


def sleep(seconds: float) -> tuple[int, float, float]:
    """Take some time; tell which worker did, from when to when.

    The clock is the same in all processes.
    """
    begin = time.monotonic()
    time.sleep(seconds)
    return os.getpid(), begin, time.monotonic()
