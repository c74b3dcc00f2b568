"""Every future and every exception of one tells the outcome, whichever way it comes."""

from __future__ import annotations

import asyncio
import pickle
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy.exc import IntegrityError

import jobs
import outcome_jobs
import servers
from dbpool_executor import (
    DBPoolExecutor,
    JobFuture,
    Outcome,
    outcome_of,
)
from dbpool_executor._wire.exceptions import note_outcome
from dbpool_executor.testing import InlineExecutor
from processes import MakeExecutor
from servers import Database
from waiting import LONGEST, Gate

BACK, NEVER = Outcome.ROLLED_BACK, Outcome.NEVER_STARTED
DONE, UNKNOWN = Outcome.COMMITTED, Outcome.UNKNOWN


KINDS: list[tuple[Callable[..., object], tuple[object, ...], Outcome]] = [
    *((outcome_jobs.insert_and_raise, (kind,), BACK) for kind in outcome_jobs.ERRORS),
    (outcome_jobs.insert_twice, (), BACK),
    (outcome_jobs.insert_commit_and_raise, (), UNKNOWN),
    (outcome_jobs.stop, (), BACK),
]


# -- Ways -------------------------------------------------------------------------------


def by_submit(
    executor: DBPoolExecutor, fn: Callable[..., object], *args: object
) -> BaseException | None:
    """Ask the future."""
    future = executor.submit(fn, *args)
    error = future.exception(LONGEST)
    assert error is None or future.outcome is outcome_of(error)
    return error


def by_map(
    executor: DBPoolExecutor, fn: Callable[..., object], *args: object
) -> BaseException | None:
    """Take the results of a map."""
    try:
        list(executor.map(fn, *([arg] for arg in args), timeout=LONGEST))
    except Exception as exc:
        return exc
    return None


def by_chunk(
    executor: DBPoolExecutor, fn: Callable[..., object], *args: object
) -> BaseException | None:
    """Take the results of a map of chunks."""
    calls = executor.map(fn, *([arg] for arg in args), timeout=LONGEST, chunksize=2)
    try:
        list(calls)
    except Exception as exc:
        return exc
    return None


def by_asyncio(
    executor: DBPoolExecutor, fn: Callable[..., object], *args: object
) -> BaseException | None:
    """Await the wrapped future."""

    async def ask() -> object:
        return await asyncio.wait_for(
            asyncio.wrap_future(executor.submit(fn, *args)), LONGEST
        )

    return error_of(ask)


def by_run_in_executor(
    executor: DBPoolExecutor, fn: Callable[..., object], *args: object
) -> BaseException | None:
    """Have an event loop submit it."""

    async def ask() -> object:
        loop = asyncio.get_running_loop()
        return await asyncio.wait_for(
            loop.run_in_executor(executor, fn, *args), LONGEST
        )

    return error_of(ask)


def error_of(ask: Callable[[], Any]) -> BaseException | None:
    """Give what a coroutine raises."""
    try:
        asyncio.run(ask())
    except Exception as exc:
        return exc
    return None


WAYS = [by_submit, by_map, by_chunk, by_asyncio, by_run_in_executor]


@pytest.fixture(params=["processes", "inline"])
def executor(
    request: pytest.FixtureRequest,
    make_executor: MakeExecutor,
    database: Database,
) -> Iterator[DBPoolExecutor]:
    """One of each sort, which give the same."""
    if request.param == "processes":
        yield make_executor(database.make_engine, 1)
    else:
        with InlineExecutor(database.make_engine) as inline:
            yield inline


FIRST_OF_EACH = [
    "sqlite",
    "postgresql-psycopg",
    "postgresql-psycopg2",
    "mariadb-pymysql",
]


@pytest.mark.parametrize("database", FIRST_OF_EACH, indirect=True)
def test_exception_tells_the_outcome_whichever_way_it_comes(
    executor: DBPoolExecutor, database: Database
) -> None:
    """The database agrees; and one note names the job, above all else."""
    for number, (fn, args, outcome) in enumerate(KINDS):
        for way in WAYS:
            name = f"{number} {way.__name__}"
            error = way(executor, fn, name, *args)
            assert error is not None
            assert outcome_of(error) is outcome, (fn, way)
            text = "".join(traceback.format_exception(error))
            assert text.count(f"job outcome_jobs.{fn.__name__}: {outcome.value}") == 1
            assert (name in database.names()) is (outcome is UNKNOWN)


