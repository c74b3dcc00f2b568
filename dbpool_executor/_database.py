"""A worker's engine and scoped session, and one job as one transaction.

Runs in a worker, in the thread that runs its jobs.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy import URL, Connection, Engine, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.pool import StaticPool

from ._boundary import Buffer, dumps_result
from ._inheritance import module_level_name, refuse_inherited
from ._phase import Phase, PhaseRecord
from ._places import full_name
from .errors import (
    JobExitedError,
    OutcomeUnknownError,
    OutsideJobError,
    TransactionAbortedError,
)

log = logging.getLogger("dbpool_executor")

# `database` is set in a thread for as long as that thread runs a job.
_here = threading.local()

_IN_ERROR = 3  # PQTRANS_INERROR of libpq, the same in psycopg and psycopg2


def _running_database(name: str) -> Database:
    database: Database | None = getattr(_here, "database", None)
    if database is None:
        raise OutsideJobError(name)
    return database


def _open_session() -> Session:
    opened: Session = _running_database("session").sessions()
    return opened


session: scoped_session[Session] = scoped_session(_open_session)  # type: ignore[arg-type]
"""The running job's session.

Committed when the job returns, rolled back when it raises, removed after every job.
Outside a job it raises :class:`OutsideJobError`.
"""


def current_engine() -> Engine:
    """Give the worker's engine to the running job.

    Connections taken from it are the job's own: it commits and closes them itself.

    Returns:
        The engine that the engine factory made in this worker.

    Raises:
        OutsideJobError: No job is running in this thread.
    """
    return _running_database("current_engine()").engine


def notes_on(engine: Engine) -> list[str]:
    """Say what a worker will see of an engine that may surprise its user.

    Args:
        engine: What the engine factory returned.

    Returns:
        Texts for the parent's log.
    """
    notes = []
    if _is_in_memory(engine.url):
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


def _is_in_memory(url: URL) -> bool:
    # sqlite.org/inmemorydb.html
    if url.get_backend_name() != "sqlite":
        return False
    return not url.database or ":memory:" in url.database or "mode=memory" in str(url)


class Database:
    """The engine and the sessions of one worker.

    Args:
        engine_factory: Makes the engine; called once, here.
        session_options: Keyword arguments for ``sessionmaker``.
        record: Where the phase of the running job is noted.

    Raises:
        TypeError: The factory returned something other than an Engine.
        Exception: Whatever the factory raises.
    """

    def __init__(
        self,
        engine_factory: Callable[[], Engine],
        session_options: Mapping[str, Any],
        record: PhaseRecord,
    ) -> None:
        engine = engine_factory()
        if isinstance(engine, AsyncEngine):
            raise TypeError(
                "the engine factory returned an AsyncEngine, but a job runs without an "
                "event loop; return create_engine(...) with a synchronous driver"
            )
        if not isinstance(engine, Engine):
            raise TypeError(
                f"the engine factory returned a {full_name(type(engine))}; it must "
                "return what sqlalchemy.create_engine() returns"
            )
        refuse_inherited(engine)
        self.engine = engine
        self.sessions = sessionmaker(**{"bind": engine, **session_options})
        self._record = record
        self._tells_aborted = engine.dialect.driver in ("psycopg", "psycopg2")
        for name in ("commit", "prepare_twophase", "commit_twophase"):
            event.listen(engine, name, self._before_commit)

    def run(self, job: Callable[[], object], *, commit: bool = True) -> list[Buffer]:
        """Run a job as one transaction.

        Args:
            job: The call.
            commit: Whether to commit when it returns; otherwise it commits for itself,
                and what it left uncommitted is rolled back.

        Returns:
            The pickled result.

        Raises:
            JobExitedError: The job raised what is meant to end a process.
            OutcomeUnknownError: The connection was lost during COMMIT.
            Exception: Whatever the job, the flush or the commit raises.
        """
        _here.database = self
        try:
            result = job()
            commits = commit and session.registry.has()
            if commits:
                session.flush()
            # Pickled before the commit: a job whose result cannot travel must be
            # rolled back, not committed and then reported as failed.
            parts = dumps_result(result)
            if commits:
                self._commit()
            if commit:
                self._record.advance(Phase.COMMITTED)
        except Exception:
            raise
        except BaseException as exc:
            raise JobExitedError(repr(exc)) from exc
        else:
            return parts
        finally:
            self._end_session()
            del _here.database

    def dispose(self) -> None:
        """Close the engine's connections."""
        self.engine.dispose()

    def _commit(self) -> None:
        try:
            session.commit()
        except DBAPIError as exc:
            # The same error comes whether the connection broke before or after the
            # server had the COMMIT.
            committing = self._record.read().phase is Phase.COMMITTING
            if exc.connection_invalidated and committing:
                raise OutcomeUnknownError("the connection was lost") from exc
            raise

    def _before_commit(self, connection: Connection, *_twophase: object) -> None:
        if self._tells_aborted:
            driver_connection = connection.connection.driver_connection
            if driver_connection.info.transaction_status == _IN_ERROR:  # type: ignore[union-attr]
                raise TransactionAbortedError
        self._record.advance(Phase.COMMITTING)

    def _end_session(self) -> None:
        if not session.registry.has():
            return
        try:
            session.remove()
        except Exception:
            # The job's fate is decided by now; the next job gets a new session.
            session.registry.clear()
            log.warning("the session of a job did not close", exc_info=True)
