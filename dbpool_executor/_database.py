"""A worker's engine and scoped session, and one job as one transaction.

Runs in a worker, in the thread that runs its jobs.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.pool import ConnectionPoolEntry

from . import _drivers, _resolution
from ._alarm import Alarm, JobInterrupt
from ._boundary import Buffer, dumps_result
from ._commits import CommitWatch
from ._inheritance import live_entries, pool_of, refuse_inherited
from ._options import DEFAULTS, JobOptions
from ._phase import Phase, PhaseRecord
from ._places import asyncio_classes, full_name
from .errors import (
    DBPoolError,
    JobExitedError,
    JobTimeoutError,
    Outcome,
    OutcomeUnknownError,
    OutsideJobError,
    ResolveNotSupportedError,
    ResultLostError,
)

log = logging.getLogger("dbpool_executor")

# `database` is set in a thread for as long as that thread runs a job.
_here = threading.local()


def _running_database(name: str) -> Database:
    database: Database | None = getattr(_here, "database", None)
    if database is None:
        raise OutsideJobError(name)
    return database


def _open_session() -> Session:
    return _running_database("session").open_session()


session: scoped_session[Session] = scoped_session(_open_session)  # type: ignore[arg-type]
"""The running job's session.

Committed when the job returns, rolled back when it raises, removed after every job.
Outside a job it raises :class:`OutsideJobError`.
"""


def current_engine() -> Engine:
    """Give the worker's engine to the running job.

    Connections taken from it are the job's own: it commits and closes them itself.

    Returns:
        The engine that the engine factory made in this worker, with the job's
        isolation level.

    Raises:
        OutsideJobError: No job is running in this thread.
    """
    return _running_database("current_engine()").lend_engine()


class Database:
    """The engine and the sessions of one worker.

    Args:
        engine_factory: Makes the engine; called once, here.
        session_options: Keyword arguments for ``sessionmaker``.
        record: Where the phase of the running job is noted.

    Attributes:
        engine: The worker's engine.
        alarm: The time limit of the running job.

    Raises:
        TypeError: The factory returned something other than an Engine.
        RuntimeError: The factory returned an engine with another process's connections.
        Exception: Whatever the factory raises.
    """

    _is_shared = False  # whether others of this process use the engine as well

    def __init__(
        self,
        engine_factory: Callable[[], Engine],
        session_options: Mapping[str, Any],
        record: PhaseRecord,
    ) -> None:
        engine = engine_factory()
        if isinstance(engine, asyncio_classes("AsyncEngine")):
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
        self._sessions = sessionmaker(**{"bind": engine, **session_options})
        self._record = record
        self.alarm = Alarm(self.cancel_statements)
        self._commits = CommitWatch(
            engine, record, self.alarm, is_shared=self._is_shared
        )
        event.listen(self._sessions, "after_commit", self._commits.after_commit)
        event.listen(engine, "connect", _drivers.note_thread_id)
        if engine.dialect.name == "sqlite":
            event.listen(engine, "checkin", _make_writable)
        self._options = DEFAULTS
        self._job_engine = engine  # with the options of the running job
        # To the running job: a session, and the engine by current_engine().
        self._was_opened = self._was_lent = False

    def run(
        self,
        job: Callable[[], object],
        options: JobOptions = DEFAULTS,
        fn: Callable[..., object] | None = None,
    ) -> list[Buffer]:
        """Run a job as one transaction.

        Args:
            job: The call.
            options: How to run it.
            fn: What it calls, for a warning.

        Returns:
            The pickled result.

        Raises:
            JobTimeoutError: It took longer than its options allow.
            JobExitedError: The job raised what is meant to end a process.
            OutcomeUnknownError: Contact was lost during COMMIT.
            Exception: Whatever the job, the flush or the commit raises.
        """
        self._begin(options)
        try:
            if options.timeout is None:
                return self._run(job)
            with self.alarm.set(options.timeout):
                return self._run(job)
        except JobInterrupt as exc:
            # Its statement may be cancelled a moment too late, and then hit the next
            # job's: the connection is not used again.
            if self._has_session():
                session().invalidate()
            self.engine.dispose()
            error = JobTimeoutError(options.timeout or 0.0)
            raise self._exact(error) from exc.__cause__
        except DBPoolError as exc:
            self._exact(exc)
            raise
        except Exception:
            raise
        except BaseException as exc:
            raise self._exact(JobExitedError(repr(exc))) from exc
        finally:
            self._commits.end_job()
            self._end_session()
            if self._was_lent:
                self._take_back(getattr(fn, "__qualname__", repr(fn)))
            del _here.database

    @property
    def failed_outcome(self) -> Outcome:
        """What is known of a job that has raised, by the commits of its own."""
        return Outcome.UNKNOWN if self._commits.by_the_job else Outcome.ROLLED_BACK

    def may_repeat(self, error: Exception) -> bool:
        """Say whether the job that raised may succeed if it is run again.

        Args:
            error: What :meth:`run` has just raised.
        """
        if isinstance(error, DBPoolError) or self._commits.by_the_job:
            return False
        return _drivers.is_transient(error)

    def cancel_statements(self) -> None:
        """Cancel what runs on the server for this worker; from any thread."""
        for entry in self._entries_in_use():
            _drivers.cancel(self.engine, entry)

    def dispose(self) -> None:
        """Close the engine's connections."""
        self.engine.dispose()

    # -- For the job ------------------------------------------------------------

    def open_session(self) -> Session:
        """Make the job's session."""
        options = self._options
        self._was_opened = True
        if self._job_engine is self.engine and not options.read_only:
            opened: Session = self._sessions()
            return opened
        opened = self._sessions(bind=self._job_engine)
        if options.read_only and self.engine.dialect.name != "postgresql":
            event.listen(opened, "after_begin", _make_read_only)
        return opened

    def lend_engine(self) -> Engine:
        """Give the engine to the job, and note that it may take connections."""
        self._was_lent = True
        return self._job_engine

    # -- One job ------------------------------------------------------------------

    def _begin(self, options: JobOptions) -> None:
        _here.database = self
        self._options = options
        self._was_opened = self._was_lent = False
        self._commits.begin_job()
        self._job_engine = self.engine
        if options is DEFAULTS:
            return
        if options.isolation_level is not None:
            self._job_engine = self._job_engine.execution_options(
                isolation_level=options.isolation_level
            )
        if options.read_only and self.engine.dialect.name == "postgresql":
            self._job_engine = self._job_engine.execution_options(
                postgresql_readonly=True
            )

    def _run(self, job: Callable[[], object]) -> list[Buffer]:
        options = self._options
        if options.resolve and self.engine.dialect.name != "postgresql":
            raise ResolveNotSupportedError(self.engine.dialect.name)
        result = job()
        current = session() if options.commit and self._has_session() else None
        if current is not None:
            current.flush()
        # Pickled before the commit: a job whose result cannot travel must be rolled
        # back, not committed and then reported as failed.
        parts = dumps_result(result)
        self._commits.end_job()
        if current is not None:
            self._commit(current)
        self.alarm.begin_commit()
        if options.commit and not self._commits.by_the_job:
            self._record.advance(Phase.COMMITTED)
        return parts

    def _commit(self, current: Session) -> None:
        xid = None
        # Of more than one transaction no answer would be the whole truth.
        if self._options.resolve and not self._commits.by_the_job:
            xid = _resolution.current_xid(current)
            self._record.note_xid(xid)
        try:
            current.commit()
        except BaseException as exc:
            phase = self._record.read().phase
            if phase is Phase.COMMITTED:
                text = f"a listener to the session's commit raised {exc!r} after it"
                raise ResultLostError(text) from exc
            self._commits.roll_back()
            if not isinstance(exc, DBAPIError):
                raise
            committing = phase is Phase.COMMITTING
            if not (committing and _drivers.leaves_commit_unknown(exc)):
                raise
            if xid is not None:
                outcome = _resolution.outcome_of(self.engine, xid)
                if outcome is Outcome.COMMITTED:
                    return
                if outcome is Outcome.ROLLED_BACK:
                    raise
            raise OutcomeUnknownError("the connection was lost") from exc

    def _exact(self, error: DBPoolError) -> DBPoolError:
        # What the job has committed by itself is not undone.
        if self._commits.by_the_job and error.outcome is Outcome.ROLLED_BACK:
            error.outcome = Outcome.UNKNOWN
        return error

    def _has_session(self) -> bool:
        # Its own session.remove() may have ended what was opened.
        return self._was_opened and session.registry.has()

    def _end_session(self) -> None:
        if not self._has_session():
            return
        try:
            session.remove()
        except Exception:
            # The job's fate is decided by now; the next job gets a new session.
            session.registry.clear()
            log.warning("the session of a job did not close", exc_info=True)

    def _take_back(self, name: str) -> None:
        """Close the connections that a job took and did not give back."""
        for entry in self._entries_in_use():
            text = f"the job {name} left a connection of current_engine() open"
            log.warning("%s; it is closed", text)
            entry.invalidate()
            try:
                warnings.warn(text, ResourceWarning, stacklevel=2)
            except ResourceWarning:  # made an error; the job is over
                log.debug("the warning was not shown", exc_info=True)

    def _entries_in_use(self) -> list[ConnectionPoolEntry]:
        pool = self.engine.pool
        return [e for e in live_entries() if e.in_use and pool_of(e) is pool]


def _make_read_only(_session: Session, _transaction: object, on: Connection) -> None:
    if on.dialect.name == "sqlite":
        on.exec_driver_sql("PRAGMA query_only = 1")
        # It belongs to the connection, and so would reach the next job.
        on.info[_READ_ONLY] = True
    else:
        on.exec_driver_sql("SET TRANSACTION READ ONLY")


def _make_writable(connection: Any, entry: ConnectionPoolEntry) -> None:
    if entry.info.pop(_READ_ONLY, False) and connection is not None:
        connection.execute("PRAGMA query_only = 0")


_READ_ONLY = "dbpool_executor.read_only"
