"""A worker's engine and scoped session, and one job as one transaction.

Runs in a worker, in the thread that runs its jobs.
"""

from __future__ import annotations

import logging
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.orm import Session, scoped_session
from sqlalchemy.pool import ConnectionPoolEntry, Pool
from sqlalchemy.pool.base import _ConnectionFairy
from sqlalchemy.util import ScopedRegistry

from .._drivers import cancel
from .._drivers import errors as drivers
from .._forks import process_id
from .._forks.connections import (
    give_back,
    live_entries,
    refuse_inherited,
)
from .._forks.pools import pool_of
from .._wire.calls import Buffer, dumps_result
from .._wire.locate import asyncio_classes, full_name
from .._wire.options import DEFAULTS, JobOptions
from .._wire.phase import Phase, PhaseRecord
from ..errors import (
    DBPoolError,
    JobExitedError,
    JobTimeoutError,
    KeyReusedError,
    LedgerError,
    Outcome,
    OutcomeUnknownError,
    OutsideJobError,
    ResolveNotSupportedError,
    ResultLostError,
    WorkLostError,
)
from . import lookup
from .commit_watch import CommitWatch
from .connection_reset import ConnectionReset
from .engine_hooks import WhileHere, call_for_new_engines, hook, listen
from .hard_exit import leave
from .sessions import SessionOptions, Sessions
from .statement_cache import bound_statement_cache
from .timeout import Alarm, JobInterrupt
from .traits import traits_of

if TYPE_CHECKING:
    from .once import Once

log = logging.getLogger("dbpool_executor")

_COMMITTED = Phase.COMMITTED  # to look up a member takes as long as a call

NO_KEYWORDS: Mapping[str, Any] = {}


class _Here(threading.local):
    """What runs in a thread."""

    database: Database | None = None  # whose jobs run in it


here = _Here()


def _running_database(name: str) -> Database:
    database = here.database
    if database is None or not database.is_running:
        raise OutsideJobError(name)
    return database


def _open_session() -> Session:
    return _running_database("session").sessions.open()


class _JobRegistry(ScopedRegistry[Session]):
    """Where `session` finds the session of the running job: its Database has it."""

    __slots__ = ()

    def __init__(self) -> None:
        pass

    def __call__(self) -> Session:
        database = here.database
        if database is None or not database.is_running:
            raise OutsideJobError("session")
        if database.session is None:
            database.session = database.sessions.open()
        return database.session

    def has(self) -> bool:
        return here.database is not None and here.database.session is not None

    def set(self, obj: Session) -> None:
        _running_database("session").session = obj

    def clear(self) -> None:
        if here.database is not None:
            here.database.session = None


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


session.registry = _JobRegistry()


