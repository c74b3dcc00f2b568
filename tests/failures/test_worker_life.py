"""The life of a worker: its signals, its parent, its start trouble, its end."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.context import BaseContext
from pathlib import Path

import psutil
import pytest
from sqlalchemy.exc import OperationalError

import failures
import faults
import jobs
import only_in_parent
import programs
import servers
from dbpool_executor import ResultLostError, WorkerStartError
from processes import MakeExecutor
from proxy import between
from servers import Database
from waiting import LONGEST, Gate, wait_until

only_servers = pytest.mark.parametrize("database", servers.SERVERS, indirect=True)
one_of_each = pytest.mark.parametrize(
    "database", ["sqlite", "postgresql-psycopg", "mariadb-pymysql"], indirect=True
)


# -- Signals -------------------------------------------------------------------------


def test_worker_ignores_sigint(
    sqlite_database: Database,
    context: BaseContext,
    make_executor: MakeExecutor,
    gate: Gate,
) -> None:
    """Busy or idle: what becomes of its job is for the parent to say."""
    executor = make_executor(sqlite_database.make_engine, 1, context)
    worker = executor.submit(jobs.pid).result(LONGEST)
    os.kill(worker, signal.SIGINT)
    future = executor.submit(failures.insert_at_interrupts, "a", gate.address)
    assert gate.arrival() == worker
    os.kill(worker, signal.SIGINT)
    gate.open()
    future.result(LONGEST)
    assert executor.submit(jobs.pid).result(LONGEST) == worker
    assert sqlite_database.names() == {"a"}


def test_handlers_of_the_parent_are_not_inherited(
    sqlite_database: Database, context: BaseContext, make_executor: MakeExecutor
) -> None:
    """A forked worker would run them in the middle of a job."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        for number in numbers:
            signal.signal(number, lambda *_: None)
        executor = make_executor(sqlite_database.make_engine, 1, context)
        told = executor.submit(failures.handlers).result(LONGEST)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert told.pop("SIGINT") == repr(signal.SIG_IGN)
    assert set(told.values()) == {repr(signal.SIG_DFL)}


# -- The parent is gone --------------------------------------------------------------

ORPHANS = """\
import multiprocessing
from functools import partial

from sqlalchemy import create_engine

import failures
import jobs
from dbpool_executor import DBPoolExecutor

if __name__ == "__main__":
    context = multiprocessing.get_context({method!r})
    executor = DBPoolExecutor(partial(create_engine, {url!r}), 2, context)
    futures = [
        executor.submit(failures.note_and_query, {record!r}, "a"),
        executor.submit(failures.note_and_loop, {record!r}),
    ]
    futures[0].result()
"""


@one_of_each
def test_worker_of_a_killed_parent_ends_in_the_middle_of_its_job(
    database: Database, start_method: str, tmp_path: Path
) -> None:
    """In the middle of a statement or a loop; nothing goes on or stays at the server."""
    record = tmp_path / "record"
    text = ORPHANS.format(
        method=start_method,
        url=database.url.render_as_string(hide_password=False),
        record=str(record),
    )
    with programs.running(tmp_path / "program.py", text) as program:
        wait_until(lambda: record.exists() and len(lines(record)) == 2, "two workers")
        workers = [psutil.Process(pid) for pid in lines(record)]
        wait_until(
            lambda: database.is_sqlite or is_at_work(database), "a long statement"
        )
        program.kill()
        program.wait(LONGEST)
        wait_until(lambda: not any(map(is_alive, workers)), "the workers to end")
        wait_until(lambda: database.sessions() == 0, "the server to end the sessions")
    assert database.count() == 0


