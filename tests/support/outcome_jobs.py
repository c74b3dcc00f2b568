"""Jobs that fail or succeed in every way that an outcome is told of.

Imported by workers, so it imports no pytest.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from sqlalchemy import text

import jobs
from dbpool_executor import (
    OutsideJobError,
    ResultLostError,
    current_engine,
    session,
)


class GuardedError(Exception):
    """Lets nobody set an attribute, and pickles as long as it has none."""

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(name)


class SlottedError(Exception):
    """Has room for one attribute of its own."""

    __slots__ = ("place",)


class FalsyError(Exception):
    """Is not true."""

    def __bool__(self) -> bool:
        return False


@dataclass(frozen=True)
class FrozenError(Exception):
    """Refuses to be changed."""

    number: int


ERRORS = {
    "plain": partial(ValueError, "no"),
    "guarded": partial(GuardedError, "no"),
    "slotted": partial(SlottedError, "no"),
    "falsy": FalsyError,
    "frozen": partial(FrozenError, 4),
    "group": partial(ExceptionGroup, "two", [ValueError(1), KeyError(2)]),
    "outside": partial(OutsideJobError, "session"),
    "of another job": partial(ResultLostError, "that of another job"),
}


def insert_and_raise(name: str, kind: str) -> None:
    """Write an item and raise."""
    jobs.insert_item(name)
    error = ERRORS[kind]()
    raise error


def insert_commit_and_raise(name: str) -> None:
    """Write an item, commit it in the middle of the job, and raise."""
    jobs.insert_and_commit_oneself(name)
    raise ValueError(name)


def insert_twice(name: str) -> None:
    """Violate a constraint."""
    for _ in range(2):
        jobs.insert_item(name)


def insert_and_roll_back(name: str) -> str:
    """Write an item, and undo that on purpose."""
    jobs.insert_item(name)
    session.rollback()
    return name


def insert_and_commit(name: str, *, more: bool = False) -> None:
    """Commit, and perhaps leave something else uncommitted."""
    jobs.insert_item(name)
    session.commit()
    if more:
        jobs.insert_item(f"{name} and more")


def commit_with_engine(name: str) -> None:
    """Commit by a connection of the job's own."""
    with current_engine().begin() as connection:
        connection.execute(
            text("INSERT INTO item (name, amount) VALUES (:name, 1)"), {"name": name}
        )


def stop(_name: str) -> object:
    """Raise StopIteration."""
    return next(iter(()))
