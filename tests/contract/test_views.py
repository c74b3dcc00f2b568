"""Views are executors; and workers that are started ahead of the first job."""

from __future__ import annotations

import inspect
from multiprocessing.context import BaseContext

import pytest

import faults
import jobs
from dbpool_executor import DBPoolExecutor, WorkerStartError
from dbpool_executor.testing import InlineExecutor
from processes import MakeExecutor, worker_pids
from servers import Database
from waiting import LONGEST, wait_until


def test_view_has_all_that_an_executor_has(sqlite_database: Database) -> None:
    """But for what makes one, other libraries find there what they look for."""
    executor = DBPoolExecutor(sqlite_database.make_engine, 3)
    view = executor.options(timeout=5).options(retries=1)
    assert view._max_workers == 3
    names = {name for name, _ in inspect.getmembers(executor) if name[0] != "_"}
    assert {name for name, _ in inspect.getmembers(view) if name[0] != "_"} == names
    with view:
        assert view.submit(jobs.add, 1, 2).result(LONGEST) == 3
        assert view.stats() == executor.stats()


@pytest.mark.parametrize("end", ["terminate_workers", "kill_workers"])
def test_view_ends_the_workers_of_its_executor(
    sqlite_database: Database, make_executor: MakeExecutor, end: str
) -> None:
    """They are the same."""
    executor = make_executor(sqlite_database.make_engine, 2)
    view = executor.options(timeout=LONGEST)
    view.start_workers(wait=True)
    getattr(view, end)()
    wait_until(lambda: not worker_pids(), "the end of the workers")
    for each in (view, executor):
        with pytest.raises(RuntimeError, match="after shutdown"):
            each.submit(jobs.pid)


def test_workers_start_ahead_of_the_first_job(
    sqlite_database: Database, context: BaseContext, make_executor: MakeExecutor
) -> None:
    """All of them; who waits finds them ready, and they are started once."""
    executor = make_executor(sqlite_database.make_engine, 2, context)
    executor.start_workers()
    executor.start_workers(wait=True)
    assert (executor.stats().workers, executor.stats().idle) == (2, 2)
    pids = worker_pids()
    assert len(pids) == 2
    executor.start_workers(wait=True)
    assert executor.submit(jobs.pid).result(LONGEST) in pids
    assert worker_pids() == pids


def test_workers_that_cannot_start_are_told_to_who_waits_for_them(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """As to a job; who does not wait hears of it from the first one."""
    executor = make_executor(
        sqlite_database.make_engine, 2, initializer=faults.fail_to_initialize
    )
    executor.start_workers()
    with pytest.raises(WorkerStartError, match="no such table"):
        executor.start_workers(wait=True)


def test_workers_of_an_executor_that_was_shut_down_are_not_started(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """As a job is not taken any more."""
    executor = make_executor(sqlite_database.make_engine, 1)
    executor.shutdown()
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.start_workers(wait=True)


def test_executor_for_tests_starts_ahead_as_well(sqlite_database: Database) -> None:
    """Its initializer runs then, and what that raises is told."""
    with InlineExecutor(
        sqlite_database.make_engine, initializer=jobs.insert_item, initargs=("ahead",)
    ) as executor:
        executor.start_workers(wait=True)
        assert sqlite_database.names() == {"ahead"}
    failing = InlineExecutor(
        sqlite_database.make_engine, initializer=faults.fail_to_initialize
    )
    with pytest.raises(WorkerStartError, match="no such table"):
        failing.start_workers()
