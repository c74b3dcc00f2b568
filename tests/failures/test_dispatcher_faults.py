"""What raises in the dispatcher's thread costs a job, and never the thread."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import selectors
import time
from collections.abc import Callable
from concurrent.futures import wait
from typing import Any, NoReturn

import pytest

import faults
import jobs
import logging_jobs
from dbpool_executor import DBPoolExecutor, JobFuture, Outcome
from dbpool_executor._dispatch import dispatcher, fleet, job
from dbpool_executor._launch.local import LocalWorker
from dbpool_executor._wire.channel import Channel
from dbpool_executor._wire.short_answers import AnswerReader
from processes import MakeExecutor
from servers import Database
from waiting import LONGEST, wait_until


class _Full(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        raise SystemExit(record.getMessage())


def test_log_handler_that_always_raises(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """A worker that dies is logged of, and a later job is done."""
    handler = _Full()
    log = logging.getLogger("dbpool_executor")
    log.addHandler(handler)
    try:
        executor = make_executor(sqlite_database.make_engine, max_workers=1)
        with pytest.raises(concurrent.futures.BrokenExecutor):
            executor.submit(eval, "__import__('os')._exit(1)").result(LONGEST)
        assert executor.submit(abs, -1).result(LONGEST) == 1
    finally:
        log.removeHandler(handler)


PLACES = [
    (Channel, "receive"),
    (Channel, "send"),
    (AnswerReader, "read"),
    (LocalWorker, "__init__"),
    (LocalWorker, "bury"),
    (LocalWorker, "progress"),
    (selectors.DefaultSelector, "register"),
    (selectors.DefaultSelector, "unregister"),
    (selectors.DefaultSelector, "select"),
    (dispatcher, "read"),
    (fleet, "messages_for"),
    (job, "loads_result"),
    (job, "loads_failure"),
]


@pytest.mark.parametrize(
    ("where", "name"), PLACES, ids=[f"{w.__name__}.{n}" for w, n in PLACES]
)
def test_call_that_raises_once(
    where: Any,
    name: str,
    sqlite_database: Database,
    make_executor: MakeExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All futures end, each with an outcome, and so does the executor."""
    original: Callable[..., Any] = getattr(where, name)
    raised: list[BaseException] = []
    executor = make_executor(sqlite_database.make_engine, max_workers=1)
    patched = where is not selectors.DefaultSelector or name != "register"
    if patched and name != "__init__":
        executor.submit(abs, -1).result(LONGEST)

    def raise_once(*args: Any, **kwargs: Any) -> Any:
        if not raised:
            raised.append(MemoryError("made up"))
            raise raised[0]
        return original(*args, **kwargs)

    monkeypatch.setattr(where, name, raise_once)
    futures: list[JobFuture[Any]]
    futures = [executor.submit(jobs.insert_item, str(n)) for n in range(4)]
    futures.append(executor.submit(faults.insert_and_exit, "4", 1))
    futures += [executor.submit(divmod, 7, n % 2) for n in range(4)]
    futures.append(executor.submit(eval, "'x' * 100_000"))
    assert not wait(futures, LONGEST).not_done
    assert raised
    executor.shutdown()
    check_outcomes(sqlite_database, futures, written=5)
    assert not executor.stats().workers


def check_outcomes(
    database: Database, futures: list[JobFuture[Any]], written: int
) -> None:
    """Ask the database whether each future has told the truth.

    Args:
        database: That of the jobs.
        futures: Of which the first have each written an item that bears their index.
        written: How many.
    """
    assert all(isinstance(future.outcome, Outcome) for future in futures)
    names = [name for (name,) in database.rows("SELECT name FROM item")]
    for number, future in enumerate(futures[:written]):
        count = names.count(str(number))
        if future.outcome is Outcome.UNKNOWN:
            assert count <= 1
        else:
            assert count == (future.outcome is Outcome.COMMITTED), number


