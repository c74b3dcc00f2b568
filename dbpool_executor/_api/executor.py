"""The executor as its user sees it.

Runs in the parent. The way of a job::

    submit() --Call--> Dispatcher --Message(JOBS)--> worker: main() --> Database.run()
       |                   |                                                |
       +------ Job <-------+-------Message(RESULT or FAILURE)---------------+

The caller's thread packs the call into a job, which is the future that it gets, and
queues it, or sends it by itself to a worker that the dispatcher offers. The dispatcher,
one thread for each executor, sends what is queued over the private channels of the
workers and settles the jobs with what comes back. The worker runs each as one
transaction.
"""

from __future__ import annotations

import itertools
import signal
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, Executor
from functools import partial
from multiprocessing.context import BaseContext
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

from sqlalchemy import URL, Engine

from .._dispatch.dispatcher import Dispatcher
from .._dispatch.future import JobFuture
from .._dispatch.job import failed_job
from .._dispatch.stats import Stats
from .._launch.handle import KILL
from .._launch.local import LocalWorker
from .._launch.quiesce import AnyEngine, engines_of, prepare
from .._ledger.ledger import Ledger
from .._wire.calls import pack_call, pack_short
from .._wire.environment import Environment
from .._wire.locate import name_of
from .._wire.logs import levels_set
from .._wire.options import DEFAULTS, JobOptions
from .._worker import ledger_jobs
from .._worker.main import WorkerSetup, run_chunk
from .._worker.sessions import SessionOptions
from .arguments import (
    check_context,
    check_count,
    check_ledger,
    check_pickles,
    check_reachable,
    check_session_options,
    check_start_limits,
    default_context,
    default_max_workers,
    factory_of,
)
from .keyed import Key, Keys, parts, results_of
from .map_results import ChunkResults, Results

P = ParamSpec("P")
T = TypeVar("T")

_LOOK_RETRIES = 5
INTERRUPT_GRACE = 5.0
"""Seconds that running transactions get to end after a Ctrl-C."""


