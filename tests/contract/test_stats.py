"""What can be seen of an executor: counts, ``repr``, log records and warnings."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import psutil
import pytest

import failures
import faults
import jobs
import servers
from dbpool_executor import JobTimeoutError, OutcomeUnknownError, WorkerDiedError
from processes import MakeExecutor
from servers import Database
from waiting import LONGEST, Gate, wait_until

LOGGER = "dbpool_executor"

only_servers = pytest.mark.parametrize("database", servers.SERVERS, indirect=True)


def texts(caplog: pytest.LogCaptureFixture) -> str:
    """Give all that was logged by this package."""
    return "\n".join(r.getMessage() for r in caplog.records if r.name == LOGGER)


# -- stats(), repr() -----------------------------------------------------------------


def test_stats_tell_what_is_going_on(
    sqlite_database: Database, make_executor: MakeExecutor, gate: Gate
) -> None:
    """Workers and jobs, before, during and after."""
    executor = make_executor(sqlite_database.make_engine, 2)
    assert set(executor.stats()) == {0}
    futures = [executor.submit(jobs.wait_at_gate, gate.address) for _ in range(5)]
    pids = [gate.arrival(), gate.arrival()]
    wait_until(lambda: executor.stats().queued == 3, "three jobs to wait")
    during = executor.stats()
    assert (during.workers, during.idle, during.running) == (2, 0, 2)
    assert (during.done, during.failed) == (0, 0)
    for _ in range(3):
        gate.open(pids.pop(0))
        pids.append(gate.arrival())
    gate.open()
    for future in futures:
        future.result(LONGEST)
    wait_until(lambda: executor.stats().done == 5, "the last job to be counted")
    after = executor.stats()
    assert (after.workers, after.idle, after.queued, after.running) == (2, 2, 0, 0)
    assert (during.done, during.running) == (0, 2)


def test_stats_are_a_snapshot_that_cannot_be_changed(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """Its fields are those that the documentation names."""
    stats = make_executor(sqlite_database.make_engine, 1).stats()
    assert stats._fields == (
        "workers",
        "idle",
        "queued",
        "running",
        "done",
        "failed",
        "retried",
        "died",
        "replaced",
        "stored",
    )
    with pytest.raises(AttributeError):
        stats.done = 5  # type: ignore[misc]


def test_deaths_retries_and_failures_are_counted(
    sqlite_database: Database, make_executor: MakeExecutor, tmp_path: Path
) -> None:
    """A job that kills its worker, one that is tried again, one that raises."""
    executor = make_executor(sqlite_database.make_engine, 1)
    assert executor.submit(faults.insert_and_die, "a").exception(LONGEST)
    lost = failures.lost_connection()
    view = executor.options(retries=1)
    view.submit(failures.raise_at_first, tmp_path / "r", "b", lost).result(LONGEST)
    assert executor.submit(jobs.give_up).exception(LONGEST)
    wait_until(lambda: executor.stats().failed == 2, "the last job to be counted")
    stats = executor.stats()
    assert (stats.done, stats.failed, stats.retried) == (1, 2, 1)
    assert (stats.died, stats.replaced, stats.workers) == (1, 1, 1)


def test_repr_is_honest(
    sqlite_database: Database, make_executor: MakeExecutor, tmp_path: Path
) -> None:
    """It tells the state and the counts, those that are not zero."""
    executor = make_executor(sqlite_database.make_engine, 3)
    assert repr(executor) == "<DBPoolExecutor open, max_workers=3>"
    executor.submit(jobs.add, 1, 2).result(LONGEST)
    wait_until(lambda: "done=1" in repr(executor), "the job to be counted")
    assert repr(executor) == (
        "<DBPoolExecutor open, max_workers=3, workers=1, idle=1, done=1>"
    )
    assert repr(executor) in repr(executor.options(timeout=5))
    executor.shutdown()
    assert repr(executor) == "<DBPoolExecutor shut down, max_workers=3, done=1>"
    broken = make_executor(partial(faults.engine_that_fails, tmp_path / "r"), 1)
    assert broken.submit(jobs.pid).exception(LONGEST)
    assert "broken" in repr(broken)


# -- The log -------------------------------------------------------------------------


def test_every_event_of_a_worker_is_logged(
    sqlite_database: Database,
    make_executor: MakeExecutor,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Start, death with a job and without, replacement, timeout, retry, unknown."""
    caplog.set_level(logging.DEBUG, LOGGER)
    executor = make_executor(sqlite_database.make_engine, 1)
    first = executor.submit(jobs.pid).result(LONGEST)
    assert f"worker {first} was started" in texts(caplog)
    assert f"worker {first} is ready" in texts(caplog)

    dying = executor.submit(faults.insert_and_die, "a")
    assert isinstance(dying.exception(LONGEST), WorkerDiedError)
    assert f"worker {first} was killed by SIGKILL" in texts(caplog)
    assert "it ran job faults.insert_and_die: rolled back" in texts(caplog)
    second = executor.submit(jobs.pid).result(LONGEST)
    assert f"worker {second} replaces one that has ended" in texts(caplog)

    psutil.Process(second).kill()
    wait_until(lambda: "while it was idle" in texts(caplog), "its death to be logged")

    limited = executor.options(timeout=0.1)
    late = limited.submit(failures.insert_and_sleep, "b")
    assert isinstance(late.exception(LONGEST), JobTimeoutError)
    assert "the job was not done 0.1 s after its start" in texts(caplog)
    third = executor.submit(jobs.pid).result(LONGEST)
    assert f"job failures.insert_and_sleep in worker {third}: " in texts(caplog)

    lost = failures.lost_connection()
    view = executor.options(retries=1)
    view.submit(failures.raise_at_first, tmp_path / "r", "c", lost).result(LONGEST)
    account = f"job failures.raise_at_first in worker {third} failed at attempt 1 of 2"
    assert account in texts(caplog)

    unknown = executor.submit(faults.commit_oneself_and_die, "d")
    assert isinstance(unknown.exception(LONGEST), OutcomeUnknownError)
    assert "whether the job was committed by then is not known" in texts(caplog)
    assert "it ran job faults.commit_oneself_and_die: unknown" in texts(caplog)
    assert {r.name for r in caplog.records if "dbpool" in r.name} == {LOGGER}


