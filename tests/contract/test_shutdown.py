"""Executors end, and leave no process, thread, descriptor or server session behind."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from functools import partial
from multiprocessing.context import BaseContext
from pathlib import Path

import psutil
import pytest
from sqlalchemy import Engine

import faults
import jobs
import programs
from dbpool_executor import (
    DBPoolExecutor,
    Outcome,
    WorkerDiedError,
    WorkerStartError,
)
from processes import MakeExecutor, dispatchers, worker_pids, workers
from servers import Database
from waiting import LONGEST, Gate, wait_until

one_server = pytest.mark.parametrize("database", ["postgresql-psycopg"], indirect=True)


def insert_many(executor: DBPoolExecutor, count: int) -> list[Future[int]]:
    """Submit jobs that write one item each."""
    return [executor.submit(jobs.insert_item, f"item {i}") for i in range(count)]


# -- shutdown() -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "database", ["sqlite", "postgresql-psycopg", "mariadb-pymysql"], indirect=True
)
def test_shutdown_waits_for_jobs_and_workers(
    database: Database, context: BaseContext, nothing_left: None
) -> None:
    """When it returns, all is written and nobody is there any more."""
    before = workers(), dispatchers()
    executor = DBPoolExecutor(database.make_engine, 2, context)
    futures = insert_many(executor, 20)
    executor.shutdown()
    assert (workers(), dispatchers()) == before
    assert all(future.done() for future in futures)
    assert database.count() == 20
    wait_until(lambda: database.sessions() == 0, "the server to end the sessions")


def test_shutdown_without_waiting_returns_before_the_jobs_are_done(
    sqlite_database: Database, make_executor: MakeExecutor, gate: Gate
) -> None:
    """The jobs that were taken are done all the same, and then the workers end."""
    executor = make_executor(sqlite_database.make_engine, 1)
    held = executor.submit(jobs.insert_at_gate, "held", gate.address)
    futures = insert_many(executor, 5)
    gate.arrival()
    executor.shutdown(wait=False)
    assert not held.done()
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(jobs.insert_item, "late")  # while those before are under way
    gate.open()
    for future in [held, *futures]:
        future.result(LONGEST)
    wait_until(lambda: not workers() and not dispatchers(), "the workers to end")
    assert sqlite_database.count() == 6


def test_shutdown_may_cancel_what_has_not_started(
    sqlite_database: Database, make_executor: MakeExecutor, gate: Gate
) -> None:
    """The job that runs is done, the others are cancelled, and every wait ends."""
    executor = make_executor(sqlite_database.make_engine, 1)
    held = executor.submit(jobs.insert_at_gate, "held", gate.address)
    gate.arrival()
    futures = insert_many(executor, 5)
    executor.shutdown(wait=False, cancel_futures=True)
    assert set(as_completed(futures, LONGEST)) == set(futures)
    assert wait(futures, LONGEST).not_done == set()
    assert all(future.cancelled() for future in futures)
    assert not held.done()
    gate.open()
    held.result(LONGEST)
    executor.shutdown()
    assert sqlite_database.names() == {"held"}


def test_leaving_the_with_block_waits(
    sqlite_database: Database, nothing_left: None
) -> None:
    """Also when it is left by an exception."""
    with (
        pytest.raises(LookupError, match="of the block"),
        DBPoolExecutor(sqlite_database.make_engine, 2) as executor,
    ):
        futures = insert_many(executor, 10)
        raise LookupError("of the block")
    assert all(future.done() for future in futures)
    assert sqlite_database.count() == 10


def test_executor_that_was_shut_down_takes_no_job(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """It says so at once, and a second shutdown does no harm."""
    executor = make_executor(sqlite_database.make_engine, 1)
    view = executor.options(commit=False)
    executor.submit(jobs.add, 1, 2).result(LONGEST)
    for _ in range(2):
        executor.shutdown()
        with pytest.raises(RuntimeError, match="after shutdown"):
            executor.submit(jobs.add, 1, 2)
        with pytest.raises(RuntimeError, match="after shutdown"):
            view.submit(jobs.add, 1, 2)
        with pytest.raises(RuntimeError, match="after shutdown"):
            executor.map(jobs.add, [1], [2])


@pytest.mark.parametrize("cancel", [False, True])
def test_whoever_submits_during_a_shutdown_is_refused_or_has_his_jobs_done(
    cancel: bool, sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """No future stays undone, whoever is first."""
    executor = make_executor(sqlite_database.make_engine, 1)
    executor.submit(jobs.give, 0).result(LONGEST)
    submitting = threading.Barrier(4)
    futures: list[Future[int]] = []

    def submit() -> None:
        submitting.wait(LONGEST)
        with pytest.raises(RuntimeError, match="after shutdown"):
            while True:
                futures.append(executor.submit(jobs.give, 1))

    with ThreadPoolExecutor(3) as threads:
        ends = [threads.submit(submit) for _ in range(3)]
        submitting.wait(LONGEST)
        executor.shutdown(wait=False, cancel_futures=cancel)
        for end in ends:
            end.result(LONGEST)
    done = wait(futures, LONGEST)
    assert not done.not_done
    assert all(f.cancelled() or f.result(0) == 1 for f in futures)
    assert cancel or not any(f.cancelled() for f in futures)


def test_executor_that_was_never_used_starts_nothing(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """To make one and to shut it down costs no process and no thread."""
    executor = make_executor(sqlite_database.make_engine, 2)
    assert (workers(), dispatchers()) == (set(), set())
    executor.shutdown(wait=False)
    executor.shutdown()
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(jobs.add, 1, 2)


def test_view_shuts_its_executor_down(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """A view has no workers of its own."""
    executor = make_executor(sqlite_database.make_engine, 1)
    view = executor.options(commit=False)
    view.submit(jobs.add, 1, 2).result(LONGEST)
    view.shutdown()
    assert workers() == set()
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(jobs.add, 1, 2)


def test_callback_may_shut_the_executor_down(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """It runs in the thread that shutdown waits for, and does not wait for itself."""
    executor = make_executor(sqlite_database.make_engine, 1)
    returned = threading.Event()

    def shut_down(_future: object) -> None:
        executor.shutdown()
        returned.set()

    executor.submit(jobs.add, 1, 2).add_done_callback(shut_down)
    assert returned.wait(LONGEST)
    wait_until(lambda: not workers() and not dispatchers(), "the workers to end")


# -- The executor is forgotten, the program ends ----------------------------------------


def test_forgotten_executor_does_its_jobs_and_ends(
    sqlite_database: Database, context: BaseContext, nothing_left: None
) -> None:
    """Garbage collection is a shutdown that does not wait."""
    futures = insert_many(DBPoolExecutor(sqlite_database.make_engine, 1, context), 10)
    gc.collect()
    for future in futures:
        future.result(LONGEST)
    wait_until(lambda: not workers() and not dispatchers(), "the workers to end")
    assert sqlite_database.count() == 10


def test_view_keeps_its_executor_alive(
    sqlite_database: Database, nothing_left: None
) -> None:
    """Only when the view is forgotten too do the workers end."""
    view = DBPoolExecutor(sqlite_database.make_engine, 1).options(commit=False)
    gc.collect()
    assert view.submit(jobs.add, 1, 2).result(LONGEST) == 3
    gc.collect()
    assert view.submit(jobs.add, 1, 2).result(LONGEST) == 3
    del view
    gc.collect()
    wait_until(lambda: not workers() and not dispatchers(), "the workers to end")


ENDS = """\
import multiprocessing
import sys