class _JobExecutor(Executor):
    """What an executor and its views have in common."""

    _dispatcher: Dispatcher
    _options: JobOptions
    _max_workers: int  # other libraries ask for it, as of ProcessPoolExecutor's
    _keys: Keys | None = None

    def submit(
        self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> JobFuture[T]:
        """Schedule a job: one call, run in a worker as one transaction.

        Args:
            fn: A function that the worker can import.
            *args: Plain values for it.
            **kwargs: Plain values for it; none of them is taken by the executor.

        Returns:
            A future. Its result is there once the transaction is committed; its
            ``outcome``, and :func:`outcome_of` what it raises, say what happened to the
            transaction. A call that does not pickle fails there too.

        Raises:
            RuntimeError: The executor was shut down, or this is a forked copy of the
                process that made it.
            WorkerStartError: Workers cannot start; the executor is broken.
        """
        return _submit(self._dispatcher, self._options, fn, args, kwargs)

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[T]:
        """Run a call for each set of arguments and give the results in order.

        Args:
            fn: A function that the worker can import.
            *iterables: As for the builtin ``map``.
            timeout: Seconds from now until every result must be there; None for no
                bound.
            chunksize: How many calls make one job, and so one transaction: all of the
                chunk is committed or none of it. Larger chunks write faster.
            buffersize: How many jobs may be submitted whose results were not yet
                taken; None submits everything at once. With it, the iterables may be
                endless.

        Returns:
            An iterator. Closing it cancels what has not started. It does not keep the
            executor alive: once that is forgotten, nothing more is submitted, and after
            the results of what was comes a RuntimeError.

        Raises:
            TypeError: ``buffersize`` is not an integer.
            ValueError: ``chunksize`` or ``buffersize`` is below 1.
            RuntimeError: As for :meth:`submit`.
            TimeoutError: From the iterator: a result was not there in time.
            Exception: From the iterator: whatever a call raised.
        """
        deadline = self._check_map(timeout, chunksize, buffersize)
        calls = zip(*iterables, strict=False)
        # Not of the executor: whoever has forgotten it may keep the results.
        submit = partial(_submit, self._dispatcher, self._options)
        if chunksize == 1:
            jobs = (submit(fn, args, {}) for args in calls)
            return Results(jobs, buffersize, deadline)
        chunks = iter(lambda: tuple(itertools.islice(calls, chunksize)), ())
        jobs = (submit(run_chunk, (fn, chunk), {}) for chunk in chunks)
        return ChunkResults(Results(jobs, buffersize, deadline))

    def _check_map(
        self, timeout: float | None, chunksize: int, buffersize: int | None
    ) -> float | None:
        self._dispatcher.check_owner()
        if chunksize < 1:
            raise ValueError(f"chunksize must be >= 1, not {chunksize}")
        if buffersize is not None:
            check_count("buffersize", buffersize)
        return None if timeout is None else time.monotonic() + timeout

    def options(
        self,
        *,
        commit: bool | None = None,
        timeout: float | None = None,
        kill_after: float | None = None,
        retries: int | None = None,
        isolation_level: str | None = None,
        read_only: bool | None = None,
        resolve: bool | None = None,
        key: Key | None = None,
    ) -> _JobExecutor:
        """Give a view on the same workers whose jobs run with other options.

        Args:
            commit: Whether the worker commits when a job returns; True by default. If
                not, the job commits for itself, and what it leaves uncommitted is
                rolled back.
            timeout: Seconds from the start of a job after which its statement is
                cancelled on the server, and the job interrupted and rolled back; no
                limit by default. A COMMIT under way is not cancelled.
            kill_after: Seconds after that until the worker is killed, if it is still
                at the job; 5 by default.
            retries: How often a job is repeated that is known to be rolled back for a
                transient reason: serialization failure, deadlock, lock timeout, lost
                connection, dead worker; 0 by default. The last error tells in
                ``attempts`` how often it was tried.
            isolation_level: Of the job's session and ``current_engine()``, as for
                SQLAlchemy's ``execution_options``; the engine's own by default.
            read_only: Whether the database refuses to let the job's session write;
                False by default. PostgreSQL, MySQL, MariaDB and SQLite.
            resolve: Whether the server is asked what became of a COMMIT that contact
                was lost in; False by default, since it costs a round trip before each
                COMMIT. PostgreSQL only.
            key: For executors with a ``ledger``: a string for one job, or a callable
                that is called with the arguments of each, in the thread that submits it,
                and gives one. The effect of a job happens once for each key; a job whose
                key is in the ledger is not run, and its result is the stored one. By
                default jobs have no key.

        Returns:
            An executor. Options that are not given are as here; to shut it down is to
            shut down this one.

        Raises:
            TypeError: A value is of the wrong kind.
            ValueError: A number is out of range, or two options exclude each other.
            RuntimeError: This is a forked copy of the process that made the executor.
        """
        self._dispatcher.check_owner()
        options = self._options.with_(
            commit=commit,
            timeout=timeout,
            kill_after=kill_after,
            retries=retries,
            isolation_level=isolation_level,
            read_only=read_only,
            resolve=resolve,
            keyed=None if key is None else True,
        )
        owner, keys = self._owner(), self._keys if key is None else Keys(key)
        if keys is None:
            return _View(owner, options)
        if owner._ledger is None:
            raise ValueError(
                "options(key=...) was given, and the executor has no ledger to keep the "
                "key in; make it with DBPoolExecutor(..., ledger=Ledger(name))"
            )
        return _KeyedView(owner, options, keys)

    def start_workers(self, *, wait: bool = False) -> None:
        """Start all workers now, ahead of the first job.

        A program that is about to answer requests does not have the first ones wait for
        processes, engines and initializers.

        Args:
            wait: Whether to return only when all of them are ready; False by default.

        Raises:
            WorkerStartError: Workers cannot start; the executor is broken.
            OpenConnectionsError: They are to be forked, and this process has connections
                in use.
            RuntimeError: The executor was shut down, or this is a forked copy of the
                process that made it.
        """
        self._dispatcher.start_workers(wait=wait)

    def terminate_workers(self) -> None:
        """End all workers with SIGTERM, now, and cancel the jobs that wait.

        A job that is running ends with what its transaction came to, as for any worker
        that dies. Afterwards the executor is shut down.
        """
        self._dispatcher.stop_workers(signal.SIGTERM, "terminate_workers() was called")

    def kill_workers(self) -> None:
        """Do as :meth:`terminate_workers` does, with SIGKILL."""
        self._dispatcher.stop_workers(KILL, "kill_workers() was called")

    def stats(self) -> Stats:
        """Count workers and jobs.

        Returns:
            A snapshot; it does not change with the executor.
        """
        self._dispatcher.check_owner()
        return self._dispatcher.stats()

    def _owner(self) -> DBPoolExecutor:
        raise NotImplementedError


class DBPoolExecutor(_JobExecutor):
    """Runs jobs that use a database in worker processes, each as one transaction.

    Args:
        engine_factory: A callable without arguments that makes an Engine, called once
            in each worker; it must pickle. Or a URL, which stands for
            ``create_engine(url)``.
        max_workers: Upper bound on worker processes; the number of processors by
            default. Each opens its own connections, so the server must allow
            ``max_workers`` times the pool size of one engine.
        mp_context: Gives the start method, such as
            ``multiprocessing.get_context("spawn")``. By default forkserver, or spawn
            where there is no forkserver or the program has chosen spawn. Fork must be
            asked for.
        initializer: Called in each worker, as a transaction of its own, after its
            engine and session exist and before its first job.
        initargs: Its positional arguments.
        max_tasks_per_child: Jobs after which a worker is replaced by a new one; by
            default it lives as long as the executor.
        parent_engine: An Engine or AsyncEngine that this process itself uses, or
            several; its idle connections are closed before the first worker starts.
        session_options: Keyword arguments for the ``sessionmaker`` of each worker. Or
            a callable that is called in each worker, with its engine, and returns them:
            it may make engines for ``binds``, which are disposed with the worker's own.
        finalizer: Called in each worker, as a transaction of its own, after its last
            job and before its engine is disposed. Not in a worker that is killed.
        finalargs: Its positional arguments.
        forward_logs: Whether log records of workers, and their warnings, go to the
            handlers of this process instead of the workers' own, at the levels that
            are set here now; False by default. Records of a job are handled before
            its future is done. The handlers are called in the executor's own thread,
            so they must not wait for a job.
        reset_connections: Whether what a job leaves on a connection, such as a
            search_path, an advisory lock or a temporary table, is gone before the next
            job; False by default. With psycopg and psycopg2 by ``DISCARD ALL``, which
            costs a round trip for each job, and undoes as well what a "connect"
            listener has set: give that in the URL. With others the connection is
            closed, and the next job opens one.
        ledger: Where the keys of jobs are kept, see ``options(key=...)``; its table must
            be there. None if no job has one.
        start_timeout: Seconds for each stage of a worker's start, which are its imports,
            the engine factory and the initializer; 60 by default, None for no bound.
            After them the worker is killed, and has failed to start.
        connect_patience: Seconds for which starts that fail are tried again, and jobs
            wait, while the reason is one that may pass, such as a database that is down
            or restarts; 300 by default. A driver may not tell it from a wrong password.
            For any other reason three failures in a row break the executor, as they do
            for all with 0; but not while it has a worker that is ready.
        timeout: Default for the jobs' ``timeout``, see :meth:`options`.
        retries: Default for the jobs' ``retries``, see :meth:`options`.

    Workers see the environment variables, the working directory and ``sys.path`` that
    this process has when it makes the executor, whatever it changes later.

    Raises:
        TypeError: An argument is of the wrong kind, or cannot be sent to a worker.
        FileNotFoundError: The working directory is gone.
        ValueError: A number is below 1, or the URL names an asynchronous driver.
        sqlalchemy.exc.ArgumentError: The URL cannot be parsed.
    """

    def __init__(
        self,
        engine_factory: Callable[[], Engine] | str | URL,
        max_workers: int | None = None,
        mp_context: BaseContext | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        *,
        max_tasks_per_child: int | None = None,
        parent_engine: AnyEngine | Iterable[AnyEngine] | None = None,
        session_options: SessionOptions | None = None,
        finalizer: Callable[..., object] | None = None,
        finalargs: tuple[Any, ...] = (),
        forward_logs: bool = False,
        reset_connections: bool = False,
        ledger: Ledger | None = None,
        start_timeout: float | None = 60.0,
        connect_patience: float = 300.0,
        timeout: float | None = None,
        retries: int = 0,
    ) -> None:
        factory = factory_of(engine_factory)
        if max_workers is None:
            max_workers = default_max_workers()
        check_count("max_workers", max_workers)
        if max_tasks_per_child is not None:
            check_count("max_tasks_per_child", max_tasks_per_child)
        for name, call in (("initializer", initializer), ("finalizer", finalizer)):
            if call is not None and not callable(call):
                raise TypeError(f"{name} must be a callable")
        context = default_context() if mp_context is None else check_context(mp_context)
        start_method = context.get_start_method()
        forks = start_method == "fork"
        sessions = check_session_options(session_options)
        if not forks:
            check_reachable("engine_factory", factory)
            for name, value in (
                ("session_options", sessions),
                ("initializer", initializer),
                ("initargs", tuple(initargs)),
                ("finalizer", finalizer),
                ("finalargs", tuple(finalargs)),
            ):
                check_pickles(name, value)
                check_reachable(name, value)
        setup = WorkerSetup(
            factory,
            sessions,
            None if initializer is None else partial(initializer, *initargs),
            None if finalizer is None else partial(finalizer, *finalargs),
            max_workers,
            levels_set() if forward_logs else None,
            reset_connections,
            check_ledger(ledger),
        )
        self._ledger = ledger
        self._options = DEFAULTS.with_(timeout=timeout, retries=retries)
        self._max_workers = max_workers
        self._dispatcher = Dispatcher(
            partial(LocalWorker, context, setup, Environment()),
            partial(prepare, engines_of(parent_engine), forks=forks),
            max_workers,
            max_tasks_per_child,
            forks=forks,
            limits=check_start_limits(start_timeout, connect_patience),
        )
        # Not __del__: the dispatcher outlives a forgotten executor until its jobs are
        # done, and knows nothing of it.
        weakref.finalize(self, self._dispatcher.close).atexit = False

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more jobs, and end the workers when those taken are done.

        Args:
            wait: Whether to return only when every worker has ended.
            cancel_futures: Whether to cancel the jobs that have not started. Those that
                wait only for the start of their worker count as started, for as long as
                that takes no more than five seconds from now.
        """
        self._dispatcher.shutdown(cancel=cancel_futures, spare=True)
        if wait:
            self._dispatcher.join()

    def _owner(self) -> DBPoolExecutor:
        return self

    def __enter__(self) -> Self:
        self._dispatcher.check_owner()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc_type is not None and self._dispatcher.is_copy():
            return  # what ends the copy says more than that it is one
        if exc_type is not None and _is_forced(exc_type):
            self._interrupt(exc_type)
            return
        try:
            self.shutdown(wait=True)
        except BaseException as exc:
            if _is_forced(type(exc)):
                self._interrupt(type(exc))
            raise

    def _interrupt(self, by: type[BaseException]) -> None:
        """Cancel what waits, give running transactions a while to end, then kill."""
        try:
            self._dispatcher.shutdown(cancel=True)
            self._dispatcher.join(INTERRUPT_GRACE)
        finally:  # also at a second Ctrl-C, which may come at any of these steps
            why = f"the with block was left by {by.__name__}"
            if issubclass(by, KeyboardInterrupt):
                why = "the program was interrupted (Ctrl-C)"
            self._dispatcher.stop_workers(KILL, why)
            self._dispatcher.join()

    def __repr__(self) -> str:
        counts = self._dispatcher.stats()._asdict().items()
        return (
            f"<{type(self).__name__} {self._dispatcher.health()}, "
            f"max_workers={self._max_workers}, "
            f"{', '.join(f'{name}={count}' for name, count in counts if count)}>"
        ).replace(", >", ">")


def _is_forced(cls: type[BaseException]) -> bool:
    """Say whether an exception means that the program is not to wait for its jobs."""
    # Those of asyncio are no Exceptions; those of concurrent.futures are.
    return not issubclass(cls, Exception) or issubclass(cls, CancelledError)


def _submit(
    dispatcher: Dispatcher,
    options: JobOptions,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    keys: str | tuple[str, ...] | None = None,
) -> JobFuture[Any]:
    # Not in the block: what a signal's handler raises is no fault of the call.
    packed = pack_short(fn, args, kwargs)
    if packed is None:
        try:
            packed = pack_call(fn, args, kwargs)
        except Exception as exc:
            dispatcher.check_owner()
            dispatcher.check_open()
            return failed_job(name_of(fn, args), exc)
    return dispatcher.add(*packed, options, keys)


class _View(_JobExecutor):
    """The workers of an executor, with other options for the jobs."""

    def __init__(self, executor: DBPoolExecutor, options: JobOptions) -> None:
        self._executor = executor  # as long as a view lives, so does its executor
        self._dispatcher = executor._dispatcher
        self._max_workers = executor._max_workers
        self._options = options

    def _owner(self) -> DBPoolExecutor:
        return self._executor

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Shut down the executor itself."""
        self._executor.shutdown(wait, cancel_futures=cancel_futures)

    def __repr__(self) -> str:
        return f"<{self._options!r} on {self._executor!r}>"


class _KeyedView(_View):
    """A view whose jobs have keys in the executor's ledger."""

    def __init__(
        self, executor: DBPoolExecutor, options: JobOptions, keys: Keys
    ) -> None:
        super().__init__(executor, options)
        self._keys: Keys = keys

    def submit(
        self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> JobFuture[T]:
        key = self._keys.of(args, kwargs)
        return _submit(self._dispatcher, self._options, fn, args, kwargs, key)

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[T]:
        deadline = self._check_map(timeout, chunksize, buffersize)
        ledger = self._executor._ledger
        assert ledger is not None  # noqa: S101 - or there would be no such view
        dispatcher = self._dispatcher  # and not this view, which holds the executor
        submit = partial(_submit, dispatcher, self._options)
        # What only reads is repeated whatever the job's own options say.
        looking = self._options._replace(keyed=False, retries=_LOOK_RETRIES)

        def look_up(keys: list[str]) -> Mapping[str, Any]:
            future = _submit(dispatcher, looking, ledger_jobs.look_up, (keys,), {})
            left = None if deadline is None else deadline - time.monotonic()
            found = results_of(future.result(left), ledger, fn)
            dispatcher.note_looked_up(len(found))
            return found

        def submit_chunk(
            chunk: tuple[Any, ...], keys: tuple[str, ...]
        ) -> JobFuture[Any]:
            return submit(run_chunk, (fn, chunk), {}, keys)

        calls = zip(*iterables, strict=False)
        jobs: Any = parts(
            calls, self._keys, chunksize, buffersize, look_up, submit_chunk
        )
        return ChunkResults(Results(jobs, buffersize, deadline))
