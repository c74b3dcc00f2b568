"""What the contenders run; imported by their workers."""

from __future__ import annotations

import os

from sqlalchemy import Engine, create_engine, text
from sqlalchemy.orm import Session

import dbpool_executor

READ = text("SELECT balance FROM bench_account WHERE id = :id")
UPDATE = text("UPDATE bench_account SET balance = balance + 1 WHERE id = :id")

engine: Engine  # of a worker that is written by hand


def make_engine() -> Engine:
    """Make the engine that every contender uses."""
    return create_engine(os.environ["DBPOOL_BENCH_URL"])


def connect() -> None:
    """Do by hand what an executor's worker does: the initializer of other pools."""
    global engine
    engine = make_engine()


def trivial(x: int) -> int:
    """Do nothing."""
    return x


def data(size: int) -> bytes:
    """Give a result of some size."""
    return bytes(size)


def read_ours(key: int) -> int:
    """Read one row in a job's session."""
    return dbpool_executor.session.execute(READ, {"id": key}).scalar_one()


def read_by_hand(key: int) -> int:
    """Read one row in a session of its own."""
    with Session(engine) as session, session.begin():
        return session.execute(READ, {"id": key}).scalar_one()


def update_ours(key: int) -> int:
    """Write one row in a job's session."""
    return dbpool_executor.session.execute(UPDATE, {"id": key}).rowcount


def update_by_hand(key: int) -> int:
    """Write one row in a session of its own."""
    with Session(engine) as session, session.begin():
        return session.execute(UPDATE, {"id": key}).rowcount