def is_alive(process: psutil.Process) -> bool:
    """Whether a process does anything yet; nobody may be there to bury it."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def end_sessions(database: Database) -> None:
    """Have the server end what goes on for clients that are gone."""
    if database.is_postgresql:
        database.rows(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        return
    sql = "SELECT id FROM information_schema.processlist WHERE db = database()"
    for (number,) in database.rows(f"{sql} AND id <> connection_id()"):
        with contextlib.suppress(OperationalError):  # it has ended by itself
            database.execute(f"KILL CONNECTION {number}")
    wait_until(lambda: database.sessions() == 0, "the server to end the sessions")


def lines(record: Path) -> list[int]:
    """Read the process ids that jobs have noted."""
    return [int(line) for line in record.read_text().split()]


def is_at_work(database: Database) -> bool:
    """Whether the server works on the long statement of a job."""
    if database.is_postgresql:
        sql = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
        sql += " AND datname = current_database()"
    else:
        sql = "SELECT 1 FROM information_schema.processlist WHERE state = 'User sleep'"
        sql += " AND db = database()"
    return bool(database.rows(sql))


@only_servers
def test_worker_of_a_killed_parent_does_not_wait_for_a_server_that_is_mute(
    database: Database, tmp_path: Path
) -> None:
    """It would cancel its statement first, and nobody answers."""
    with between(database) as (proxy, make_engine):
        record = tmp_path / "record"
        url = make_engine().url.render_as_string(hide_password=False)
        text = ORPHANS.format(method="forkserver", url=url, record=str(record))
        with programs.running(tmp_path / "program.py", text) as program:
            wait_until(
                lambda: record.exists() and len(lines(record)) == 2, "two workers"
            )
            workers = [psutil.Process(pid) for pid in lines(record)]
            proxy.stall()
            program.kill()
            program.wait(LONGEST)
            wait_until(lambda: not any(map(is_alive, workers)), "the workers to end")
    end_sessions(database)


# -- Workers that do not move --------------------------------------------------------


def test_stopped_worker_does_not_hold_up_the_others(
    sqlite_database: Database,
    context: BaseContext,
    make_executor: MakeExecutor,
    gate: Gate,
) -> None:
    """Its job waits for it, and goes on when it does; a hundred others do not wait."""
    executor = make_executor(sqlite_database.make_engine, 2, context)
    held = executor.submit(jobs.wait_at_gate, gate.address, "held")
    worker = psutil.Process(gate.arrival())
    worker.suspend()
    gate.open()
    others = [executor.submit(jobs.insert_item, f"item {i}") for i in range(100)]
    for other in others:
        other.result(LONGEST)
    assert not held.done()
    worker.resume()
    assert held.result(LONGEST) == "held"
    assert sqlite_database.count() == 100


def test_half_an_answer_does_not_hold_up_the_others(
    sqlite_database: Database, make_executor: MakeExecutor, gate: Gate
) -> None:
    """A worker is stopped in the middle of a large result."""
    executor = make_executor(
        faults.obedient(sqlite_database.make_engine), 2, **faults.OBEDIENT
    )
    executor.submit(jobs.pid).result(LONGEST)
    job = failures.insert_and_give_bytes
    large = executor.submit(job, "large", 300_000_000, gate.address)
    worker = psutil.Process(gate.arrival())
    gate.open()
    time.sleep(0.02)
    worker.suspend()
    others = [executor.submit(jobs.insert_item, f"item {i}") for i in range(100)]
    for other in others:
        other.result(LONGEST)
    if not large.done():  # it was stopped in time, as it is nearly always
        worker.kill()
        assert isinstance(large.exception(LONGEST), ResultLostError)
    assert sqlite_database.names() == {"large", *(f"item {i}" for i in range(100))}


@pytest.mark.heavy
def test_100_mb_in_both_directions_at_once(
    sqlite_database: Database, context: BaseContext, make_executor: MakeExecutor
) -> None:
    """To the same worker and to another: nobody waits for a reader that writes."""
    executor = make_executor(sqlite_database.make_engine, 2, context)
    size = 100_000_000
    sent = b"\1" * size
    futures = [executor.submit(failures.give_bytes, size, sent) for _ in range(4)]
    small = [executor.submit(jobs.add, i, i) for i in range(20)]
    assert [len(future.result(60)) for future in futures] == [size] * 4
    assert [future.result(LONGEST) for future in small] == [2 * i for i in range(20)]


# -- Start trouble -------------------------------------------------------------------

UNGUARDED = """\
import multiprocessing
import sys

import jobs
from dbpool_executor import DBPoolExecutor