class Database:
    """The engine and the sessions of one worker.

    Args:
        engine_factory: Makes the engine; called once, here.
        session_options: Keyword arguments for ``sessionmaker``, or what gives them for
            an engine.
        record: Where the phase of the running job is noted.
        resets_connections: Whether connections are as good as new for the next job.

    Attributes:
        engine: The worker's engine.
        alarm: The time limit of the running job.
        sessions: Gives each job its session.
        session: Of the running job; None if it has none.
        is_committed: Whether what the last job that returned has written is known to be
            committed.
        was_interrupted: Whether a job was, since garbage was collected last.
        once: Runs the jobs that have keys; None without a ledger.
        keys: The key of the next job that has one, or those of a chunk's calls.
        asks_ledger: Whether the ledger knows what became of the last job, which raised.

    Raises:
        TypeError: The factory returned something other than an Engine.
        RuntimeError: The factory returned an engine with another process's connections.
        Exception: Whatever the factory raises.
    """

    _is_shared = False  # whether others of this process use the engine as well

    def __init__(
        self,
        engine_factory: Callable[[], Engine],
        session_options: SessionOptions,
        record: PhaseRecord,
        *,
        resets_connections: bool = False,
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
        if not self._is_shared:
            bound_statement_cache(engine)
        self.engine = engine
        self._reset = ConnectionReset() if resets_connections else None
        if self._reset is not None:
            self._reset.watch(engine)
        self._record = record
        self.alarm = Alarm(self.cancel_statements)
        # Of other databases that the sessions use as well.
        self._other_engines: weakref.WeakSet[Engine] = weakref.WeakSet()
        commits = self._commits = CommitWatch(record, self.alarm, self._watch_other)
        self.sessions = Sessions(engine, session_options, commits.before_close)
        self.session: Session | None = None
        if self._is_shared:
            listen(commits, engine)
        else:
            commits.note_watched(engine.dialect)
            hook(commits, engine)
            event.listen(engine, "handle_error", drivers.give_up_lost)
        # Of a COMMIT that was found to be rolled back, until it is known if it is repeated.
        self._resolved: BaseException | None = None
        event.listen(engine, "connect", cancel.note_session)
        for name in ("after_begin", "after_commit", "after_rollback"):
            event.listen(self.sessions.maker, name, getattr(commits, name))
        if not self._is_shared:
            for other in self.sessions.other_engines():
                self._watch_engine(other)
            here_alone = WhileHere(commits, lambda: here.database is self)
            call_for_new_engines(partial(self._watch_engine, watch=here_alone))
        self.is_running = False  # a job
        self.is_committed = True
        self._pid = os.getpid()
        self._options = DEFAULTS  # of the running job, or the last one
        self._job_engine = engine  # with its options
        self._was_lent = False  # to the running job, by current_engine()
        self.once: Once | None = None
        self.keys: str | tuple[str, ...] = ()
        self.asks_ledger = False
        self.was_interrupted = False  # since garbage was collected

    def run(
        self,
        fn: Callable[..., object],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] = NO_KEYWORDS,
        options: JobOptions = DEFAULTS,
    ) -> list[Buffer]:
        """Run a job as one transaction.

        Args:
            fn: What it calls.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            options: How to run it.

        Returns:
            The pickled result.

        Raises:
            JobTimeoutError: It took longer than its options allow.
            JobExitedError: The job raised what is meant to end a process.
            OutcomeUnknownError: Contact was lost during COMMIT.
            Exception: Whatever the job, the flush or the commit raises.
        """
        if options is not self._options:
            self._adopt(options)
        if self._commits.is_used:
            self._commits.begin_job()
            self.is_committed = True
        self.is_running = True
        try:
            if options.timeout is None:
                return self._run(fn, args, kwargs)
            with self.alarm.set(options.timeout):
                return self._run(fn, args, kwargs)
        except JobInterrupt as exc:
            # Its statement may be cancelled a moment too late, and then hit the next
            # job's: the connection is not used again.
            self._drop_connections()
            self.was_interrupted = True
            self._commits.give_up()
            cause = exc.__cause__
            done = cancel.what_was_done(cause, has_cancelled=self.alarm.has_cancelled)
            error = JobTimeoutError(options.timeout or 0.0, done=done)
            raise self._exact(error) from cause
        except DBPoolError as exc:
            self._commits.ask()
            self._exact(exc)
            raise
        except Exception:
            self._commits.ask()
            raise
        except BaseException as exc:
            self._commits.ask()
            raise self._exact(JobExitedError(repr(exc))) from exc
        finally:
            if self.session is not None or self._was_lent:
                self._end(fn)
            self.is_running = False

    @property
    def failed_outcome(self) -> Outcome:
        """What is known of a job that has raised, by the commits of its own."""
        return (
            Outcome.UNKNOWN if self._commits.may_have_committed else Outcome.ROLLED_BACK
        )

    def may_repeat(self, error: Exception) -> bool:
        """Say whether the job that raised may succeed if it is run again.

        Args:
            error: What :meth:`run` has just raised.
        """
        resolved, self._resolved = self._resolved, None
        if isinstance(error, DBPoolError) or self._commits.may_have_committed:
            return False
        return error is resolved or drivers.is_transient(error)

    def cancel_statements(self) -> bool:
        """Cancel what runs on the server for this worker; from any thread.

        Returns:
            Whether there is nothing that could not be cancelled.
        """
        told = [cancel.cancel(self.engine, entry) for entry in self._entries_in_use()]
        told += [
            cancel.cancel(engine, entry)
            for engine in list(self._other_engines)
            for entry in _in_use(engine.pool)
        ]
        return all(told)

    def dispose(self) -> None:
        """Close the connections of all engines."""
        for engine in self._engines():
            engine.dispose()

    # -- For the job ------------------------------------------------------------

    def lend_engine(self) -> Engine:
        """Give the engine to the job, and note that it may take connections."""
        self._was_lent = True
        return self._job_engine

    # -- One job ------------------------------------------------------------------

    def _adopt(self, options: JobOptions) -> None:
        engine, read_only = self.engine, options.read_only
        if options.isolation_level is not None:
            engine = engine.execution_options(isolation_level=options.isolation_level)
        if read_only and engine.dialect.name == "postgresql":
            engine = engine.execution_options(postgresql_readonly=True)
            read_only = False  # it is said by the engine
        self._options = options
        self._job_engine = engine
        self.sessions.adopt(engine, read_only=read_only)

    def _run(
        self,
        fn: Callable[..., object],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> list[Buffer]:
        options = self._options
        if options.resolve and self.engine.dialect.name != "postgresql":
            raise ResolveNotSupportedError(self.engine.dialect.name)
        try:
            if options.keyed:
                result = self._run_once(fn, args, kwargs)
            else:
                result = fn(*args, **kwargs) if kwargs else fn(*args)
        except DBPoolError as exc:
            # Perhaps from a future of another executor: its job is not this one.
            is_claim = options.keyed and not self._commits.has_claim
            if not (is_claim and isinstance(exc, (LedgerError, KeyReusedError))):
                exc.outcome = Outcome.ROLLED_BACK
            raise
        finally:
            if self._pid != (process_id.known_pid or os.getpid()):
                _end_copy(fn)
        current = self.session if options.commit else None
        if options.commit and self._commits.has_lost_work(current):
            raise WorkLostError
        if current is not None:
            current.flush()
        # Pickled before the commit: a job whose result cannot travel must be rolled
        # back, not committed and then reported as failed.
        parts = dumps_result(result)
        if current is not None:
            self._commits.end_job()
            self._commit(current)
            if self._commits.autocommits:
                self.is_committed = self._commits.committed_all
            return parts
        if options.timeout is not None:
            self.alarm.begin_commit()
        if options.commit and not self._commits.may_have_committed:
            self._record.advance(_COMMITTED)
        elif not options.commit:
            self._commits.is_used = True
            self.is_committed = self._has_committed_all()
        return parts

    def _has_committed_all(self) -> bool:
        if self.session is not None and self.session.in_transaction():
            return False
        if self._was_lent and not self._commits.has_begun:
            return False  # what a driver's own connection did was not seen
        return self._commits.committed_all

    def _run_once(
        self,
        fn: Callable[..., object],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> object:
        assert self.once is not None  # noqa: S101 - or the job would have no key
        if self.session is None:
            self.session = self.sessions.open()
        return self.once.run(self.session, self.keys, fn, args, kwargs, self._commits)

    def _commit(self, current: Session) -> None:
        noted = None
        # Of more than one transaction no answer would be the whole truth.
        if self._options.resolve and not self._commits.may_have_committed:
            noted = lookup.current_transaction(current)
            if self._commits.has_several:
                noted = None
            else:
                self._record.note_xid(*noted)
        # What it holds is not asked for again.
        expires, current.expire_on_commit = current.expire_on_commit, False
        try:
            current.commit()
            current.expire_on_commit = expires
        except BaseException as exc:
            phase = self._record.read().phase
            if phase is Phase.COMMITTED:
                text = f"a listener to the session's commit raised {exc!r} after it"
                raise ResultLostError(text) from exc
            if self._commits.roll_back():
                self._commits.by_the_job = True
                text = "one of its databases refused it, and another did not"
                if self._commits.is_left_prepared:
                    text = "it was prepared, and the second phase failed"
                    self._drop_connections()  # no other transaction can begin there
                if isinstance(exc, Exception):
                    raise OutcomeUnknownError(text) from exc
            # Ours are raised before it is sent.
            is_ours = isinstance(exc, (DBPoolError, JobInterrupt))
            committing = phase is Phase.COMMITTING and not is_ours
            if not (committing and drivers.leaves_commit_unknown(exc)):
                raise
            if noted is not None:
                outcome = lookup.outcome_of(self.engine, noted)
                if outcome is Outcome.COMMITTED:
                    return
                if outcome is Outcome.ROLLED_BACK:
                    self._resolved = exc if self._options.retries else None
                    raise
            # A claim that the job may have committed by itself proves nothing.
            self.asks_ledger = (
                self._options.keyed and not self._commits.may_have_committed
            )
            how = "the connection was lost"
            if not getattr(exc, "connection_invalidated", False):
                how = f"COMMIT failed with {full_name(type(exc))}"
            raise OutcomeUnknownError(how) from exc

    def _exact(self, error: DBPoolError) -> DBPoolError:
        # What the job has committed by itself is not undone.
        if self._commits.may_have_committed and error.outcome is Outcome.ROLLED_BACK:
            error.outcome = Outcome.UNKNOWN
        return error

    def _end(self, fn: Callable[..., object]) -> None:
        self._commits.end_job()
        if self.session is not None:
            try:
                self.sessions.end(self.session)
            finally:
                self.session = None  # also one that a listener has opened
        if self._was_lent:
            self._was_lent = False
            self._take_back(getattr(fn, "__qualname__", repr(fn)))
        if self._reset is not None:
            self._reset.end_job()

    def _drop_connections(self) -> None:
        if self.session is not None:
            self.session.invalidate()
        self.dispose()

    def _take_back(self, name: str) -> None:
        """Close the connections that a job took and did not give back."""
        for entry in self._entries_in_use():
            text = f"the job {name} left a connection of current_engine() open"
            log.warning("%s; it is closed", text)
            give_back(entry)
            try:
                warnings.warn(text, ResourceWarning, stacklevel=2)
            except ResourceWarning:  # made an error; the job is over
                log.debug("the warning was not shown", exc_info=True)

    def _entries_in_use(self) -> list[ConnectionPoolEntry]:
        return _in_use(self.engine.pool)

    # -- Other databases ----------------------------------------------------------

    def _engines(self) -> list[Engine]:
        return [self.engine, *self._other_engines]

    def _watch_engine(self, engine: Engine, watch: WhileHere | None = None) -> None:
        refuse_inherited(engine)
        # What is not a view of another one lives as long as its connections do.
        self._other_engines.add(getattr(engine, "_proxied", engine))
        if self._commits.note_watched(engine.dialect):
            return
        hook(watch or self._commits, engine)
        event.listen(engine, "handle_error", drivers.give_up_lost)
        event.listen(engine, "connect", cancel.note_session)
        if self._reset is not None and watch is None:
            self._reset.watch(engine)

    def _watch_other(self, connection: Connection) -> None:
        """Watch the engine of a connection by which a session reaches another database.

        What was heard of all others has not been heard of this one.
        """
        engine, fairy = connection.engine, connection._dbapi_connection
        if self._is_shared:
            if engine.pool is not self.engine.pool:
                listen(self._commits, connection)
            return
        self._watch_engine(engine)
        connection.__class__ = engine._connection_cls
        if isinstance(fairy, _ConnectionFairy) and fairy._connection_record is not None:
            self._commits.before_begin(fairy, traits_of(engine.dialect))
            cancel.note_session(fairy.dbapi_connection, fairy._connection_record)


def _in_use(pool: Pool) -> list[ConnectionPoolEntry]:
    return [e for e in live_entries() if e.in_use and pool_of(e) is pool]


def _end_copy(fn: Callable[..., object]) -> None:
    # The job has forked. Only one of the two may commit and answer.
    log.warning(
        "the job %s came back in a forked copy of its worker, which ends here; "
        "end such a copy with os._exit()",
        getattr(fn, "__qualname__", fn),
    )
    leave()
