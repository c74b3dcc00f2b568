"""An executor for unit tests: the same contract, without a process.

Runs in the parent. What a worker does with a job is done in the caller's thread, by the
worker's own functions, and the parent's do the rest::

    submit() --Call--> _InlineDispatcher --Job--> _run() --> Database.run()
       |                   |                                     |
       +------ Job <-------+-------Message(RESULT or FAILURE)----+
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from multiprocessing.context import BaseContext
from typing import Any, NoReturn

from sqlalchemy import URL, Connection, Engine, event
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry

from ._api.arguments import (
    check_ledger,
    check_pickles,
    check_start_limits,
    factory_of,
)
from ._api.executor import DBPoolExecutor
from ._dispatch.dispatcher import Dispatcher
from ._dispatch.job import Job, read
from ._drivers.errors import is_aborted
from ._forks.connections import live_entries
from ._forks.pools import pool_of
from ._launch.quiesce import AnyEngine, _is_its_pool
from ._ledger.ledger import Ledger
from ._wire.calls import Buffer, Call, Label, Name, dumps_calls, loads_calls
from ._wire.channel import Kind, Message
from ._wire.exceptions import REPEAT, advice_of, dumps_exception
from ._wire.options import DEFAULTS, JobOptions
from ._wire.phase import WORDS, PhaseRecord
from ._worker import main as worker
from ._worker.once import Once
from ._worker.sessions import SessionOptions
from ._worker.transaction import NO_KEYWORDS, Database, here
from .errors import DBPoolError, TransactionAbortedError

__all__ = ["InlineExecutor"]


class InlineExecutor(DBPoolExecutor):
    """Runs jobs like a :class:`DBPoolExecutor`, but in this process: for unit tests.

    A job runs in the thread that calls ``submit()``, and the future is done when that
    returns; ``map()`` has run all that it may before it returns. Several threads take
    turns. All else is as in a worker: the call, the result and the exception are checked
    and pickled and unpickled, each job is one transaction, ``session`` and
    ``current_engine()`` are there inside it and nowhere else, and a failed job tells its
    outcome.

    What needs a process is not the same. Timeouts are checked and otherwise ignored;
    retries come at once, without back-off; a job that ends its process ends the test
    run, and Ctrl-C during a job fails that job with a JobExitedError. What jobs leave in
    globals stays. A job may not use the executor that runs it.

    Args:
        engine_factory: A callable without arguments that gives an Engine, called at the
            first job. It need not pickle, so it may return the test's own engine:
            ``lambda: engine``. Or a URL, which stands for ``create_engine(url)``. At
            shutdown the engine's idle connections are closed, as in a worker; not if
            they may be the database itself, as with ``StaticPool`` or ``:memory:``,
            unless it was made here from a URL.
        max_workers: Ignored; this and the next are taken so that the class can stand in
            for DBPoolExecutor.
        mp_context: Ignored.
        initializer: Called here before the first job, as a transaction of its own.
        initargs: Its positional arguments.
        max_tasks_per_child: Ignored.
        parent_engine: Ignored; no engine is disposed for it.
        session_options: Keyword arguments for ``sessionmaker``, or a callable of the
            engine that returns them. Unlike in a worker,
            ``bind`` may be a Connection of the test that is in a transaction; with
            ``join_transaction_mode="create_savepoint"`` the jobs' transactions are
            savepoints of it, and ``isolation_level`` and ``read_only`` are ignored.
            What jobs do through ``current_engine()`` is not a part of it.
        finalizer: Called at shutdown, as a transaction of its own, if any job was
            submitted.
        finalargs: Its positional arguments.
        forward_logs: Ignored; jobs log in this process.
        reset_connections: Ignored; the connections may be the test's own.
        ledger: Where the keys of jobs are kept; its table must be there.
        start_timeout: Ignored, once it is checked.
        connect_patience: Ignored, once it is checked.
        timeout: Ignored, once it is checked.
        retries: Default for the jobs' ``retries``, see :meth:`options`.

    Raises:
        TypeError: An argument is of the wrong kind, or the initializer or its arguments
            could not be sent to a worker.
        ValueError: A number is out of range, or the URL names an asynchronous driver.
        sqlalchemy.exc.ArgumentError: The URL cannot be parsed.
    """

    def __init__(
        self,
        engine_factory: Callable[[], Engine] | str | URL,
        max_workers: int | None = None,  # noqa: ARG002
        mp_context: BaseContext | None = None,  # noqa: ARG002
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        *,
        max_tasks_per_child: int | None = None,  # noqa: ARG002
        parent_engine: AnyEngine | Iterable[AnyEngine] | None = None,  # noqa: ARG002
        session_options: SessionOptions | None = None,
        finalizer: Callable[..., object] | None = None,
        finalargs: tuple[Any, ...] = (),
        forward_logs: bool = False,  # noqa: ARG002
        reset_connections: bool = False,  # noqa: ARG002
        ledger: Ledger | None = None,
        start_timeout: float | None = 60.0,
        connect_patience: float = 300.0,
        timeout: float | None = None,
        retries: int = 0,
    ) -> None:
        check_start_limits(start_timeout, connect_patience)
        is_ours = isinstance(engine_factory, (str, URL))
        if isinstance(engine_factory, (str, URL)) or not callable(engine_factory):
            engine_factory = factory_of(engine_factory)
        for name, call in (("initializer", initializer), ("finalizer", finalizer)):
            if call is not None and not callable(call):
                raise TypeError(f"{name} must be a callable")
        check_pickles("initializer", initializer)
        check_pickles("initargs", tuple(initargs))
        check_pickles("finalizer", finalizer)
        check_pickles("finalargs", tuple(finalargs))
        self._options = DEFAULTS.with_(timeout=timeout, retries=retries)
        self._max_workers = 1
        self._ledger = check_ledger(ledger)
        self._dispatcher = _InlineDispatcher(
            partial(_InlineDatabase, engine_factory, session_options or {}, ledger),
            None if initializer is None else partial(initializer, *initargs),
            None if finalizer is None else partial(finalizer, *finalargs),
            is_ours=is_ours,
        )
        weakref.finalize(self, self._dispatcher.close).atexit = False


class _InlineDispatcher(Dispatcher):
    """Runs each job at once, and has neither a thread nor workers.

    Args:
        make_database: Called at the first job.
        initializer: A job that comes before the first; None if there is none.
        finalizer: One that comes after the last.
        is_ours: Whether nobody else uses the engine.
    """

    def __init__(
        self,
        make_database: Callable[[], _InlineDatabase],
        initializer: Callable[[], object] | None,
        finalizer: Callable[[], object] | None,
        *,
        is_ours: bool,
    ) -> None:
        super().__init__(_never, _never, 1, None, forks=False)
        self._make_database = make_database
        self._initializer = initializer
        self._finalizer = finalizer
        self._is_ours = is_ours
        self._database: _InlineDatabase | None = None  # until the first job

    def add(
        self,
        name: Name | Label | None,
        call: Call,
        options: JobOptions,
        keys: str | tuple[str, ...] | None = None,
    ) -> Job:
        self.check_owner()
        job = Job(name, call, options)
        job.keys = keys
        with self._lock:
            self.check_open()
            self._start()
            told = self._run_job(job)
        # Outside the lock: callbacks may wait for another thread that submits.
        (result,), errors = read([job], [told])
        with self._lock:
            self._done += not errors
            self._failed += len(errors)
        job.end(result, errors.get(job))
        return job

    def check_owner(self) -> None:
        super().check_owner()
        if here.database is not None:
            raise RuntimeError(
                "an InlineExecutor was used inside a job, which would mix two "
                "transactions; submit from outside, or call the function itself"
            )

    def start_workers(self, *, wait: bool) -> None:  # noqa: ARG002 - it is done here
        self.check_owner()
        with self._lock:
            self.check_open()
            self._start()
            self.check_open()

    def shutdown(self, *, cancel: bool, spare: bool = False) -> None:
        self.check_owner()
        with self._lock:
            if self._database is not None and self._finalizer is not None:
                note = self._workers.take_note
                worker._finalize(self._database, self._finalizer, note)
            super().shutdown(cancel=cancel, spare=spare)

    def _start(self) -> None:
        starts = self._workers.starts
        while self._database is None and starts.failure is None:
            try:
                self._database = self._made_database()
            except (Exception, SystemExit) as exc:
                text = f"{type(exc).__name__}: {exc}"
                parts = dumps_exception(exc)
                starts.note_failure(text, parts, may_pass=False, able=0)

    def _made_database(self) -> _InlineDatabase:
        database = self._make_database()
        try:
            if self._initializer is not None:
                database.run(worker._call_only, (self._initializer,))
        except BaseException:
            self._dispose(database)
            raise
        return database

    def _run_job(self, job: Job) -> Message | DBPoolError:
        if self._database is None:
            assert self._workers.failure is not None  # noqa: S101 - or it has started
            return self._workers.failure.error()
        options = self._database.adapted(job.options)
        name = job.name if isinstance(job.name, tuple) else None
        ((fn, (call,)),) = loads_calls(dumps_calls([(name, [job.call])]))
        while True:
            if job.keys is not None:
                self._database.keys = job.keys
            told = Message(*worker._run(self._database, fn, call, options))
            if (once := self._database.once) is not None:
                self._skipped += once.skipped
                once.skipped = 0
            if told.kind is not Kind.FAILURE:
                return told
            job.attempts += 1
            if advice_of(told.parts) != REPEAT or job.attempts > options.retries:
                return told
            self._retried += 1

    def _free(self) -> None:
        super()._free()
        database, self._database = self._database, None
        if database is not None:
            self._dispose(database)

    def _dispose(self, database: _InlineDatabase) -> None:
        if self._is_ours:
            database.dispose()
        elif not _is_its_pool(database.engine):
            database.close_idle()


class _InlineDatabase(Database):
    """An engine that others of this process may use as well.

    Args:
        engine_factory: Gives it.
        session_options: Keyword arguments for ``sessionmaker``, or a callable.
        ledger: The executor's, if it has one.
    """

    _is_shared = True

    def __init__(
        self,
        engine_factory: Callable[[], Engine],
        session_options: SessionOptions,
        ledger: Ledger | None,
    ) -> None:
        record = PhaseRecord([0] * WORDS)
        super().__init__(partial(_view_of, engine_factory), session_options, record)
        self.once = None if ledger is None else Once(ledger)
        self._is_joined = isinstance(self.sessions.maker.kw["bind"], Connection)
        if self._is_joined:
            event.listen(self.sessions.maker, "before_commit", self._before_commit)

    def close_idle(self) -> None:
        """Close the connections that nobody uses.

        Not dispose(): what the test has checked out would go back to a pool that its
        engine no longer has, and nobody would ever close it.
        """
        pool = self.engine.pool
        for entry in live_entries():
            if pool_of(entry) is pool and not entry.in_use:
                entry.invalidate()

    def adapted(self, options: JobOptions) -> JobOptions:
        """Give the options that can be kept here."""
        if self._is_joined:
            options = options._replace(isolation_level=None, read_only=False)
        return options._replace(timeout=None)

    def run(
        self,
        fn: Callable[..., object],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] = NO_KEYWORDS,
        options: JobOptions = DEFAULTS,
    ) -> list[Buffer]:
        self._record.begin(1)
        # What the test has checked out is not the job's to close.
        self._of_others = weakref.WeakSet(super()._entries_in_use())
        here.database = self
        try:
            return super().run(fn, args, kwargs, options)
        finally:
            here.database = None

    def _entries_in_use(self) -> list[ConnectionPoolEntry]:
        return [e for e in super()._entries_in_use() if e not in self._of_others]

    def _before_commit(self, session: Session) -> None:
        # What CommitWatch does before a COMMIT; of a savepoint's end it does not hear.
        if session.in_nested_transaction():
            return
        if is_aborted(session.connection().connection.dbapi_connection):
            raise TransactionAbortedError("a database error aborted the transaction")
        self._commits.by_the_job |= not self._commits.is_ending


def _view_of(engine_factory: Callable[[], Engine]) -> Engine:
    # With a view's own listeners: what the test does with its engine is not watched.
    engine = engine_factory()
    return engine.execution_options() if isinstance(engine, Engine) else engine


def _never() -> NoReturn:
    raise AssertionError("an InlineExecutor has no workers")