print(__name__, flush=True)
executor = DBPoolExecutor({url!r}, 2, multiprocessing.get_context({method!r}))
futures = [executor.submit(jobs.insert_item, f"item {{i}}") for i in range(3)]
errors = [future.exception(60) for future in futures]
print("told", *[type(error).__name__ for error in errors], flush=True)
print("cause", *{{type(error.__cause__).__name__ for error in errors}}, flush=True)
executor.shutdown()
sys.exit(3)
"""
BROKEN_IN_WORKERS = UNGUARDED.replace(
    "print(__name__, flush=True)",
    """print(__name__, flush=True)
if __name__ != "__main__":
    raise LookupError("no configuration")""",
)


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_program_without_guard_is_told_and_ends(
    sqlite_database: Database, tmp_path: Path, method: str
) -> None:
    """Each worker would run the program again; no storm, and no silent wait."""
    text = UNGUARDED.format(url=str(sqlite_database.url), method=method)
    with programs.running(tmp_path / "program.py", text) as program:
        output, errors = program.communicate(timeout=60)
    assert program.returncode == 3
    lines = output.splitlines()
    assert lines.count("__main__") == 1
    assert 3 <= output.count("__mp_main__") <= 5  # two may print at once
    assert "told WorkerStartError WorkerStartError WorkerStartError\n" in output
    assert "cause RuntimeError\n" in output
    assert "if __name__ == '__main__'" in errors
    assert sqlite_database.count() == 0


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_main_module_that_raises_in_workers_is_the_cause(
    sqlite_database: Database, tmp_path: Path, method: str
) -> None:
    """What it raises there is told, though it is imported before anything of ours."""
    text = BROKEN_IN_WORKERS.format(url=str(sqlite_database.url), method=method)
    with programs.running(tmp_path / "program.py", text) as program:
        output, errors = program.communicate(timeout=60)
    assert program.returncode == 3
    lines = output.splitlines()
    assert "told WorkerStartError WorkerStartError WorkerStartError\n" in output
    assert "cause LookupError" in lines
    assert "LookupError: no configuration" in errors


@only_servers
def test_database_that_is_down_and_back_again_needs_no_new_executor(
    database: Database, make_executor: MakeExecutor
) -> None:
    """Jobs fail with OperationalError meanwhile, and the same worker does the next."""
    with between(database) as (proxy, make_engine):
        proxy.go_down()
        executor = make_executor(make_engine, 1)
        worker = executor.submit(jobs.pid).result(LONGEST)
        for _ in range(4):
            with pytest.raises(OperationalError):
                executor.submit(jobs.insert_item, "a").result(LONGEST)
        proxy.come_back()
        executor.submit(jobs.insert_item, "a").result(LONGEST)
        proxy.go_down()
        with pytest.raises(OperationalError):
            executor.submit(jobs.insert_item, "b").result(LONGEST)
        proxy.come_back()
        executor.submit(jobs.insert_item, "b").result(LONGEST)
        assert executor.submit(jobs.pid).result(LONGEST) == worker
        assert executor.stats().died == 0
    assert database.names() == {"a", "b"}


# -- Ctrl-C, twice -------------------------------------------------------------------

INTERRUPTED = """\
import multiprocessing
import signal

import jobs
from dbpool_executor import DBPoolExecutor
from dbpool_executor._api import executor as _executor

_executor.INTERRUPT_GRACE = 600.0

def tell(future):
    print("cancelled" if future.cancelled() else "done", flush=True)

if __name__ == "__main__":
    context = multiprocessing.get_context({method!r})
    with DBPoolExecutor({url!r}, 1, context) as executor:
        held = executor.submit(jobs.insert_at_gate, "held", {address!r})
        waiting = executor.submit(jobs.insert_item, "waiting")
        waiting.add_done_callback(tell)
        print("ready", flush=True)
        signal.pause()  # not in result(), whose lock an interrupt may leave taken