@pytest.mark.parametrize("name", ["kill", "recall", "progress", "stop"])
def test_call_to_a_worker_that_raises_once(
    name: str,
    sqlite_database: Database,
    make_executor: MakeExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Such as that which ends it, or takes back what was sent ahead."""
    original: Callable[..., Any] = getattr(LocalWorker, name)
    raised: list[BaseException] = []

    def raise_once(*args: Any, **kwargs: Any) -> Any:
        if not raised:
            raised.append(MemoryError("made up"))
            raise raised[0]
        return original(*args, **kwargs)

    executor = make_executor(sqlite_database.make_engine, max_workers=2)
    executor.start_workers(wait=True)
    assert list(executor.map(abs, range(50))) == list(range(50))
    monkeypatch.setattr(LocalWorker, name, raise_once)
    futures: list[JobFuture[Any]]
    futures = [executor.submit(jobs.insert_item, str(n)) for n in range(40)]
    # Those behind it are taken back.
    futures.insert(20, executor.submit(time.sleep, 0.3))
    patient = executor.options(timeout=0.2, kill_after=0.1)
    overdue = patient.submit(faults.hold_out)
    if name == "kill":  # it is what is done where messages do not pass

        def fail_to_receive(*_: object) -> NoReturn:
            raise MemoryError("made up as well")

        monkeypatch.setattr(Channel, "receive", fail_to_receive)
        wait_until(lambda: raised, "a worker to be killed")
        monkeypatch.undo()
    assert not wait([*futures, overdue], LONGEST).not_done
    # Whether jobs had to be taken back hangs on how fast the machine was.
    assert raised or name in ("recall", "progress")
    assert executor.submit(abs, -1).result(LONGEST) == 1
    executor.shutdown()
    check_outcomes(sqlite_database, futures[:20] + futures[21:], written=40)
    assert not executor.stats().workers


@pytest.mark.parametrize("cls", [ValueError, MemoryError, SystemExit])
def test_callback_that_raises(
    cls: type[BaseException], sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """It is called in the dispatcher's thread, and costs nobody anything."""

    def fail(_: object) -> NoReturn:
        raise cls

    executor = make_executor(sqlite_database.make_engine, max_workers=1)
    futures = [executor.submit(abs, -n) for n in range(20)]
    for future in futures:
        future.add_done_callback(fail)
    assert [future.result(LONGEST) for future in futures] == list(range(20))
    assert executor.submit(abs, -1).result(LONGEST) == 1


def test_filter_that_raises_for_what_a_worker_logs(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """The records are lost, and no job."""

    def refuse(record: logging.LogRecord) -> bool:
        raise SystemExit(record.getMessage())

    log = logging.getLogger()
    log.addFilter(refuse)
    handler = _Full()
    log.addHandler(handler)
    try:
        executor = make_executor(
            sqlite_database.make_engine, max_workers=1, forward_logs=True
        )
        for _ in range(3):
            executor.submit(logging_jobs.log_numbers, 0, 5).result(LONGEST)
    finally:
        log.removeFilter(refuse)
        log.removeHandler(handler)


@pytest.mark.parametrize(
    "cls",
    [
        SystemExit,
        GeneratorExit,
        asyncio.CancelledError,
        concurrent.futures.CancelledError,
    ],
)
def test_what_forces_an_end_cancels_what_waits(
    cls: type[BaseException], sqlite_database: Database
) -> None:
    """As Ctrl-C does; the job that runs ends by itself."""
    with (
        pytest.raises(cls),
        DBPoolExecutor(sqlite_database.make_engine, 1) as executor,
    ):
        executor.submit(abs, -1).result(LONGEST)
        running = executor.submit(time.sleep, 0.5)
        # As long as the suite may last: it must not be begun.
        waiting = [executor.submit(time.sleep, LONGEST) for _ in range(3)]
        while not running.running():
            time.sleep(0.001)
        raise cls
    assert running.outcome is Outcome.COMMITTED
    assert all(future.cancelled() for future in waiting)
