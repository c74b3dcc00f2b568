"""Workers as processes: who reaps them, what ends them, what they leave behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import NoReturn

import psutil
import pytest

import jobs
import process_jobs
import programs
from dbpool_executor import DBPoolExecutor, JobTimeoutError, Outcome, WorkerDiedError
from dbpool_executor._launch.process import ChildProcess
from processes import MakeExecutor
from servers import Database
from waiting import LONGEST, wait_until

BOUND = 2.0
"""Seconds for the workers of a dead parent to end."""

on_postgresql = pytest.mark.parametrize(
    "database", ["postgresql-psycopg"], indirect=True
)
on_servers = pytest.mark.parametrize(
    "database", ["postgresql-psycopg", "mariadb-pymysql"], indirect=True
)


def pids(record: Path) -> list[list[int]]:
    """Read the process ids that jobs have noted."""
    lines = record.read_text().splitlines()
    return [[int(word) for word in line.split()] for line in lines]


def noted(record: Path, count: int = 1) -> list[list[int]]:
    """Wait until jobs have noted process ids, and read them."""
    wait_until(
        lambda: record.exists() and record.read_text().count("\n") == count, "the jobs"
    )
    return pids(record)


def is_alive(pid: int) -> bool:
    """Whether a process does anything yet; nobody may be there to bury it."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def is_at_work(database: Database) -> bool:
    """Whether the server works on the long statement of a job."""
    if database.is_postgresql:
        sql = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
        sql += " AND datname = current_database()"
    else:
        sql = "SELECT 1 FROM information_schema.processlist WHERE state = 'User sleep'"
        sql += " AND db = database()"
    return bool(database.rows(sql))


# -- Somebody else reaps -------------------------------------------------------------

REAPED = """\
import multiprocessing
import os
import signal
import threading
import time

import jobs
from dbpool_executor import DBPoolExecutor, WorkerDiedError

def reap():
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            time.sleep(0.001)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    if {reaper!r} == "system":
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    else:
        threading.Thread(target=reap, daemon=True).start()
    context = multiprocessing.get_context({method!r})
    with DBPoolExecutor({url!r}, 2, context, max_tasks_per_child=2) as executor:
        print(*executor.map(jobs.give, range(8)), flush=True)
        error = executor.submit(die).exception(60)
        print(type(error).__name__, error.exitcode, error.outcome.value, flush=True)
        executor.submit(jobs.insert_item, "a").result(60)
    assert not [t for t in threading.enumerate() if t.name == "DBPoolDispatcher"]
    print("ended", flush=True)
"""


@pytest.mark.parametrize("reaper", ["system", "thread"])
def test_jobs_are_done_where_somebody_else_reaps_the_workers(
    sqlite_database: Database, start_method: str, reaper: str, tmp_path: Path
) -> None:
    """Their exit status is not to be had, and nobody guesses one."""
    text = REAPED.format(
        reaper=reaper, method=start_method, url=str(sqlite_database.url)
    )
    with programs.running(tmp_path / "program.py", text) as program:
        output, errors = program.communicate(timeout=60)
    assert program.returncode == 0, errors
    told = "-9" if start_method == "forkserver" else "None"
    given, died, ended = output.splitlines()
    assert (given, ended) == ("0 1 2 3 4 5 6 7", "ended")
    # The executor may be faster than the thread that reaps.
    assert died in {
        f"WorkerDiedError {status} rolled back"
        for status in ({told, "-9"} if reaper == "thread" else {told})
    }
    assert "Exception in thread" not in errors
    assert sqlite_database.names() == {"a"}


def test_signal_never_reaches_a_process_that_has_the_id_now(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A child that was reaped by others gets no signal, with and without a pidfd."""
    sent: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, _number: sent.append(pid))
    context = multiprocessing.get_context("fork")
    for has_pidfd in (True, False):
        if not has_pidfd:
            monkeypatch.delattr(os, "pidfd_open")
        child = ChildProcess(context.Process(target=os.getpid))
        os.waitpid(child.pid, 0)
        child.send(signal.SIGKILL)
        child.send_to_tree(signal.SIGKILL)
        assert child.bury() is None
    assert sent == []


# -- A dead parent, and jobs that hold the interpreter --------------------------------

HELD = """\
import multiprocessing
import pathlib

import process_jobs
from dbpool_executor import DBPoolExecutor

if __name__ == "__main__":
    context = multiprocessing.get_context({method!r})
    executor = DBPoolExecutor({url!r}, 1, context)
    record = pathlib.Path({record!r})
    executor.submit(process_jobs.{job}, record).result()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="by Linux's kernel")
