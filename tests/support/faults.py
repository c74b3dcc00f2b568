"""Functions and values that misbehave in workers.

Imported by workers, so it imports no pytest.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from sqlalchemy import Engine, create_engine, event, insert, text
from sqlalchemy.orm import Session

import jobs
from dbpool_executor import current_engine, session
from models import Item

# -- Ends of a worker -----------------------------------------------------------


def die(number: int = signal.SIGKILL) -> NoReturn:
    """End this process by a signal."""
    os.kill(os.getpid(), number)
    signal.pause()
    raise AssertionError("unreachable")


def insert_and_die(name: str, number: int = signal.SIGKILL) -> None:
    """Write an item and be ended by a signal."""
    jobs.insert_item(name)
    die(number)


def hold_out() -> NoReturn:
    """Not be interrupted."""
    while True:
        with suppress(BaseException):
            threading.Event().wait()


def insert_and_exit(name: str, code: int) -> None:
    """Write an item and leave without a word."""
    jobs.insert_item(name)
    os._exit(code)


def commit_oneself_and_die(name: str) -> None:
    """Write an item, commit it in the middle of the job, and die."""
    jobs.insert_and_commit_oneself(name)
    die()


# -- Something happens at a moment of the commit ----------------------------------


def insert_and_have(name: str, moment: str, happen: Callable[[], object]) -> None:
    """Write an item, and have something happen when the job itself is over.

    Args:
        name: Of the item.
        moment: ``commit event``: when SQLAlchemy tells that it is going to commit.
            ``commit``: just before COMMIT is sent. ``commit returned``: just after the
            server has answered. ``after commit``: when SQLAlchemy tells of it.
            ``close``: when the session closes. All but the last but one need an engine
            factory that is :func:`obedient`, and :data:`OBEDIENT`.
        happen: Called then.
    """
    jobs.insert_item(name)
    if moment == "after commit":
        event.listen(session(), "after_commit", lambda _session: happen())
    else:
        session.info[moment] = happen


def _obey(info: dict[Any, Any], moment: str) -> None:
    happen = info.pop(moment, None)
    if happen is not None:
        happen()


def obedient(make_engine: Callable[[], Engine]) -> Callable[[], Engine]:
    """Give an engine factory that has the moments around COMMIT obey the job."""
    return partial(_make_obedient, make_engine)


def _make_obedient(make_engine: Callable[[], Engine]) -> Engine:
    engine = make_engine()
    do_commit = engine.dialect.do_commit

    def commit(connection: Any) -> None:
        _obey(session.info, "commit")
        do_commit(connection)
        _obey(session.info, "commit returned")

    engine.dialect.do_commit = commit  # type: ignore[assignment]
    event.listen(engine, "commit", lambda _: _obey(session.info, "commit event"))
    return engine


class ObedientSession(Session):
    """Does what the job said when it is closed."""

    def close(self) -> None:
        """Close."""
        _obey(self.info, "close")
        super().close()


OBEDIENT: dict[str, Any] = {"session_options": {"class_": ObedientSession}}
"""With :func:`obedient`, what an executor needs for :func:`insert_and_have`."""


def select_after_gate(name: str, address: tuple[str, int]) -> None:
    """Write an item, wait, and use the connection again."""
    jobs.insert_at_gate(name, address)
    session.execute(text("SELECT 1"))


# -- Exceptions -------------------------------------------------------------------


class FalsyError(Exception):
    """Is false, as an empty container is."""

    def __len__(self) -> int:
        return 0


class PickyError(Exception):
    """Has a constructor that its ``args`` do not fit."""

    def __init__(self, place: str, *, code: int) -> None:
        super().__init__(f"{code} at {place}")
        self.place = place
        self.code = code


class LockedError(Exception):
    """Has an attribute that does not pickle."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text
        self.lock = threading.Lock()


@dataclass(frozen=True)
class FrozenError(Exception):
    """Refuses that its attributes are set."""

    code: int
    place: str