import jobs
from dbpool_executor import DBPoolExecutor

if __name__ == "__main__":
    context = multiprocessing.get_context({method!r})
    executor = DBPoolExecutor({url!r}, 2, context)
    for i in range(30):
        executor.submit(jobs.insert_item, f"item {{i}}")
    {end}
"""


@pytest.mark.parametrize(
    ("end", "code", "error"),
    [
        ("pass", 0, ""),
        ("sys.exit(7)", 7, ""),
        ("raise LookupError('the end')", 1, "LookupError: the end\n"),
    ],
)
def test_jobs_are_done_before_the_interpreter_ends(
    sqlite_database: Database,
    start_method: str,
    tmp_path: Path,
    end: str,
    code: int,
    error: str,
) -> None:
    """However a program ends that shut nothing down, what it submitted is written."""
    text = ENDS.format(method=start_method, url=str(sqlite_database.url), end=end)
    with programs.running(tmp_path / "program.py", text) as program:
        output, errors = program.communicate(timeout=60)
    assert (output, program.returncode) == ("", code)
    assert errors.endswith(error)
    assert errors.count("Traceback") == bool(error)
    assert sqlite_database.count() == 30


# -- terminate_workers(), kill_workers(), workers that hang ------------------------------


@pytest.mark.parametrize(
    ("end", "name"),
    [
        (DBPoolExecutor.terminate_workers, "SIGTERM"),
        (DBPoolExecutor.kill_workers, "SIGKILL"),
    ],
)
def test_workers_can_be_ended_at_once(
    database: Database,
    make_executor: MakeExecutor,
    gate: Gate,
    end: Callable[[DBPoolExecutor], None],
    name: str,
) -> None:
    """The job that runs is rolled back, those that wait are cancelled."""
    executor = make_executor(database.make_engine, 1)
    running = executor.submit(jobs.insert_at_gate, "running", gate.address)
    waiting = insert_many(executor, 3)
    gate.arrival()
    end(executor)
    how = f"killed by the executor itself with {name}: {end.__name__}\\(\\) was called"
    with pytest.raises(WorkerDiedError, match=how) as raised:
        running.result(LONGEST)
    assert raised.value.outcome is running.outcome is Outcome.ROLLED_BACK
    assert set(as_completed(waiting, LONGEST)) == set(waiting)
    assert all(future.cancelled() for future in waiting)
    executor.shutdown()
    assert (workers(), dispatchers(), database.count()) == (set(), set(), 0)
    with pytest.raises(RuntimeError):
        executor.submit(jobs.add, 1, 2)
    wait_until(lambda: database.sessions() == 0, "the server to end the session")


@pytest.mark.parametrize(
    "end", [DBPoolExecutor.terminate_workers, DBPoolExecutor.kill_workers]
)
def test_workers_that_are_not_there_can_be_ended(
    sqlite_database: Database,
    make_executor: MakeExecutor,
    end: Callable[[DBPoolExecutor], None],
) -> None:
    """Before the first job and after the last it does no harm."""
    unused = make_executor(sqlite_database.make_engine, 1)
    end(unused)
    used = make_executor(sqlite_database.make_engine, 1)
    used.submit(jobs.add, 1, 2).result(LONGEST)
    used.shutdown()
    end(used)


def test_worker_that_does_not_leave_is_killed(
    sqlite_database: Database,
    context: BaseContext,
    nothing_left: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A dispose that never returns does not keep the program from ending."""
    monkeypatch.setattr("dbpool_executor._dispatch.fleet.LEAVE_GRACE", 0.1)
    executor = DBPoolExecutor(
        sqlite_database.make_engine, 1, context, initializer=faults.never_leave
    )
    executor.submit(jobs.insert_item, "a").result(LONGEST)
    closer = threading.Thread(target=executor.shutdown, daemon=True)
    closer.start()
    closer.join(LONGEST)
    assert not closer.is_alive()
    assert (workers(), sqlite_database.names()) == (set(), {"a"})