@pytest.mark.parametrize("job", ["match_for_ever", "sleep_in_c", "start_children"])
@on_postgresql
def test_worker_of_a_killed_parent_ends_also_in_c_code(
    database: Database, start_method: str, job: str, tmp_path: Path
) -> None:
    """No thread of it gets the interpreter; the transaction ends with it."""
    record = tmp_path / "record"
    text = HELD.format(
        method=start_method,
        url=database.url.render_as_string(hide_password=False),
        record=str(record),
        job=job,
    )
    with programs.running(tmp_path / "program.py", text) as program:
        (noted_pids,) = noted(record)
        assert database.sessions() == 1
        program.kill()
        program.wait(LONGEST)
        wait_until(lambda: not any(map(is_alive, noted_pids)), "the worker", BOUND)
        wait_until(lambda: database.sessions() == 0, "the server to end the session")
    assert database.count() == 0


# -- Nothing runs on -----------------------------------------------------------------

ENDS: dict[str, Callable[[DBPoolExecutor], None]] = {
    "terminate": DBPoolExecutor.terminate_workers,
    "kill": DBPoolExecutor.kill_workers,
}


@pytest.mark.parametrize("job", ["select_long", "select_long_and_swallow"])
@pytest.mark.parametrize("how", ENDS)
@on_servers
def test_statement_ends_with_the_worker_that_is_ended(
    database: Database, make_executor: MakeExecutor, how: str, job: str, tmp_path: Path
) -> None:
    """Also if the job would go on: nothing of it is stored, and no other error told."""
    executor = make_executor(database.make_engine, 1)
    future = executor.submit(getattr(process_jobs, job), tmp_path / "record")
    noted(tmp_path / "record")
    wait_until(lambda: is_at_work(database), "the statement")
    ENDS[how](executor)
    error = future.exception(LONGEST)
    assert isinstance(error, WorkerDiedError)
    number = signal.SIGTERM if how == "terminate" else signal.SIGKILL
    assert (error.exitcode, error.outcome) == (-number, Outcome.ROLLED_BACK)
    assert not is_at_work(database)
    wait_until(lambda: database.sessions() == 0, "the server to end the session")
    assert database.count() == 0


@on_servers
def test_statement_ends_with_the_worker_that_is_killed_for_its_time(
    database: Database, make_executor: MakeExecutor, tmp_path: Path
) -> None:
    """One of a thread of the job, which no JobInterrupt reaches."""
    executor = make_executor(database.make_engine, 1)
    hasty = executor.options(timeout=0.2, kill_after=0.2)
    error = hasty.submit(process_jobs.hold_and_select, tmp_path / "record").exception(
        LONGEST
    )
    assert isinstance(error, JobTimeoutError)
    assert not is_at_work(database)
    wait_until(lambda: database.sessions() == 0, "the server to end the session")


@on_postgresql
def test_children_of_a_job_end_with_a_worker_that_is_killed(
    database: Database,
    context: BaseContext,
    make_executor: MakeExecutor,
    tmp_path: Path,
) -> None:
    """And the children of those."""
    executor = make_executor(database.make_engine, 1, context)
    future = executor.submit(process_jobs.start_children, tmp_path / "record")
    (all_pids,) = noted(tmp_path / "record")
    executor.kill_workers()
    error = future.exception(LONGEST)
    assert isinstance(error, WorkerDiedError)
    assert error.exitcode == -signal.SIGKILL
    wait_until(lambda: not any(map(is_alive, all_pids)), "worker and children to end")


def test_children_of_a_job_that_holds_the_interpreter_end_with_its_worker(
    sqlite_database: Database, make_executor: MakeExecutor, tmp_path: Path
) -> None:
    """The worker cannot do it: the parent does."""
    executor = make_executor(sqlite_database.make_engine, 1)
    future = executor.submit(process_jobs.start_and_hold, tmp_path / "record")
    (all_pids,) = noted(tmp_path / "record")
    executor.kill_workers()
    error = future.exception(LONGEST)
    assert isinstance(error, WorkerDiedError)
    assert error.exitcode == -signal.SIGKILL
    wait_until(lambda: not any(map(is_alive, all_pids)), "worker and children to end")


def test_copy_that_a_job_has_forked_in_c_does_not_delay_the_verdict(
    sqlite_database: Database,
    context: BaseContext,
    make_executor: MakeExecutor,
    tmp_path: Path,
) -> None:
    """It holds the worker's ends, so no stream ends when the worker does."""
    executor = make_executor(sqlite_database.make_engine, 1, context)
    future = executor.submit(process_jobs.fork_in_c, tmp_path / "record")
    ((worker, copy),) = noted(tmp_path / "record")
    try:
        os.kill(worker, signal.SIGKILL)
        error = future.exception(LONGEST)
        assert isinstance(error, WorkerDiedError)
        assert (error.exitcode, error.pid) == (-signal.SIGKILL, worker)
        assert is_alive(copy)
    finally:
        os.kill(copy, signal.SIGKILL)
    executor.submit(jobs.insert_item, "a").result(LONGEST)
    assert sqlite_database.names() == {"a"}


# -- Servants that are killed ---------------------------------------------------------


