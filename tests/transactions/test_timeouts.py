"""Time limits, isolation and read-only jobs: what the server sees of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import psutil
import pytest
from sqlalchemy.exc import DBAPIError

import failures
import jobs
import servers
from dbpool_executor import JobTimeoutError, Outcome
from processes import MakeExecutor, worker_pids
from servers import Database
from waiting import LONGEST, Gate, wait_until

Job = Callable[[str], object]

LIMIT = 0.2
"""Seconds; long enough for a job to have written its row, mostly."""

LOCK = "UPDATE item SET amount = 5 WHERE name = 'locked'"

only_postgresql = pytest.mark.parametrize(
    "database", servers.POSTGRESQLS, indirect=True
)
only_servers = pytest.mark.parametrize("database", servers.SERVERS, indirect=True)


def statements(database: Database) -> int:
    """Count the statements that the server works on for jobs, and open transactions."""
    if database.is_sqlite:
        return 0
    if database.is_postgresql:
        sql = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
            "AND backend_type = 'client backend' AND pid <> pg_backend_pid() "
            "AND state <> 'idle'"
        )
    else:
        sql = (
            "SELECT count(*) FROM information_schema.processlist WHERE db = database() "
            "AND id <> connection_id() AND command <> 'Sleep'"
        )
    count: int = database.rows(sql)[0][0]
    return count


@pytest.mark.parametrize(
    "job",
    [
        failures.insert_and_query,
        failures.query_by_core,
        failures.insert_and_loop,
        failures.insert_and_sleep,
        failures.insert_and_go_on,
    ],
)
def test_job_that_takes_too_long_is_cancelled_and_rolled_back(
    database: Database, make_executor: MakeExecutor, job: Job
) -> None:
    """In a statement or in Python; its worker and its server are free again."""
    executor = make_executor(database.make_engine, 1)
    worker = executor.submit(jobs.insert_and_tell_pid, "before").result(LONGEST)
    limited = executor.options(timeout=LIMIT, kill_after=60)
    with pytest.raises(JobTimeoutError, match=r"not done 0\.2 s after") as raised:
        limited.submit(job, "a").result(LONGEST)
    assert (raised.value.timeout, raised.value.outcome) == (LIMIT, Outcome.ROLLED_BACK)
    wait_until(lambda: statements(database) == 0, "the server to be done with it")
    assert executor.submit(jobs.insert_and_tell_pid, "a").result(LONGEST) == worker
    assert database.names() == {"before", "a"}


def test_job_that_waits_for_a_lock_is_cancelled(
    database: Database, make_executor: MakeExecutor
) -> None:
    """The driver is in the middle of a statement, and somebody else holds the lock."""
    executor = make_executor(database.make_engine, 1)
    executor.submit(jobs.insert_item, "locked").result(LONGEST)
    # SQLite does not hear of an interrupt while it waits; the worker is killed.
    grace = 0.3 if database.is_sqlite else 60
    limited = executor.options(timeout=LIMIT, kill_after=grace)
    with database.outside() as connection:
        connection.exec_driver_sql(LOCK)
        job = partial(failures.insert_and_change, other="locked")
        error = limited.submit(job, "a").exception(LONGEST)
    assert isinstance(error, JobTimeoutError)
    assert error.outcome is Outcome.ROLLED_BACK
    assert database.rows("SELECT name, amount FROM item") == [("locked", 5)]
    worker = executor.submit(jobs.pid).result(LONGEST)
    assert limited.submit(job, "b").result(LONGEST) is None
    assert executor.submit(jobs.pid).result(LONGEST) == worker
    assert set(database.rows("SELECT name, amount FROM item")) == {
        ("locked", 6),
        ("b", 0),
    }


@pytest.mark.parametrize("job", [failures.insert_and_hide, failures.insert_and_stop])
def test_worker_that_cannot_be_interrupted_is_killed(
    database: Database, make_executor: MakeExecutor, job: Job
) -> None:
    """After the grace period; the row is gone, and another worker does the rest."""
    executor = make_executor(database.make_engine, 1)
    worker = executor.submit(jobs.pid).result(LONGEST)
    limited = executor.options(timeout=LIMIT, kill_after=0.3)
    future = limited.submit(job, "a")
    waiting = executor.submit(jobs.insert_and_tell_pid, "waiting")
    with pytest.raises(JobTimeoutError) as raised:
        future.result(LONGEST)
    assert raised.value.outcome is Outcome.ROLLED_BACK
    assert waiting.result(LONGEST) != worker
    assert not psutil.pid_exists(worker)
    # The name is free again: the server has ended the transaction.
    executor.submit(jobs.insert_item, "a").result(LONGEST)
    assert database.names() == {"waiting", "a"}
    assert executor.stats().died == 1


def test_time_in_the_queue_does_not_count(
    sqlite_database: Database, make_executor: MakeExecutor, gate: Gate
) -> None:
    """The limit begins with the job, and not when the job is submitted.

    A job waits behind another until one that was submitted later, elsewhere, has used up
    the same limit.
    """
    executor = make_executor(sqlite_database.make_engine, 1)
    elsewhere = make_executor(sqlite_database.make_engine, 1, timeout=2.0)
    elsewhere.submit(jobs.pid).result(LONGEST)
    held = executor.submit(jobs.wait_at_gate, gate.address)
    gate.arrival()
    queued = executor.options(timeout=2.0).submit(jobs.insert_item, "queued")
    late = elsewhere.submit(failures.sleep)
    assert isinstance(late.exception(LONGEST), JobTimeoutError)
    gate.open()
    held.result(LONGEST)
    queued.result(LONGEST)
    assert sqlite_database.names() == {"queued"}


def test_no_cancel_reaches_the_next_job(
    database: Database, make_executor: MakeExecutor
) -> None:
    """Two hundred jobs, each right behind one that ran out of time, on five drivers."""
    executor = make_executor(database.make_engine, 1)
    executor.submit(jobs.insert_item, "locked").result(LONGEST)
    worker = executor.submit(jobs.pid).result(LONGEST)
    rounds = 40
    limited = executor.options(timeout=0.005, kill_after=60)
    job = partial(failures.insert_and_change, other="locked")
    with database.outside() as connection:
        if not database.is_sqlite:  # there it would keep the next jobs from writing
            connection.exec_driver_sql(LOCK)
        slow = failures.insert_and_query if database.is_sqlite else job
        pairs = [
            (
                limited.submit(slow, f"late {i}"),
                executor.submit(jobs.insert_item, f"next {i}"),
            )
            for i in range(rounds)
        ]
        for late, following in pairs:
            assert isinstance(late.exception(LONGEST), JobTimeoutError)
            following.result(LONGEST)
    assert database.names() == {"locked", *(f"next {i}" for i in range(rounds))}
    assert executor.submit(jobs.pid).result(LONGEST) == worker


def test_limit_that_strikes_at_commit_agrees_with_the_database(
    database: Database, make_executor: MakeExecutor
) -> None:
    """Whatever moment the time is up, a row is there exactly if the job returned."""
    executor = make_executor(database.make_engine, 1)
    executor.submit(jobs.insert_item, "warm").result(LONGEST)
    chance = random.Random(7)
    futures = {
        f"item {i}": executor.options(
            timeout=chance.uniform(0.0002, 0.006), kill_after=60
        ).submit(jobs.insert_item, f"item {i}")
        for i in range(60)
    }
    errors = {name: future.exception(LONGEST) for name, future in futures.items()}
    assert {type(error) for error in errors.values()} <= {type(None), JobTimeoutError}
    outcomes = {e.outcome for e in errors.values() if isinstance(e, JobTimeoutError)}
    assert outcomes <= {Outcome.ROLLED_BACK}
    done = {name for name, error in errors.items() if error is None}
    assert database.names() == {"warm", *done}


# -- COMMIT is not cancelled ---------------------------------------------------------


@only_postgresql
def test_commit_under_way_is_waited_for(
    database: Database, make_executor: MakeExecutor
) -> None:
    """The time is up while COMMIT runs: the job is done, a little late."""
    failures.create_delayed(database)
    executor = make_executor(database.make_engine, 1)
    executor.submit(jobs.insert_item, "warm").result(LONGEST)
    limited = executor.options(timeout=0.5, kill_after=60)
    future = limited.submit(failures.insert_delayed, "a", 1.0)
    assert future.result(LONGEST) == "a"
    assert database.names() == {"warm", "a"}


@only_postgresql
def test_commit_that_does_not_end_is_unknown(
    database: Database, make_executor: MakeExecutor
) -> None:
    """The worker is killed after the grace period, and nothing is promised."""
    failures.create_delayed(database)
    executor = make_executor(database.make_engine, 1)
    executor.submit(jobs.insert_item, "warm").result(LONGEST)
    limited = executor.options(timeout=0.5, kill_after=0.2)
    future = limited.submit(failures.insert_delayed, "a", 2.0)
    with pytest.raises(JobTimeoutError) as raised:
        future.result(LONGEST)
    assert raised.value.outcome is Outcome.UNKNOWN
    # Here the server goes on by itself.
    wait_until(lambda: database.names() == {"warm", "a"}, "the COMMIT to end")


@only_postgresql
def test_limit_that_strikes_after_a_commit_of_its_own_promises_nothing(
    database: Database, make_executor: MakeExecutor
) -> None:
    """The first half is there, the second is not."""
    executor = make_executor(database.make_engine, 1)
    limited = executor.options(timeout=LIMIT, kill_after=60)
    with pytest.raises(JobTimeoutError) as raised:
        limited.submit(failures.commit_and_query, "a").result(LONGEST)
    assert raised.value.outcome is Outcome.UNKNOWN
    assert database.names() == {"a"}


# -- isolation_level, read_only ------------------------------------------------------


@only_servers
def test_isolation_level_is_the_jobs_own(
    database: Database, make_executor: MakeExecutor
) -> None:
    """The server confirms it, and the next job on the same connection has the usual."""
    executor = make_executor(database.make_engine, 1)
    usual = executor.submit(failures.isolation).result(LONGEST)
    for level in ("SERIALIZABLE", "READ COMMITTED", "REPEATABLE READ"):
        view = executor.options(isolation_level=level)
        told = view.submit(failures.isolation).result(LONGEST)
        assert told.upper().replace("-", " ") == level
        assert executor.submit(failures.isolation).result(LONGEST) == usual
    assert database.sessions() == 1


def test_isolation_level_that_does_not_exist_fails_the_job_alone(
    database: Database, make_executor: MakeExecutor
) -> None:
    """It is told by SQLAlchemy, and the executor lives on."""
    executor = make_executor(database.make_engine, 1)
    view = executor.options(isolation_level="NO SUCH LEVEL")
    error = view.submit(jobs.insert_item, "a").exception(LONGEST)
    assert "NO SUCH LEVEL" in str(error)
    executor.submit(jobs.insert_item, "b").result(LONGEST)
    assert database.names() == {"b"}


def test_read_only_job_cannot_write(
    database: Database, make_executor: MakeExecutor
) -> None:
    """The database refuses; reading works, and the next job may write again."""
    executor = make_executor(database.make_engine, 1)
    view = executor.options(read_only=True)
    with pytest.raises(DBAPIError, match=r"(?i)read.?only"):
        view.submit(jobs.insert_item, "a").result(LONGEST)
    assert view.submit(jobs.count_items).result(LONGEST) == 0
    executor.submit(jobs.insert_item, "b").result(LONGEST)
    assert view.submit(jobs.count_items).result(LONGEST) == 1
    assert database.names() == {"b"}


def test_options_that_make_no_sense_are_refused(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """At once, and by name."""
    executor = make_executor(sqlite_database.make_engine, 1)
    wrong: list[tuple[dict[str, object], type[Exception], str]] = [
        ({"timeout": 0}, ValueError, "timeout"),
        ({"timeout": -1}, ValueError, "timeout"),
        ({"timeout": float("nan")}, ValueError, "timeout"),
        ({"timeout": "5"}, TypeError, "timeout"),
        ({"timeout": True}, TypeError, "timeout"),
        ({"kill_after": -1}, ValueError, "kill_after"),
        ({"retries": -1}, ValueError, "retries"),
        ({"retries": 1.5}, TypeError, "retries"),
        ({"isolation_level": 3}, TypeError, "isolation_level"),
        ({"read_only": 1}, TypeError, "read_only"),
        ({"commit": False, "retries": 1}, ValueError, "commit=False"),
        ({"commit": False, "resolve": True}, ValueError, "commit=False"),
    ]
    for options, kind, word in wrong:
        with pytest.raises(kind, match=word):
            executor.options(**options)  # type: ignore[arg-type]
    assert worker_pids() == set()
