"""Keeps the connections of one process out of another.

Runs in the parent, before workers are started.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import ConnectionPoolEntry, Pool

from ._places import full_name

AnyEngine = Engine | AsyncEngine


def engines_of(parent_engine: object) -> tuple[AnyEngine, ...]:
    """Give the engines that ``parent_engine`` names.

    Args:
        parent_engine: None, an Engine, an AsyncEngine, or several in an iterable.

    Raises:
        TypeError: It is something else.
    """
    if parent_engine is None:
        return ()
    if isinstance(parent_engine, (Engine, AsyncEngine)):
        return (parent_engine,)
    if isinstance(parent_engine, Iterable):
        engines = tuple(parent_engine)
        if all(isinstance(engine, (Engine, AsyncEngine)) for engine in engines):
            return engines
    raise TypeError(
        "parent_engine must be an Engine, an AsyncEngine or several of them in a "
        f"list, not a {full_name(type(parent_engine))}; pass the engines that this "
        "process itself uses, or leave it out"
    )


def dispose_all(engines: Iterable[AnyEngine]) -> None:
    """Close the idle connections of engines of this process.

    Args:
        engines: The engines; they go on working, with new connections.
    """
    for engine in engines:
        _dispose(engine)


def _dispose(engine: AnyEngine) -> None:
    if isinstance(engine, Engine):
        engine.dispose()
        return
    # Here may be no event loop, or one that runs, so nothing can be awaited: each
    # idle connection is cut instead, which drivers allow outside a greenlet.
    sync_engine = engine.sync_engine
    for entry in _idle_entries(sync_engine.pool):
        entry.invalidate()
    sync_engine.dispose(close=False)


def _idle_entries(pool: Pool) -> list[ConnectionPoolEntry]:
    # A pool does not list its entries in public, and an entry does not name its pool.
    entries = [o for o in gc.get_objects() if isinstance(o, ConnectionPoolEntry)]
    return [
        entry
        for entry in entries
        if getattr(entry, "_ConnectionRecord__pool", None) is pool
        and not entry.in_use
        and entry.dbapi_connection is not None
    ]