def test_job_may_take_longer_than_a_worker_may_to_leave(
    sqlite_database: Database,
    make_executor: MakeExecutor,
    gate: Gate,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Shutdown waits for a running job however long it takes."""
    monkeypatch.setattr("dbpool_executor._dispatch.fleet.LEAVE_GRACE", 0.0)
    executor = make_executor(sqlite_database.make_engine, 1)
    held = executor.submit(jobs.insert_at_gate, "held", gate.address)
    waiting = executor.submit(jobs.wait_at_gate, gate.address)
    gate.arrival()
    executor.shutdown(wait=False)
    gate.open()
    gate.arrival()
    gate.open()
    held.result(LONGEST)
    waiting.result(LONGEST)
    assert sqlite_database.names() == {"held"}


# -- Nothing is left ------------------------------------------------------------------


@pytest.mark.heavy
@one_server
def test_executors_in_a_loop_leave_nothing_behind(
    database: Database, context: BaseContext, nothing_left: None
) -> None:
    """No process, thread, descriptor or session of the server."""

    def use() -> None:
        with DBPoolExecutor(database.make_engine, 2, context) as executor:
            key = executor.submit(jobs.insert_item, "item").result(LONGEST)
            with pytest.raises(LookupError):
                executor.submit(jobs.give_up).result(LONGEST)
        database.execute("DELETE FROM item WHERE id = :key", key=key)

    def held() -> tuple[int, int, set[psutil.Process]]:
        process = psutil.Process()
        return process.num_fds(), process.num_threads(), workers()

    use()  # multiprocessing's own processes start once, and stay
    gc.collect()
    before = held()
    for _ in range(5 if context.get_start_method() == "spawn" else 20):
        use()
        assert workers() == before[2]
    gc.collect()
    wait_until(lambda: held() == before, f"{held()} to be {before} again")
    wait_until(lambda: database.sessions() == 0, "the server to end the sessions")


@pytest.mark.heavy
def test_crashes_leave_nothing_behind(
    sqlite_database: Database, context: BaseContext, make_executor: MakeExecutor
) -> None:
    """Workers that are killed or replaced cost no descriptor either."""
    executor = make_executor(
        sqlite_database.make_engine, 1, context, max_tasks_per_child=2
    )

    def descriptors() -> int:
        worker = executor.submit(jobs.pid).result(LONGEST)
        wait_until(lambda: worker_pids() == {worker}, "the last worker to be gone")
        return psutil.Process().num_fds()

    before = descriptors()
    for _ in range(5):
        assert executor.submit(faults.die).exception(LONGEST) is not None
        assert descriptors() == before
        assert executor.submit(jobs.pid).result(LONGEST)  # its second and last


def test_worker_is_replaced_after_its_last_task(
    sqlite_database: Database, context: BaseContext, make_executor: MakeExecutor
) -> None:
    """``max_tasks_per_child``: nobody does more, and no job is lost or run twice.

    On a busy machine somebody may do less, from whom a job was taken back.
    """
    executor = make_executor(
        sqlite_database.make_engine, 1, context, max_tasks_per_child=2
    )
    futures = [executor.submit(jobs.insert_and_tell_pid, f"item {i}") for i in range(6)]
    pids = [future.result(LONGEST) for future in futures]
    assert max(Counter(pids).values()) == 2
    assert sqlite_database.count() == 6


def test_failed_jobs_count_as_tasks(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """Whether a job returns or raises, its worker has done one more."""
    executor = make_executor(sqlite_database.make_engine, 1, max_tasks_per_child=2)
    first = executor.submit(jobs.pid).result(LONGEST)
    assert isinstance(executor.submit(jobs.give_up).exception(LONGEST), LookupError)
    assert executor.submit(jobs.pid).result(LONGEST) != first


# -- Workers that cannot start ----------------------------------------------------------


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (faults.engine_that_fails, "ConnectionError: no such host"),
        (faults.engine_that_exits, "exited with code 5"),
    ],
)
def test_factory_that_always_fails_breaks_the_executor(
    context: BaseContext,
    make_executor: MakeExecutor,
    tmp_path: Path,
    factory: Callable[[Path], Engine],
    words: str,
) -> None:
    """Each future has an error object of its own, with the worker's as its cause."""
    record = tmp_path / "record"
    executor = make_executor(partial(factory, record), 1, context)
    futures = [executor.submit(jobs.add, 1, i) for i in range(3)]
    errors = [future.exception(LONGEST) for future in futures]
    assert {type(error) for error in errors} == {WorkerStartError}
    assert len({id(error) for error in errors}) == 3
    for error in errors:
        assert isinstance(error, WorkerStartError)
        assert words in str(error)
        assert error.outcome is Outcome.NEVER_STARTED
    if factory is faults.engine_that_fails:
        causes = [error.__cause__ for error in errors if error is not None]
        assert [type(cause) for cause in causes] == [ConnectionError] * 3
        assert "engine_that_fails" in str(causes[0] and causes[0].__cause__)
        assert len({id(cause) for cause in causes}) == 3
    with pytest.raises(WorkerStartError, match=words):
        executor.submit(jobs.add, 1, 2)
    wait_until(lambda: not workers() and not dispatchers(), "the workers to end")
    # A handful of tries, and not one after the other for ever.
    assert len(record.read_text().split()) <= 5


def test_initializer_that_always_fails_breaks_the_executor(
    database: Database, make_executor: MakeExecutor
) -> None:
    """It is told by name, and what it wrote is rolled back."""
    executor = make_executor(
        database.make_engine, 1, initializer=faults.fail_to_initialize
    )
    error = executor.submit(jobs.count_items).exception(LONGEST)
    assert isinstance(error, WorkerStartError)
    assert isinstance(error.__cause__, ConnectionError)
    assert "fail_to_initialize" in str(error.__cause__.__cause__)
    assert database.count() == 0


@pytest.mark.parametrize(
    "factory", [faults.engine_that_fails_once, faults.engine_that_exits_once]
)
def test_factory_that_fails_once_is_survived(
    sqlite_database: Database,
    context: BaseContext,
    make_executor: MakeExecutor,
    tmp_path: Path,
    factory: Callable[[str, Path], Engine],
) -> None:
    """Another worker is started, and no job hears of it."""
    record = tmp_path / "record"
    broken_once = partial(factory, str(sqlite_database.url), record)
    executor = make_executor(broken_once, 1, context)
    for future in insert_many(executor, 5):
        future.result(LONGEST)
    assert sqlite_database.count() == 5
    assert len(record.read_text().split()) == 2


def test_working_worker_is_not_given_up_for_one_that_cannot_start(
    sqlite_database: Database, make_executor: MakeExecutor, gate: Gate, tmp_path: Path
) -> None:
    """While one worker is able to, it does all the jobs."""
    record = tmp_path / "record"
    factory = partial(faults.engine_in_order, str(sqlite_database.url), record)
    executor = make_executor(factory, 2)
    executor.submit(jobs.add, 1, 2).result(LONGEST)
    held = executor.submit(jobs.wait_at_gate, gate.address)
    gate.arrival()
    futures = insert_many(executor, 5)
    wait_until(lambda: len(record.read_text().split()) >= 4, "starts that fail")
    gate.open()
    for future in [held, *futures]:
        future.result(LONGEST)
    assert sqlite_database.count() == 5


# -- Ctrl-C -----------------------------------------------------------------------------

INTERRUPTED = """\
import multiprocessing
import signal

import jobs
from dbpool_executor import DBPoolExecutor
from dbpool_executor._api import executor as _executor

_executor.INTERRUPT_GRACE = {grace!r}

def tell(future):
    print("cancelled" if future.cancelled() else "done", flush=True)

if __name__ == "__main__":
    context = multiprocessing.get_context({method!r})
    with DBPoolExecutor({url!r}, 2, context) as executor:
        held = executor.submit(jobs.insert_at_gate, "held", {address!r})
        executor.submit(jobs.wait_at_gate, {address!r})
        waiting = [executor.submit(jobs.insert_item, f"item {{i}}") for i in range(50)]
        waiting[-1].add_done_callback(tell)
        print("ready", flush=True)
        # Not in result(): the lock of a future does not always survive an interrupt
        # (bugs.python.org/issue29988).
        signal.pause()
"""


@pytest.mark.parametrize("is_patient", [True, False], ids=["patient", "impatient"])
def test_ctrl_c_ends_a_with_block(
    sqlite_database: Database,
    start_method: str,
    gate: Gate,
    tmp_path: Path,
    is_patient: bool,
) -> None:
    """What waits is cancelled, what runs may end or is killed; workers keep quiet."""
    text = INTERRUPTED.format(
        grace=LONGEST if is_patient else 0.0,
        method=start_method,
        url=str(sqlite_database.url),
        address=gate.address,
    )
    with programs.running(tmp_path / "program.py", text) as program:
        pids = {gate.arrival(), gate.arrival()}
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        os.killpg(program.pid, signal.SIGINT)
        assert program.stdout.readline() == "cancelled\n"
        if is_patient:
            gate.open()
        output, errors = program.communicate(timeout=LONGEST)
    assert (output, program.returncode) == ("", -signal.SIGINT)
    assert errors.count("Traceback") == errors.count("KeyboardInterrupt\n") == 1
    assert not any(map(psutil.pid_exists, pids))
    assert sqlite_database.names() == ({"held"} if is_patient else set())


STARTING = """\
import multiprocessing

import jobs
from dbpool_executor import DBPoolExecutor

if __name__ == "__main__":
    context = multiprocessing.get_context({method!r})
    with DBPoolExecutor({url!r}, 1, context) as executor:
        executor.submit(jobs.add, 1, 2).result()
else:
    jobs.wait_at_gate({address!r})
"""


@pytest.mark.parametrize("start_method", ["forkserver", "spawn"], indirect=True)
def test_ctrl_c_finds_workers_quiet_while_they_import(
    sqlite_database: Database, start_method: str, gate: Gate, tmp_path: Path
) -> None:
    """The first worker is not yet ours when the signal comes, and says nothing."""
    text = STARTING.format(
        method=start_method, url=str(sqlite_database.url), address=gate.address
    )
    with programs.running(tmp_path / "program.py", text) as program:
        gate.arrival()
        os.killpg(program.pid, signal.SIGINT)
        gate.open()
        output, errors = program.communicate(timeout=LONGEST)
    assert (output, program.returncode) == ("", -signal.SIGINT)
    assert errors.count("Traceback") == errors.count("KeyboardInterrupt\n") == 1


NEIGHBOUR = """\
import multiprocessing
import signal
from multiprocessing import resource_tracker

import jobs
from dbpool_executor import DBPoolExecutor

def tell(queue):
    queue.put(signal.pthread_sigmask(signal.SIG_BLOCK, []))

if __name__ == "__main__":
    resource_tracker.ensure_running()
    context = multiprocessing.get_context({method!r})
    with DBPoolExecutor({url!r}, 1, context) as executor:
        executor.submit(jobs.add, 1, 2).result()
    queue = context.SimpleQueue()
    process = context.Process(target=tell, args=(queue,))
    process.start()
    print(queue.get())
    process.join()
"""


def test_other_processes_of_the_program_hear_ctrl_c(
    sqlite_database: Database, start_method: str, tmp_path: Path
) -> None:
    """What keeps workers quiet is not handed on to what the program itself starts."""
    text = NEIGHBOUR.format(method=start_method, url=str(sqlite_database.url))
    with programs.running(tmp_path / "program.py", text) as program:
        output, errors = program.communicate(timeout=LONGEST)
    assert (output, errors) == ("set()\n", "")