def forkserver_pid() -> int:
    """Give the process id of this process's forkserver."""
    pid = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    assert isinstance(pid, int)
    return pid


def test_forkserver_that_is_killed_costs_a_restart_of_it(
    sqlite_database: Database, make_executor: MakeExecutor, tmp_path: Path
) -> None:
    """Older workers work on, their end is seen, and they can be killed."""
    executor = make_executor(sqlite_database.make_engine, 2, None)
    held = executor.submit(process_jobs.sleep_in_c, tmp_path / "record")
    ((older,),) = noted(tmp_path / "record")
    other = executor.submit(jobs.pid).result(LONGEST)
    os.kill(forkserver_pid(), signal.SIGKILL)
    assert executor.submit(jobs.pid).result(LONGEST) == other
    os.kill(other, signal.SIGKILL)
    wait_until(lambda: executor.stats().died == 1, "the end to be seen")
    newer = executor.submit(jobs.pid).result(LONGEST)
    assert newer not in (older, other)
    executor.kill_workers()
    error = held.exception(LONGEST)
    assert isinstance(error, WorkerDiedError)
    assert error.exitcode is None
    wait_until(lambda: not is_alive(older), "the older worker to end")


@pytest.mark.filterwarnings("ignore:resource_tracker:UserWarning")
def test_resource_tracker_that_is_killed_costs_a_restart_of_it(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """The next worker starts."""
    resource_tracker.ensure_running()
    tracker = resource_tracker._resource_tracker  # type: ignore[attr-defined]
    os.kill(tracker._pid, signal.SIGKILL)
    executor = make_executor(sqlite_database.make_engine, 1)
    assert executor.submit(jobs.add, 1, 2).result(LONGEST) == 3


# -- In other people's processes --------------------------------------------------------

COPIED = """\
import logging
import multiprocessing
import sys

import jobs
from dbpool_executor import DBPoolExecutor

def run(method):
    context = multiprocessing.get_context(method)
    with DBPoolExecutor({url!r}, 1, context) as executor:
        return executor.submit(jobs.pid).result(60)

def main(method):
    print(run(method) > 0, flush=True)
    print(run(method) > 0, flush=True)

def fork(method):
    process = multiprocessing.get_context("fork").Process(
        target=main, args=(method,), daemon={daemon}
    )
    process.start()
    process.join(60)
    print("exit", process.exitcode, flush=True)

if __name__ == "__main__":
    run({method!r})
    fork({method!r})
    run({method!r})
"""


@pytest.mark.parametrize("daemon", [False, True], ids=["plain", "daemonic"])
def test_copy_of_a_process_that_has_used_an_executor_makes_its_own(
    sqlite_database: Database, start_method: str, daemon: bool, tmp_path: Path
) -> None:
    """With a forkserver of its own; daemonic processes, as of a queue, as well."""
    text = COPIED.format(
        url=str(sqlite_database.url), method=start_method, daemon=daemon
    )
    with programs.running(tmp_path / "program.py", text) as program:
        output, errors = program.communicate(timeout=60)
    assert output.splitlines() == ["True", "True", "exit 0"], errors
    assert program.returncode == 0
    assert "Error" not in errors


class ForeignKey(bytes):
    """What billiard, and so Celery, puts in the place of multiprocessing's own."""

    def __reduce__(self) -> NoReturn:
        raise TypeError("disallowed for security reasons")


def test_workers_start_where_the_process_has_a_key_of_billiards(
    sqlite_database: Database,
    context: BaseContext,
    make_executor: MakeExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It does not pickle for multiprocessing's children, and stays what it is."""
    config = vars(multiprocessing.current_process())["_config"]
    key = ForeignKey(config["authkey"])
    monkeypatch.setitem(config, "authkey", key)
    executor = make_executor(sqlite_database.make_engine, 1, context)
    assert executor.submit(jobs.add, 1, 2).result(LONGEST) == 3
    assert config["authkey"] is key


FORGOTTEN = """\
import multiprocessing
import pathlib

import process_jobs
from dbpool_executor import DBPoolExecutor

def main():
    context = multiprocessing.get_context({method!r})
    executor = DBPoolExecutor({url!r}, 1, context)
    executor.submit(process_jobs.sleep_in_c, pathlib.Path({record!r})).result()

if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=main, daemon=True)
    process.start()
    while not pathlib.Path({record!r}).exists():
        process.join(0.01)
"""


def test_workers_of_a_daemonic_process_end_with_it(
    sqlite_database: Database, start_method: str, tmp_path: Path
) -> None:
    """It is terminated at the end of the program, without a word to anybody."""
    record = tmp_path / "record"
    text = FORGOTTEN.format(
        url=str(sqlite_database.url), method=start_method, record=str(record)
    )
    with programs.running(tmp_path / "program.py", text) as program:
        program.communicate(timeout=60)
        ((worker,),) = noted(record)
        wait_until(lambda: not is_alive(worker), "the worker to end", BOUND)
