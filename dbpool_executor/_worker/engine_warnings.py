"""What a worker has to say of its engine, for the parent's log.

Runs in a worker.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from sqlalchemy import Engine, event
from sqlalchemy.pool import QueuePool, StaticPool

from .._drivers.connections import is_in_memory
from .._drivers.errors import is_known
from .._drivers.table import KNOWN
from .._forks.connections import module_level_name

ASK_FOR_LIMIT = {
    "postgresql": "SHOW max_connections",
    "mysql": "SELECT @@max_connections",
    "mariadb": "SELECT @@max_connections",
}
"""How a server is asked how many connections it allows, by SQLAlchemy's dialects."""


def notes_on(engine: Engine) -> list[str]:
    """Say what a worker will see of an engine that may surprise its user.

    Args:
        engine: What the engine factory returned.
    """
    notes = []
    if not is_known(engine):
        notes.append(
            f"the engine factory returns {engine!r}, with a driver that this package "
            f"does not know (it knows {', '.join(KNOWN)}): a COMMIT that fails is of "
            "unknown outcome; retries repeats only what SQLAlchemy calls a lost "
            "connection; an error that a job swallows may have undone more than its "
            "statement; a timeout may leave a statement running on the server; and "
            "connections may not be kept out of forked copies of their process"
        )
    if is_in_memory(engine.url):
        notes.append(
            f"the engine factory returns {engine!r}, a database in memory: each worker "
            "has one of its own, empty at first, that no other process sees"
        )
    elif isinstance(engine.pool, StaticPool):
        notes.append(
            f"the engine factory returns {engine!r} with a StaticPool: session and "
            "current_engine() share one connection in each worker, and so one "
            "transaction"
        )
    if name := module_level_name(engine):
        notes.append(
            f"the engine factory returns {name}, the same engine at each call: what "
            "jobs do with that global, they do with their worker's own engine"
        )
    return notes


def watch_limit(engine: Engine, workers: int, tell: Callable[[str], None]) -> None:
    """Compare what all workers may connect with what the server allows.

    The server is asked once, over the worker's first connection.

    Args:
        engine: The worker's engine.
        workers: How many workers there may be.
        tell: Called with a text if they may be refused.
    """
    ask = ASK_FOR_LIMIT.get(engine.dialect.name)
    pool = engine.pool
    if ask is None or not isinstance(pool, QueuePool):
        return
    wanted = workers * pool.size()

    def compare(connection: Any, _entry: object) -> None:
        with suppress(Exception):  # a wish to know is no reason to fail
            cursor = connection.cursor()
            cursor.execute(ask)
            allowed = int(cursor.fetchone()[0])
            cursor.close()
            connection.rollback()
            if wanted > allowed:
                tell(
                    f"{workers} workers with {pool.size()} connections each may open "
                    f"{wanted}, and the server allows {allowed}: use fewer workers, or "
                    "create_engine(..., pool_size=1, max_overflow=0) in the factory"
                )

    event.listen(engine, "first_connect", compare)