def test_failed_start_is_logged(
    make_executor: MakeExecutor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each of them, and what follows."""
    executor = make_executor(partial(faults.engine_that_fails, tmp_path / "r"), 1)
    assert executor.submit(jobs.pid).exception(LONGEST)
    assert texts(caplog).count("a worker failed to start (ConnectionError") == 2
    assert "the executor is broken" in texts(caplog)


# -- Leaks ---------------------------------------------------------------------------


def test_connection_that_a_job_leaves_open_is_reported_and_closed(
    database: Database, make_executor: MakeExecutor, tmp_path: Path
) -> None:
    """By the job's name; what was written over it is rolled back."""
    record = tmp_path / "record"
    executor = make_executor(
        database.make_engine,
        1,
        initializer=failures.show_warnings_in,
        initargs=(record,),
    )
    executor.submit(failures.leave_open, "a").result(LONGEST)
    executor.submit(jobs.insert_item, "b").result(LONGEST)
    assert "ResourceWarning: the job leave_open left a connection" in record.read_text()
    assert len(record.read_text().splitlines()) == 1
    assert database.names() == {"b"}
    if not database.is_sqlite:
        wait_until(lambda: database.sessions() == 1, "the server to see it closed")


def test_connection_that_is_given_back_is_no_leak(
    database: Database, make_executor: MakeExecutor, tmp_path: Path
) -> None:
    """Nothing is said of a job that keeps order."""
    record = tmp_path / "record"
    record.touch()
    executor = make_executor(
        database.make_engine,
        1,
        initializer=failures.show_warnings_in,
        initargs=(record,),
    )
    for i in range(3):
        executor.submit(jobs.insert_by_core, f"item {i}").result(LONGEST)
    assert record.read_text() == ""
    assert database.count() == 3


@only_servers
def test_budget_of_connections_is_told_once(
    database: Database, make_executor: MakeExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    """More than the server allows, by the pools of all workers together."""
    url = database.url.render_as_string(hide_password=False)
    executor = make_executor(partial(failures.large_pool, url, 5000), 2)
    futures = [executor.submit(jobs.insert_item, f"item {i}") for i in range(20)]
    for future in futures:
        future.result(LONGEST)
    wait_until(lambda: "the server allows" in texts(caplog), "the note")
    assert texts(caplog).count("2 workers with 5000 connections each") == 1


def test_budget_that_is_kept_is_not_told(
    database: Database, make_executor: MakeExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor is SQLite asked."""
    executor = make_executor(database.make_engine, 2)
    executor.submit(jobs.insert_item, "a").result(LONGEST)
    assert "the server allows" not in texts(caplog)
