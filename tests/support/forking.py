"""Programs that fork by themselves, with connections open.

Imported by ``warm.py``, which runs them; it imports no pytest. Each gives a report:
``committed``, the names of what it was told was committed, and ``ends``, how its copies
fared.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import os
import resource
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

from sqlalchemy import (
    Engine,
    NullPool,
    create_engine,
    event,
    exc,
    literal,
    select,
    text,
)
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry

import inherited
from copies import (
    DEEDS,
    SECONDS,
    SHARED,
    Parent,
    allocates,
    at_first_in_copy,
    at_last_before_fork,
    closes_sessions,
    collects,
    cover,
    disposes_without_closing,
    in_copy,
    nothing,
)
from models import Item


def idle(url: str, deed: str, leave: str, rounds: int) -> dict[str, Any]:
    """Fork with an idle connection, and go on.

    For ``removes`` the connection is in use.
    """
    parent = Parent(url)
    committed, ends = [], []
    for number in range(rounds):
        names = [f"{number} before", f"{number} after"]
        parent.registry.add(Item(name=names[0]))
        parent.registry.flush()
        if deed != "removes":
            parent.registry.commit()
        ends.append(in_copy(partial(DEEDS[deed], parent), leave))
        assert parent.registry.scalar(select(literal(number))) == number
        parent.registry.add(Item(name=names[1]))
        parent.registry.commit()
        committed += names
    return {"committed": committed, "ends": ends}


class OtherThread:
    """Another thread, which has a transaction in a session of its own."""

    def __init__(self, parent: Parent, names: list[str]) -> None:
        self._parent = parent
        self._names = names
        self._opened, self._goes_on = threading.Event(), threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run)

    def open(self) -> None:
        """Have it begin its transaction and write."""
        self._thread.start()
        assert self._opened.wait(SECONDS)

    def go_on(self) -> list[str]:
        """Have it write once more and commit; give what was committed."""
        self._goes_on.set()
        self._thread.join(SECONDS)
        if self._error is not None:
            raise self._error
        return self._names

    def _run(self) -> None:
        # No variable holds the session: in a copy, other threads' live for ever.
        registry, (first, second) = self._parent.registry, self._names
        try:
            registry.add(Item(name=first))
            registry.flush()
            self._opened.set()
            assert self._goes_on.wait(SECONDS)
            registry.add(Item(name=second))
            registry.commit()
            registry.remove()
        except Exception as error:
            self._error = error
            self._opened.set()


def race(url: str, deed: str, rounds: int) -> dict[str, Any]:
    """Fork while another thread is in a transaction; it commits afterwards."""
    parent = Parent(url)
    committed, ends = [], []
    for number in range(rounds):
        other = OtherThread(parent, [f"{number} before", f"{number} after"])
        other.open()
        leave = "exit" if number % 2 else "_exit"
        ends.append(in_copy(partial(_then_collects, DEEDS[deed], parent), leave))
        committed += other.go_on()
    return {"committed": committed, "ends": ends}


def _then_collects(deed: Callable[[Parent], None], parent: Parent) -> None:
    try:
        deed(parent)
    finally:
        collects(parent)


def late(url: str, rounds: int, *, anew: bool) -> dict[str, Any]:
    """Have another thread open a transaction at the last moment before the fork.

    Args:
        url: Of the database.
        rounds: How often.
        anew: Whether on a connection that it opens then. Otherwise the copy allocates
            before the package's own hook can do anything there.
    """
    if not anew:
        at_first_in_copy.append(allocates)
    committed, ends = [], []
    for number in range(rounds):
        parent = Parent(url)
        if not anew:
            parent.registry.execute(select(1))
            parent.registry.remove()
        other = OtherThread(parent, [f"{number} before", f"{number} after"])
        at_last_before_fork.append(other.open)
        leave = "exit" if number % 2 else "_exit"
        ends.append(in_copy(partial(collects, parent), leave))
        at_last_before_fork.clear()
        committed += other.go_on()
        parent.engine.dispose()
    return {"committed": committed, "ends": ends}


def measure(url: str, against: str, *, busy: bool, rounds: int) -> dict[str, Any]:
    """Take a measure, one of those that people take, and fork.

    Args:
        url: Of the database.
        against: The measure.
        busy: Whether a connection is in use by another thread; otherwise it is idle.
        rounds: How often.
    """
    options: dict[str, Any] = {"poolclass": NullPool} if against == "null_pool" else {}
    parent = Parent(url, **options)
    if against == "listener":
        _refuse_other_processes(parent.engine)
    elif against == "freeze":
        at_first_in_copy.append(gc.freeze)
    elif against == "cover":
        # Collection may come before any hook; here it does.
        at_first_in_copy.extend([gc.collect, partial(cover, parent)])
    elif against == "hold":
        at_first_in_copy.append(gc.collect)
    deed = {
        "dispose_without_closing": disposes_without_closing,
        "close_sessions": closes_sessions,
    }.get(against, nothing)
    committed, ends = [], []
    for number in range(rounds):
        names = [f"{number} before", f"{number} after"]
        other = OtherThread(parent, names)
        if busy:
            other.open()
        else:
            parent.registry.execute(select(1))
            parent.registry.remove()
        if against == "dispose":
            parent.engine.dispose()
        leave = "exit" if number % 2 else "_exit"
        ends.append(in_copy(partial(_then_collects, deed, parent), leave))
        if not busy:
            other.open()
        committed += other.go_on()
    return {"committed": committed, "ends": ends}


def _refuse_other_processes(engine: Engine) -> None:
    # SQLAlchemy's documentation, "Using Connection Pools with Multiprocessing".
    @event.listens_for(engine, "connect")
    def _note(_driver: object, entry: ConnectionPoolEntry) -> None:
        entry.info["pid"] = os.getpid()

    @event.listens_for(engine, "checkout")
    def _check(_driver: object, entry: Any, proxy: Any) -> None:
        if entry.info["pid"] != os.getpid():
            entry.dbapi_connection = proxy.dbapi_connection = None
            raise exc.DisconnectionError


def classic(url: str, rounds: int) -> dict[str, Any]:
    """Fork with the globals of ``inherited`` in use; the copy binds them anew."""
    inherited.init(url)
    committed, ends = [], []
    for number in range(rounds):
        work = inherited.Work(f"{number}")
        job = partial(inherited.rebind_and_write, url, f"{number} in copy")
        ends.append(in_copy(job, "exit" if number % 4 == 0 else "_exit"))
        committed += [f"{number} in copy", *work.go_on()]
    return {"committed": committed, "ends": ends}


def exhausted(url: str) -> dict[str, Any]:
    """Fork when the process has as many files open as it may."""
    parent = Parent(url)
    names = ["before", "after"]
    other = OtherThread(parent, names)
    other.open()
    files = [os.open(os.devnull, os.O_RDWR)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(files) + 10,) * 2)
    with contextlib.suppress(OSError):
        while True:
            files.append(os.open(os.devnull, os.O_RDWR))
    end = in_copy(partial(collects, parent), "_exit")
    for number in files:
        os.close(number)
    return {"committed": other.go_on(), "ends": [end]}


def event_loop(url: str, rounds: int) -> dict[str, Any]:
    """Fork inside a running event loop, with a transaction of an AsyncSession open."""
    return asyncio.run(_in_event_loop(url, rounds))


async def _in_event_loop(url: str, rounds: int) -> dict[str, Any]:
    engine = create_async_engine(url)
    numbers: set[int] = set()
    committed, ends = [], []
    for number in range(rounds):
        names = [f"{number} before", f"{number} after"]
        session = AsyncSession(engine)
        session.add(Item(name=names[0]))
        await session.flush()
        numbers.add((await session.execute(text("SELECT pg_backend_pid()"))).scalar())
        ends.append(in_copy(partial(_terminates, engine, numbers), "_exit"))
        session.add(Item(name=names[1]))
        await session.commit()
        await session.close()
        committed += names
    await engine.dispose()
    return {"committed": committed, "ends": ends}


def _terminates(engine: AsyncEngine, numbers: set[int]) -> None:
    """Do in a copy what SQLAlchemy does with connections of a loop that is gone."""
    for entry in [e for e in gc.get_objects() if isinstance(e, ConnectionPoolEntry)]:
        entry.invalidate()
    gc.collect()
    # The copy has a loop that runs, for ever in the middle of the fork.
    asyncio._set_running_loop(None)
    if asyncio.run(_ask_number(engine)) in numbers:
        os._exit(SHARED)


async def _ask_number(engine: AsyncEngine) -> Any:
    async with engine.connect() as connection:
        return (await connection.execute(text("SELECT pg_backend_pid()"))).scalar()


def reloaded(url: str) -> dict[str, Any]:
    """Reload what registers the hooks, and race."""
    registered: list[object] = []
    hooks = mock.patch.object(
        os, "register_at_fork", lambda **all_: registered.append(all_)
    )
    listeners = mock.patch.object(
        event, "listen", lambda *all_: registered.append(all_)
    )
    with hooks, listeners:
        for name in ("dbpool_executor._forks.connections", "dbpool_executor") * 2:
            importlib.reload(importlib.import_module(name))
    return {**race(url, "collects", 2), "registered": len(registered)}


def forgotten(url: str) -> dict[str, Any]:
    """Use and drop engines, and tell what of them is still there, forks later."""
    things: list[weakref.ref[object]] = []
    for _ in range(3):
        engine = create_engine(url)
        connection = engine.raw_connection()
        things += map(weakref.ref, (engine, engine.pool, connection))
        things.append(weakref.ref(connection.driver_connection))
        ends = [in_copy(gc.collect, "_exit")]
        connection.close()
        ends.append(in_copy(gc.collect, "_exit"))
        del engine, connection
    gc.collect()
    left = [repr(thing()) for thing in things if thing() is not None]
    return {"left": left, "ends": ends}


PROGRAMS = (
    idle,
    race,
    late,
    measure,
    classic,
    exhausted,
    event_loop,
    reloaded,
    forgotten,
)
