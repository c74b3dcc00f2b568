"""The jobs as they are written where no worker keeps anything: an engine for each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.orm import Session

from jobs import READ, UPDATE, make_engine, sleep

__all__ = ["read", "sleep", "update"]


@contextmanager
def _new_session() -> Iterator[Session]:
    engine = make_engine()
    try:
        with Session(engine) as session, session.begin():
            yield session
    finally:
        engine.dispose()


def read(key: int) -> int:
    """Read one row."""
    with _new_session() as session:
        return session.execute(READ, {"id": key}).scalar_one()


def update(key: int) -> int:
    """Write one row, and commit."""
    with _new_session() as session:
        return session.execute(UPDATE, {"id": key}).rowcount
