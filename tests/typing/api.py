"""What a type checker sees of the public surface. Checked by mypy, never run.

A ``type: ignore`` with a code is a test: mypy --strict reports one that is unused.
"""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Executor, Future, as_completed, wait
from typing import assert_type

from sqlalchemy import URL, Engine, create_engine
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session, scoped_session

from dbpool_executor import (
    DBPoolError,
    DBPoolExecutor,
    JobFuture,
    NotPlainError,
    Outcome,
    Stats,
    WorkerDiedError,
    current_engine,
    outcome_of,
    session,
)
from dbpool_executor.testing import InlineExecutor


def make_engine() -> Engine:
    """Make an engine."""
    return create_engine("sqlite://")


def job(number: int, *, scale: float = 1.0) -> str:
    """Do something."""
    return str(number * scale)


def nothing() -> None:
    """Do nothing."""


# -- The constructor ----------------------------------------------------------------


def constructed(url: URL, engine: Engine, async_engine: AsyncEngine) -> None:
    """Everything that may be passed, and what may not."""
    DBPoolExecutor(make_engine)
    DBPoolExecutor("sqlite://")
    DBPoolExecutor(url, 2)
    DBPoolExecutor(make_engine, 2, multiprocessing.get_context("spawn"))
    DBPoolExecutor(make_engine, None, None, print, ("word",))
    DBPoolExecutor(make_engine, max_tasks_per_child=10)
    DBPoolExecutor(make_engine, parent_engine=engine)
    DBPoolExecutor(make_engine, parent_engine=[engine, async_engine])
    DBPoolExecutor(make_engine, session_options={"expire_on_commit": False})
    DBPoolExecutor(make_engine, finalizer=print, finalargs=("word",))
    DBPoolExecutor(make_engine, forward_logs=True)

    DBPoolExecutor()  # type: ignore[call-arg]
    DBPoolExecutor(engine)  # type: ignore[arg-type]
    DBPoolExecutor(nothing)  # type: ignore[arg-type]
    DBPoolExecutor(job)  # type: ignore[arg-type]
    DBPoolExecutor(make_engine, "2")  # type: ignore[arg-type]
    DBPoolExecutor(make_engine, mp_context="spawn")  # type: ignore[arg-type]
    DBPoolExecutor(make_engine, initializer=5)  # type: ignore[arg-type]
    DBPoolExecutor(make_engine, 2, None, None, (), 10)  # type: ignore[call-arg]
    DBPoolExecutor(make_engine, parent_engine="sqlite://")  # type: ignore[arg-type]
    DBPoolExecutor(make_engine, workers=2)  # type: ignore[call-arg]


# -- Submitting --------------------------------------------------------------------


def submitted(executor: DBPoolExecutor) -> None:
    """A job keeps the types of its parameters and of its result."""
    future = executor.submit(job, 1, scale=2.0)
    assert_type(future, JobFuture[str])
    assert_type(future.result(timeout=5), str)
    assert_type(future.outcome, Outcome | None)
    future.outcome = Outcome.COMMITTED  # type: ignore[misc]
    assert_type(executor.submit(nothing), JobFuture[None])
    assert_type(executor.submit(int, "5"), JobFuture[int])

    executor.submit(job)  # type: ignore[call-arg]
    executor.submit(job, "one")  # type: ignore[arg-type]
    executor.submit(job, 1, 2.0)  # type: ignore[call-arg]
    executor.submit(job, 1, timeout=5)  # type: ignore[call-arg]
    executor.submit(fn=job)  # type: ignore[call-arg]
    executor.submit("job")  # type: ignore[arg-type]


def mapped(executor: DBPoolExecutor) -> None:
    """The results of a map have the type of a call's result."""
    assert_type(executor.map(job, [1, 2]), Iterator[str])
    executor.map(job, [1], timeout=5.0, chunksize=10)
    executor.map(job, [1], buffersize=100)

    executor.map(job, 5)  # type: ignore[arg-type]
    executor.map(job, [1], chunksize="2")  # type: ignore[arg-type]
    executor.map(job, [1], buffersize=1.5)  # type: ignore[arg-type]


# -- As an executor ------------------------------------------------------------------


def used_as_any_executor(executor: Executor) -> None:
    """Written for the standard library."""
    executor.submit(nothing)


async def used() -> None:
    """It is an Executor to everything that takes one."""
    with DBPoolExecutor(make_engine) as executor:
        assert_type(executor, DBPoolExecutor)
        used_as_any_executor(executor)
        futures = [executor.submit(job, 1)]
        for future in as_completed(futures):
            assert_type(future, Future[str])
        wait(futures)
        loop = asyncio.get_running_loop()
        assert_type(await loop.run_in_executor(executor, job, 1), str)
        assert_type(await asyncio.wrap_future(futures[0]), str)
    executor.shutdown(wait=False, cancel_futures=True)
    executor.shutdown(False)
    executor.terminate_workers()
    executor.kill_workers()
    executor.start_workers()
    executor.start_workers(wait=True)

    executor.shutdown(True, True)  # type: ignore[call-arg]


def options(executor: DBPoolExecutor) -> None:
    """A view is an executor with options of its own."""
    view = executor.options(commit=False)
    used_as_any_executor(view)
    assert_type(view.submit(job, 1), JobFuture[str])
    view.submit(job, "one")  # type: ignore[arg-type]
    view.map(job, [1], buffersize=10)
    view.options(timeout=5.0, isolation_level="SERIALIZABLE")
    view.start_workers(wait=True)
    view.kill_workers()
    assert_type(view.stats(), Stats)

    executor.options(False)  # type: ignore[call-arg]
    executor.options(comit=False)  # type: ignore[call-arg]
    executor.options(timeout="5")  # type: ignore[arg-type]


def in_a_unit_test(engine: Engine) -> None:
    """The executor for tests stands in for the real one."""
    executor = InlineExecutor(lambda: engine, session_options={"bind": engine})
    used_as_any_executor(executor)
    stands_in: DBPoolExecutor = executor
    assert_type(stands_in.submit(job, 1), JobFuture[str])


# -- Inside a job ----------------------------------------------------------------------


def inside_a_job() -> None:
    """The session is a session."""
    assert_type(session, scoped_session[Session])
    assert_type(session(), Session)
    assert_type(current_engine(), Engine)
    session.add(object())
    session.no_such_method()  # type: ignore[attr-defined]


# -- Errors ------------------------------------------------------------------------


def told(error: DBPoolError) -> str:
    """The attributes of errors have types."""
    assert_type(outcome_of(error), Outcome | None)
    assert_type(outcome_of(KeyError()), Outcome | None)
    assert_type(error.outcome, Outcome | None)
    if isinstance(error, NotPlainError):
        assert_type(error.place, str)
        assert_type(error.outcome, Outcome)
    if isinstance(error, WorkerDiedError):
        assert_type(error.exitcode, int | None)
        assert_type(error.pid, int | None)
    match error.outcome:
        case Outcome.ROLLED_BACK | Outcome.NEVER_STARTED:
            return "again"
        case Outcome.COMMITTED:
            return "done"
        case Outcome.UNKNOWN | None:
            return "look"