class ExplosiveError(Exception):
    """Raises when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return explode, (ValueError("unpickled"),)


class ExitsOnUnpicklingError(Exception):
    """Ends the process that unpickles it, where nothing holds it back."""

    def __reduce__(self) -> tuple[Any, ...]:
        return explode, (SystemExit(3),)


class MuteError(Exception):
    """Cannot be shown."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


def raise_falsy(name: str) -> None:
    """Write an item and raise an exception that is false."""
    jobs.insert_item(name)
    raise FalsyError("falsy")


def raise_picky(name: str) -> None:
    """Write an item and raise an exception with a constructor of its own."""
    jobs.insert_item(name)
    raise PickyError("home", code=7)


def raise_locked(name: str) -> None:
    """Write an item and raise an exception that holds a lock."""
    jobs.insert_item(name)
    raise LockedError("locked")


def raise_local(name: str) -> None:
    """Write an item and raise an exception whose class cannot be imported."""

    class LocalError(Exception):
        pass

    jobs.insert_item(name)
    raise LocalError("local")


def raise_frozen(name: str) -> None:
    """Write an item and raise an exception that refuses attributes."""
    jobs.insert_item(name)
    raise FrozenError(7, "home")


def raise_group(name: str) -> None:
    """Write an item and raise several exceptions at once."""
    jobs.insert_item(name)
    raise ExceptionGroup("two", [ValueError("one"), PickyError("home", code=2)])


def raise_explosive(name: str) -> None:
    """Write an item and raise an exception that raises when it is unpickled."""
    jobs.insert_item(name)
    raise ExplosiveError("boom")


def raise_exits_on_unpickling(name: str) -> None:
    """Write an item and raise an exception that exits when it is unpickled."""
    jobs.insert_item(name)
    raise ExitsOnUnpicklingError("boom")


def raise_mute(name: str) -> None:
    """Write an item and raise an exception that cannot be shown."""
    jobs.insert_item(name)
    raise MuteError


def raise_chained(name: str) -> None:
    """Write an item and raise an exception that has a cause."""
    jobs.insert_item(name)
    try:
        raise LookupError("the root of it")
    except LookupError as exc:
        raise ValueError("what came of it") from exc


def insert_odd_twice(name: str) -> None:
    """Have the database refuse a statement whose parameter does not pickle."""

    class Odd(str):
        __slots__ = ()

    for _ in range(2):
        session.execute(insert(Item).values(name=Odd(name), amount=0))


def commit_oneself_and_raise(name: str) -> None:
    """Write an item, commit it, and raise what cannot be rebuilt elsewhere."""
    jobs.insert_and_commit_oneself(name)
    raise_local(f"{name} again")


def commit_oneself_and_exit(name: str) -> None:
    """Write an item, commit it, and raise SystemExit."""
    jobs.insert_and_commit_oneself(name)
    raise SystemExit(3)


def commit_oneself_and_give_item(name: str) -> Item:
    """Write an item, commit it, and return what cannot leave the worker."""
    jobs.insert_and_commit_oneself(name)
    return session.query(Item).one()


# -- Values -----------------------------------------------------------------------


def explode(exc: BaseException) -> NoReturn:
    """Raise what came."""
    raise exc


def give_item(name: str) -> list[dict[str, Item]]:
    """Write an item and return it, the mapped instance itself."""
    item = Item(name=name, amount=0)
    session.add(item)
    return [{"item": item}]


def give_lock(name: str) -> dict[str, object]:
    """Write an item and return what does not pickle."""
    jobs.insert_item(name)
    return {"lock": threading.Lock()}


