"""Executors in forked copies of their process, and jobs that copy their worker."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable

import psutil
import pytest

import defence
import inherited
import jobs
from dbpool_executor import Outcome, WorkerDiedError
from processes import MakeExecutor
from servers import Database
from waiting import LONGEST, Gate, wait_until
from warm import Interpreter

if defence.is_taken_away():
    defence.take_away()

one_server = pytest.mark.parametrize("database", ["postgresql-psycopg"], indirect=True)


def address(database: Database) -> str:
    """Give the URL of a database as a program takes it."""
    return database.url.render_as_string(hide_password=False)


# -- Copies of the parent -------------------------------------------------------


@one_server
@pytest.mark.parametrize("leave", ["_exit", "exit"])
@pytest.mark.parametrize(
    ("locked", "early"),
    [(False, False), (True, False), (False, True)],
    ids=["free", "in submit", "early"],
)
def test_executor_in_a_copy_raises_at_once_and_touches_nothing(
    database: Database, leave: str, locked: bool, early: bool, interpreter: Interpreter
) -> None:
    """Whatever the copy calls and when, and however it ends, the original goes on."""
    report = interpreter.run(
        "copied", url=address(database), leave=leave, locked=locked, early=early
    )
    said = {name: text.partition(";")[0] for name, text in report["told"].items()}
    refusal = (
        "RuntimeError: this executor belongs to the process that made it, and this is "
        "a forked copy of that process"
    )
    assert said == dict.fromkeys(said, refusal)
    assert report["ends"] == ["fine"]
    assert report["is_same_worker"]
    assert database.names() == {"before", "after"}


@one_server
def test_copy_that_lives_on_hides_no_death_and_delays_no_shutdown(
    database: Database, interpreter: Interpreter
) -> None:
    """It holds no end of a worker's channel, whenever it was made."""
    report = interpreter.run("beside_a_copy", url=address(database))
    assert "SIGKILL" in report["died"]
    assert report["ends"] == [0, 0]
    assert database.names() == {"before", "after"}


@one_server
def test_worker_does_not_outlive_its_parent_beside_a_copy_of_it(
    database: Database, interpreter: Interpreter
) -> None:
    """It ends in the middle of its job when the parent is killed; the copy lives on."""
    report = interpreter.run("orphaned", url=address(database))
    assert report["is_copy_left"]
    assert database.count() == 0


# -- Copies of a worker ---------------------------------------------------------


@pytest.mark.parametrize(
    "leave_copy", [inherited.fork_and_wait, inherited.start_and_wait]
)
def test_death_of_a_worker_is_noticed_beside_a_copy_that_its_job_has_made(
    sqlite_database: Database,
    start_method: str,
    leave_copy: Callable[..., int],
    make_executor: MakeExecutor,
    gate: Gate,
) -> None:
    """The copy does not hold the worker's end of its channel open."""
    context = multiprocessing.get_context(start_method)
    executor = make_executor(sqlite_database.make_engine, 1, context)
    future = executor.submit(inherited.leave_copy_and_die, leave_copy, gate.address)
    copy = psutil.Process(gate.arrival())
    with pytest.raises(WorkerDiedError):
        future.result(LONGEST)
    executor.submit(jobs.insert_item, "after").result(LONGEST)
    assert copy.is_running()
    gate.open()
    wait_until(lambda: has_ended(copy), "the copy ends")
    assert sqlite_database.names() == {"after"}


def test_shutdown_ends_workers_beside_copies_that_their_jobs_have_made(
    sqlite_database: Database,
    start_method: str,
    make_executor: MakeExecutor,
    gate: Gate,
) -> None:
    """The copy lives on, and nobody waits for it."""
    context = multiprocessing.get_context(start_method)
    executor = make_executor(sqlite_database.make_engine, 1, context)
    worker = psutil.Process(executor.submit(jobs.pid).result(LONGEST))
    future = executor.submit(inherited.fork_and_wait, gate.address)
    copy = psutil.Process(gate.arrival())
    assert future.result(LONGEST) == copy.pid
    closer = threading.Thread(target=executor.shutdown)
    closer.start()
    wait_until(lambda: has_ended(worker), "the worker ends")
    closer.join(LONGEST)
    assert not closer.is_alive()
    assert copy.is_running()
    gate.open()
    wait_until(lambda: has_ended(copy), "the copy ends")


def test_copy_that_comes_back_from_a_job_ends_there(
    database: Database, start_method: str, make_executor: MakeExecutor, gate: Gate
) -> None:
    """It neither commits nor answers, and says nothing of the job's transaction."""
    context = multiprocessing.get_context(start_method)
    executor = make_executor(database.make_engine, 1, context)
    future = executor.submit(inherited.fork_and_return, "kept", gate.address)
    worker = gate.arrival()
    gate.open()
    assert not psutil.pid_exists(future.result(LONGEST))
    assert executor.submit(jobs.pid).result(LONGEST) == worker
    future = executor.submit(inherited.fork_and_return, "lost", gate.address)
    psutil.Process(gate.arrival()).kill()
    with pytest.raises(WorkerDiedError) as caught:
        future.result(LONGEST)
    assert caught.value.outcome is Outcome.ROLLED_BACK
    assert database.names() == {"kept"}


def has_ended(process: psutil.Process) -> bool:
    """Ask the system whether a process has ended; nobody may have waited for it yet."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
