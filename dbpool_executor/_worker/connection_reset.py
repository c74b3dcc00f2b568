"""Resets the connections that a job has used, before the next job can have them.

Runs in a worker, in the thread that runs its jobs.
"""

from __future__ import annotations

import logging
from typing import Any

from sqlalchemy import Engine, event
from sqlalchemy.pool import ConnectionPoolEntry, SingletonThreadPool, StaticPool

from .._drivers.reset import reset_of

log = logging.getLogger("dbpool_executor")


class ConnectionReset:
    """Knows which connections the running job has used."""

    def __init__(self) -> None:
        self._used: dict[ConnectionPoolEntry, None] = {}

    def watch(self, engine: Engine) -> None:
        """Hear of the connections of an engine.

        Raises:
            ValueError: Its connection is the database.
        """
        if isinstance(engine.pool, (SingletonThreadPool, StaticPool)):
            raise ValueError(  # noqa: TRY004 - its type is right
                f"reset_connections=True would lose what is in {engine!r}: its pool, "
                f"{type(engine.pool).__name__}, keeps the one connection that has the "
                "database; leave it out, or use a database in a file"
            )
        event.listen(engine, "checkout", self._note)

    def _note(self, _: object, entry: ConnectionPoolEntry, _proxy: object) -> None:
        self._used[entry] = None

    def end_job(self) -> None:
        """Reset what the job has used; close what cannot be reset."""
        used, self._used = self._used, {}
        for entry in used:
            connection: Any = entry.dbapi_connection
            if connection is None:  # closed already
                continue
            reset = reset_of(connection)
            try:
                if reset is not None:
                    reset(connection)
            except Exception:
                # The job's fate is decided by now.
                log.debug("a connection is closed that cannot be reset", exc_info=True)
                reset = None
            if reset is None:
                entry.invalidate()