class Explosive:
    """Raises when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return explode, (ValueError("unpickled"),)


class ExitsOnUnpickling:
    """Ends the process that unpickles it, where nothing holds it back."""

    def __reduce__(self) -> tuple[Any, ...]:
        return explode, (SystemExit(3),)


class InterruptsOnce:
    """Is interrupted, as by Ctrl-C, the first time that a main thread unpickles it."""

    has_struck = False

    def __reduce__(self) -> tuple[Any, ...]:
        return unpickle_or_interrupt, ()


def unpickle_or_interrupt() -> InterruptsOnce:
    """Do what unpickling does, unless it is to be interrupted."""
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and not InterruptsOnce.has_struck:
        InterruptsOnce.has_struck = True
        raise KeyboardInterrupt
    return InterruptsOnce()


class DiesOnUnpickling:
    """Ends the process that unpickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return die, ()


class CallsOnUnpickling:
    """Has a function called where it is unpickled.

    Args:
        name: Of the function, here.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> tuple[Any, ...]:
        return call_of_name, (self.name,)


def call_of_name(name: str) -> None:
    """Call a function of this module, for what it does."""
    globals()[name]()


def keep_engine() -> None:
    """Keep the engine for later jobs, which do not ask for it."""
    global _kept_engine
    _kept_engine = current_engine()


_kept_engine: Engine


def insert_by_kept_engine(name: str) -> None:
    """Write an item and commit it, through the engine that was kept."""
    with _kept_engine.begin() as connection:
        connection.execute(insert(Item).values(name=name, amount=0))


class FailsToPickle:
    """Raises when it is pickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        raise ValueError("not pickled")


def give_explosive(name: str) -> Explosive:
    """Write an item and return what raises when it is unpickled."""
    jobs.insert_item(name)
    return Explosive()


def give_exits_on_unpickling(name: str) -> ExitsOnUnpickling:
    """Write an item and return what exits when it is unpickled."""
    jobs.insert_item(name)
    return ExitsOnUnpickling()


def give_interrupts_once(name: str) -> InterruptsOnce:
    """Return what interrupts whoever unpickles it first."""
    jobs.insert_item(name)
    return InterruptsOnce()


def give_fails_to_pickle(name: str) -> FailsToPickle:
    """Write an item and return what raises when it is pickled."""
    jobs.insert_item(name)
    return FailsToPickle()


def give_large(
    name: str, size: int, address: tuple[str, int] | None = None
) -> bytearray:
    """Write an item and return more than a socket takes at once.

    With a gate it waits there, committed and about to answer.
    """
    if address is None:
        jobs.insert_item(name)
    else:
        insert_and_have(name, "close", partial(jobs.wait_at_gate, address))
    return bytearray(size)


# -- Starts of a worker -------------------------------------------------------------


def engine_that_fails(record: Path) -> Engine:
    """Make no engine."""
    jobs.note(record)
    raise ConnectionError("no such host")


def engine_that_exits(record: Path) -> Engine:
    """Make no engine, and end the worker."""
    jobs.note(record)
    os._exit(5)


def engine_that_fails_once(url: str, record: Path) -> Engine:
    """Make no engine the first time that any worker asks."""
    is_first = not record.exists()
    jobs.note(record)
    if is_first:
        raise ConnectionError("not yet")
    return create_engine(url)


def engine_that_exits_once(url: str, record: Path) -> Engine:
    """End the worker the first time that any worker asks."""
    is_first = not record.exists()
    jobs.note(record)
    if is_first:
        os._exit(5)
    return create_engine(url)


def engine_in_order(url: str, record: Path) -> Engine:
    """Make an engine the first time that any worker asks, and none after that."""
    is_first = not record.exists()
    jobs.note(record)
    if is_first:
        return create_engine(url)
    raise ConnectionError("not any more")


def fail_to_initialize() -> None:
    """As an initializer: write an item and fail."""
    jobs.insert_item("initializer")
    raise ConnectionError("no such table")


def never_leave() -> None:
    """As an initializer: keep the worker from ending when it is told to leave."""
    event.listen(current_engine(), "engine_disposed", lambda _engine: signal.pause())


class Reopening(Session):
    """A session at whose end another one is opened, as a listener may do."""

    def close(self) -> None:
        """Close it, and ask for the next."""
        super().close()
        session.registry.clear()
        session.info["left"] = "behind"