@pytest.mark.parametrize("database", FIRST_OF_EACH, indirect=True)
def test_exception_tells_the_outcome_after_it_was_pickled(
    executor: DBPoolExecutor, database: Database
) -> None:
    """A database's error keeps its code as well; what did pickle before does."""
    error = executor.submit(outcome_jobs.insert_twice, "a").exception(LONGEST)
    assert isinstance(error, IntegrityError)
    twin = pickle.loads(pickle.dumps(error))
    assert outcome_of(twin) is outcome_of(error) is BACK
    for name in ("pgcode", "sqlstate", "sqlite_errorcode"):
        code = getattr(error.orig, name, None)
        if hasattr(type(error.orig), name):
            assert code is not None
            assert getattr(twin.orig, name, None) == code
    assert database.names() == set()
    for kind in ("plain", "slotted", "falsy", "group", "outside"):
        error = executor.submit(outcome_jobs.insert_and_raise, "a", kind).exception(
            LONGEST
        )
        assert outcome_of(pickle.loads(pickle.dumps(error))) is BACK
    error = executor.submit(outcome_jobs.insert_and_raise, "a", "guarded").exception(
        LONGEST
    )
    assert type(pickle.loads(pickle.dumps(error))) is outcome_jobs.GuardedError


@pytest.mark.parametrize("database", FIRST_OF_EACH, indirect=True)
def test_job_that_returns_is_committed_unless_it_was_to_commit_by_itself(
    executor: DBPoolExecutor, database: Database
) -> None:
    """Then it is only where each transaction of its own was seen to be."""
    own = executor.options(commit=False)
    autocommit = executor.options(isolation_level="AUTOCOMMIT")
    rows: list[tuple[JobFuture[Any], Outcome]] = [
        (executor.submit(jobs.insert_item, "a"), DONE),
        (executor.submit(outcome_jobs.insert_and_roll_back, "b"), DONE),
        (executor.submit(outcome_jobs.insert_and_commit, "c", more=True), DONE),
        (executor.submit(outcome_jobs.commit_with_engine, "d"), DONE),
        (own.submit(outcome_jobs.insert_and_commit, "e"), DONE),
        (own.submit(outcome_jobs.insert_and_commit, "f", more=True), UNKNOWN),
        (own.submit(outcome_jobs.insert_and_roll_back, "g"), UNKNOWN),
        (own.submit(jobs.insert_item, "h"), UNKNOWN),
        (own.submit(outcome_jobs.commit_with_engine, "i"), DONE),
        (autocommit.submit(jobs.insert_item, "j"), DONE),
        (autocommit.submit(outcome_jobs.insert_and_roll_back, "k"), UNKNOWN),
        (executor.submit(jobs.insert_item, "l"), DONE),
    ]
    for future, _ in rows:
        future.result(LONGEST)
    assert [future.outcome for future, _ in rows] == [outcome for _, outcome in rows]
    assert set("acdefijl") <= database.names()
    assert not set("bgh") & database.names()


def test_future_tells_nothing_until_it_is_done(
    sqlite_database: Database, make_executor: MakeExecutor, gate: Gate
) -> None:
    """And a cancelled one that its job was never started."""
    executor = make_executor(sqlite_database.make_engine, 1)
    running = executor.submit(jobs.wait_at_gate, gate.address)
    gate.arrival()
    waiting = executor.options(timeout=LONGEST).submit(jobs.pid)
    assert running.outcome is waiting.outcome is None
    assert "jobs.wait_at_gate" in repr(running)
    assert "state=running" in repr(running)
    assert waiting.cancel()
    assert waiting.outcome is NEVER
    assert "state=cancelled" in repr(waiting)
    gate.open()
    running.result(LONGEST)
    assert running.outcome is DONE
    assert "outcome='committed'" in repr(running)
    failed = executor.submit(outcome_jobs.insert_and_raise, "a", "plain")
    failed.exception(LONGEST)
    for word in ("insert_and_raise", "raised ValueError", "outcome='rolled back'"):
        assert word in repr(failed)


@pytest.mark.parametrize("database", servers.DATABASES, indirect=True)
def test_constraint_that_is_violated_at_commit_is_rolled_back(
    database: Database, make_executor: MakeExecutor
) -> None:
    """What a future raises for it is the database's own error."""
    executor = make_executor(database.make_engine, 1)
    future = executor.submit(outcome_jobs.insert_twice, "a")
    assert isinstance(future.exception(LONGEST), IntegrityError)
    assert future.outcome is BACK


def test_call_that_cannot_be_sent_was_never_started(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """It has the name of its function all the same."""
    executor = make_executor(sqlite_database.make_engine, 1)
    future = executor.submit(jobs.give, threading.Lock())
    error = future.exception(LONGEST)
    assert error is not None
    assert future.outcome is outcome_of(error) is NEVER
    assert "job jobs.give: never started" in error.__notes__


def test_exception_that_ended_no_job_has_no_outcome() -> None:
    """Neither the caller's own nor what is raised from one that has."""
    error = KeyError("a")
    assert outcome_of(error) is None
    note_outcome(error, BACK, "job a: rolled back")
    other = ValueError()
    other.__cause__ = error
    assert outcome_of(other) is None


def test_note_is_added_once_to_an_error() -> None:
    """It may be raised for more than one job."""
    error = KeyError("a")
    for _ in range(2):
        note_outcome(error, BACK, "job a: rolled back")
    assert error.__notes__ == ["job a: rolled back"]
    note_outcome(error, DONE, "job b: committed")
    assert outcome_of(error) is DONE
