"""Closes what the parent has open before workers are started.

Runs in the parent.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import stat
import sys
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, TypeAlias, cast

from sqlalchemy import Engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import (
    AssertionPool,
    Pool,
    SingletonThreadPool,
    StaticPool,
)

from .._drivers.connections import cut, is_in_memory, is_sqlite
from .._forks.connections import live_entries, living
from .._forks.pools import pool_of
from .._wire.locate import asyncio_classes, full_name
from ..errors import OpenConnectionsError

if TYPE_CHECKING:
    # It needs greenlet, which SQLAlchemy 2.1 does not bring along.
    from sqlalchemy.ext.asyncio import AsyncEngine

AnyEngine: TypeAlias = "Engine | AsyncEngine"

# Their connection is the database, or shared by everyone: it cannot be opened anew.
_POOLS_OF_ONE = (StaticPool, SingletonThreadPool, AssertionPool)

_CLOSE_GRACE = 1.0  # seconds
_SQLITE_HEADER = b"SQLite format 3\0"  # sqlite.org/fileformat2.html, section 1.3


def engines_of(parent_engine: object) -> tuple[AnyEngine, ...]:
    """Give the engines that ``parent_engine`` names.

    Args:
        parent_engine: None, an Engine, an AsyncEngine, or several in an iterable.

    Raises:
        TypeError: It is something else.
    """
    if parent_engine is None:
        return ()
    kinds = (Engine, *asyncio_classes("AsyncEngine"))
    if isinstance(parent_engine, kinds):
        return (cast("AnyEngine", parent_engine),)
    if isinstance(parent_engine, Iterable):
        engines = tuple(parent_engine)
        if all(isinstance(engine, kinds) for engine in engines):
            return engines
    raise TypeError(
        "parent_engine must be an Engine, an AsyncEngine or several of them in a "
        f"list, not a {full_name(type(parent_engine))}; pass the engines that this "
        "process itself uses, or leave it out"
    )


def prepare(engines: Iterable[AnyEngine], *, forks: bool) -> None:
    """Make this process ready for the start of its first worker.

    Args:
        engines: Their idle connections are closed under every start method.
        forks: Whether workers will be forks of this process. Then so are the idle
            connections of all its other engines.

    Raises:
        OpenConnectionsError: Workers would be forks, and a connection is checked out
            or a SQLite file is open.
        RuntimeError: This process is itself about to become a worker.
    """
    # What multiprocessing asks as well, later and for each start.
    if not forks and getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError(
            "a process that was started as a worker still imports the main module of "
            "the program, and that submits jobs; have it do so only in the program "
            "itself, under: if __name__ == '__main__'"
        )
    # Looked at before anything is disposed: an engine has another pool afterwards, and
    # could not be named.
    if forks and (checked_out := _checked_out()):
        raise OpenConnectionsError(tuple(checked_out))
    for engine in engines:
        _dispose(engine)
    if forks:
        prepare_fork()


def prepare_fork() -> None:
    """Make this process ready for one fork, the first or a later one.

    Connections that are checked out are not looked at: between any look and the fork
    another thread may open one. What is done at the fork itself makes them harmless.

    Raises:
        OpenConnectionsError: A SQLite file is open. Nothing makes that harmless: the
            copy of SQLite in a worker would believe that it holds this process's locks
            (sqlite.org/howtocorrupt.html, section 2.6).
    """
    _close_idle()
    if _open_sqlite_files():
        # A file that was closed stays open for as long as a cursor on it lives, perhaps
        # as garbage (sqlite.org/c3ref/close.html).
        gc.collect()
        # aiosqlite closes a file in a thread of its own, a moment after it was asked.
        end = time.monotonic() + (_CLOSE_GRACE if "aiosqlite" in sys.modules else 0.0)
        while files := _open_sqlite_files():
            if time.monotonic() > end:
                raise OpenConnectionsError(tuple(files))
            time.sleep(0.01)


def _close_idle() -> None:
    pools = {pool_of(entry) for entry in live_entries() if not entry.in_use} - {None}
    if not pools:
        return
    for engine in living(Engine):
        if engine.pool in pools:
            pools.discard(engine.pool)
            if not _is_its_pool(engine):
                _dispose(engine)
    # Their engine was garbage sooner than they, or is hidden by gc.freeze().
    for pool in pools:
        if not isinstance(pool, _POOLS_OF_ONE):
            _cut_idle(pool)


def _is_its_pool(engine: Engine) -> bool:
    """Say whether to close an engine's idle connections is to lose something."""
    return isinstance(engine.pool, _POOLS_OF_ONE) or is_in_memory(engine.url)


def _dispose(engine: AnyEngine) -> None:
    engine = engine if isinstance(engine, Engine) else engine.sync_engine
    if not engine.dialect.is_async:
        engine.dispose()
        return
    # Here may be no event loop, or one that runs, so nothing can be awaited; to cut a
    # connection is what asynchronous drivers allow outside a greenlet.
    _cut_idle(engine.pool)
    engine.dispose(close=False)


def _cut_idle(pool: Pool | None) -> None:
    for entry in live_entries():
        if pool_of(entry) is not pool or entry.in_use:
            continue
        if not cut(entry.driver_connection):
            entry.invalidate()


def _checked_out() -> list[str]:
    """Describe the connections that are in use, by engine."""
    pools: Counter[Pool] = Counter()
    for entry in live_entries():
        # SQLite's are judged by whether their file is open.
        if entry.in_use and not is_sqlite(entry.driver_connection):
            pool = pool_of(entry)
            if pool is not None:
                pools[pool] += 1
    if not pools:
        return []
    engines = {engine.pool: engine for engine in living(Engine)}
    sessions = Counter(map(_held_pool, living(Session)))
    return [
        _describe(engines.get(pool), n, sessions[pool]) for pool, n in pools.items()
    ]


def _describe(engine: Engine | None, count: int, held: int) -> str:
    name = "an engine disposed or frozen since" if engine is None else repr(engine)
    text = f"{name} has {count} connection{'s' * (count > 1)} checked out"
    if held:
        text += f", {held} session{'s' * (held > 1)} in a transaction"
    return text


def _held_pool(session: Session) -> Pool | None:
    """Give the pool of the engine of a session that is in a transaction."""
    with suppress(Exception):  # a session without a bind of its own
        if session.in_transaction():
            # Views of an engine have its pool.
            return session.get_bind().engine.pool
    return None


def _open_sqlite_files() -> list[str]:
    """Describe the SQLite files that this process has open."""
    found = {f"the SQLite file {path} is open" for path in _sqlite_files()}
    # A file that is still empty is known only by its connection.
    pools = {
        pool_of(entry) for entry in live_entries() if is_sqlite(entry.driver_connection)
    }
    if pools:
        found |= {
            f"{engine!r} has the SQLite file {engine.url.database} open"
            for engine in living(Engine)
            if engine.pool in pools and not _is_its_pool(engine)
        }
    return sorted(found)


def _sqlite_files() -> set[str]:
    """Give the files that are SQLite's by their header, where /proc tells them."""
    found = set()
    with suppress(OSError):
        for number in os.listdir("/proc/self/fd"):
            # Read through the open descriptor: to open and close the file once more
            # would drop the locks of this process (fcntl(2), "record locks").
            with suppress(OSError):
                descriptor = int(number)
                if stat.S_ISREG(os.fstat(descriptor).st_mode):
                    header = os.pread(descriptor, len(_SQLITE_HEADER), 0)
                    if header == _SQLITE_HEADER:
                        found.add(os.readlink(f"/proc/self/fd/{number}"))
    return found