"""


def test_second_ctrl_c_kills_at_once(
    sqlite_database: Database, start_method: str, gate: Gate, tmp_path: Path
) -> None:
    """The first gives the running job all the time it needs, the second none."""
    text = INTERRUPTED.format(
        method=start_method, url=str(sqlite_database.url), address=gate.address
    )
    with programs.running(tmp_path / "program.py", text) as program:
        worker = gate.arrival()
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        os.killpg(program.pid, signal.SIGINT)
        assert program.stdout.readline() == "cancelled\n"
        assert psutil.pid_exists(worker)
        os.killpg(program.pid, signal.SIGINT)
        program.communicate(timeout=LONGEST)
    assert program.returncode == -signal.SIGINT
    wait_until(lambda: not psutil.pid_exists(worker), "the worker to end")
    assert sqlite_database.count() == 0


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_import_that_fails_in_workers_is_the_cause(
    make_executor: MakeExecutor, method: str
) -> None:
    """The error of each job has the worker's own traceback behind it."""
    context = multiprocessing.get_context(method)
    executor = make_executor(only_in_parent.make_engine, 1, context)
    for future in [executor.submit(abs, 1) for _ in range(3)]:
        error = future.exception(LONGEST)
        assert isinstance(error, WorkerStartError)
        assert isinstance(error.__cause__, ImportError)
        assert "a worker cannot import this" in str(error.__cause__.__cause__)


RESOURCES = """\
import multiprocessing
from multiprocessing.shared_memory import SharedMemory

from dbpool_executor import DBPoolExecutor

def begin(*given):
    global lock, number, memory
    lock, number, memory = given

def add(amount):
    with lock:
        number.value += amount
        memory.buf[0] += amount
    return amount

if __name__ == "__main__":
    context = multiprocessing.get_context({method!r})
    memory = SharedMemory(create=True, size=1)
    resources = context.Lock(), context.Value("i"), memory
    with DBPoolExecutor({url!r}, 2, context, begin, resources) as executor:
        print(sum(executor.map(add, range(10))))
    print(resources[1].value, memory.buf[0])
    memory.close()
    memory.unlink()
"""


def test_resources_of_multiprocessing_reach_workers_and_are_not_complained_of(
    sqlite_database: Database, start_method: str, tmp_path: Path
) -> None:
    """Locks, shared values and shared memory; the tracker of resources is silent."""
    text = RESOURCES.format(url=str(sqlite_database.url), method=start_method)
    with programs.running(tmp_path / "program.py", text) as program:
        output, errors = program.communicate(timeout=60)
    assert (program.returncode, output, errors) == (0, "45\n45 45\n", "")


@pytest.mark.parametrize(
    ("initializer", "threshold"), [(None, 10_000), (gc.set_threshold, 50)]
)
def test_worker_collects_garbage_less_often_unless_it_is_told_when(
    sqlite_database: Database,
    make_executor: MakeExecutor,
    initializer: Callable[..., None] | None,
    threshold: int,
) -> None:
    """What the initializer says comes after what the worker does by itself."""
    executor = make_executor(
        sqlite_database.make_engine,
        1,
        initializer=initializer,
        initargs=() if initializer is None else (threshold,),
    )
    found = executor.submit(jobs.collection_threshold).result(LONGEST)
    assert found == threshold


def test_worker_does_not_look_for_garbage_in_what_was_there_before_its_jobs(
    sqlite_database: Database, context: BaseContext, make_executor: MakeExecutor
) -> None:
    """Its engine and all that was imported stay as long as it does."""
    executor = make_executor(sqlite_database.make_engine, 1, context)
    looks = executor.submit(jobs.collector_looks_at_the_engine)
    assert looks.result(LONGEST) is False


def test_worker_that_waits_keeps_nothing_of_a_large_job(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """Neither its arguments nor its result: the next job may be long in coming."""
    executor = make_executor(sqlite_database.make_engine, 1)
    worker = psutil.Process(executor.submit(jobs.pid).result(LONGEST))
    before = worker.memory_info().rss
    large = bytes(100_000_000)
    assert executor.submit(jobs.give, large).result(LONGEST) == large
    wait_until(
        lambda: worker.memory_info().rss < before + len(large) // 2,
        "the worker to give back the memory",
    )
