"""What workers log, as the parent's handlers see it."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import threading
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import BaseContext
from pathlib import Path

import pytest

import jobs
import logging_jobs
from dbpool_executor import JobTimeoutError, WorkerDiedError
from dbpool_executor._worker.log_forwarding import Forwarder
from dbpool_executor._worker.timeout import Alarm, JobInterrupt
from processes import MakeExecutor
from servers import Database
from waiting import LONGEST

pytestmark = pytest.mark.usefixtures("levels")


@pytest.fixture
def levels(caplog: pytest.LogCaptureFixture) -> None:
    """Have the parent's loggers let through what the jobs of these tests log."""
    caplog.set_level(logging.INFO, "tests.jobs")


def told(caplog: pytest.LogCaptureFixture, name: str = "tests.jobs") -> list[str]:
    """Give the texts of one logger, in the order in which they were handled."""
    return [r.getMessage() for r in caplog.records if r.name == name]


def test_records_come_in_order_and_before_the_jobs_future_is_done(
    sqlite_database: Database,
    context: BaseContext,
    make_executor: MakeExecutor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each tells which worker it is from.

    Jobs that were taken back from two workers may come to one of them in another order.
    """
    executor = make_executor(sqlite_database.make_engine, 2, context, forward_logs=True)
    by_worker = defaultdict(list)
    futures = [executor.submit(logging_jobs.log_numbers, 10 * i, 10) for i in range(20)]
    for i, future in enumerate(futures):
        by_worker[future.result(LONGEST)].append([*range(10 * i, 10 * i + 10)])
        assert {f"number {n}" for n in range(10 * i, 10 * i + 10)} <= set(told(caplog))
    seen = defaultdict(list)
    for record in caplog.records:
        if record.name == "tests.jobs":
            seen[record.process].append(record.__dict__["number"])
    jobs_seen = {
        pid: sorted(numbers[first : first + 10] for first in range(0, len(numbers), 10))
        for pid, numbers in seen.items()
    }
    assert jobs_seen == by_worker


def test_each_record_is_handled_once(
    sqlite_database: Database,
    context: BaseContext,
    make_executor: MakeExecutor,
    tmp_path: Path,
) -> None:
    """By the parent's handlers alone, also where workers inherit them."""
    handler = logging.FileHandler(tmp_path / "log")
    logger = logging.getLogger("tests.jobs")
    logger.addHandler(handler)
    try:
        with make_executor(
            sqlite_database.make_engine, 1, context, forward_logs=True
        ) as executor:
            executor.submit(logging_jobs.log_numbers, 0, 3).result(LONGEST)
    finally:
        logger.removeHandler(handler)
        handler.close()
    assert (tmp_path / "log").read_text() == "number 0\nnumber 1\nnumber 2\n"


def test_nothing_is_lost_at_the_end_of_a_worker(
    sqlite_database: Database,
    context: BaseContext,
    make_executor: MakeExecutor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Neither what its initializer and finalizer log, nor what several threads do."""
    with make_executor(
        sqlite_database.make_engine,
        1,
        context,
        initializer=logging_jobs.log_numbers,
        initargs=(0, 1),
        finalizer=logging_jobs.log_numbers,
        finalargs=(1, 1),
        forward_logs=True,
    ) as executor:
        executor.submit(logging_jobs.log_in_threads, 1000).result(LONGEST)
    texts = told(caplog)
    assert (texts[0], texts[-1], len(texts)) == ("number 0", "number 1", 5002)


def test_last_words_of_a_worker_that_dies_are_handled(
    sqlite_database: Database,
    make_executor: MakeExecutor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """They were sent when they were logged."""
    executor = make_executor(sqlite_database.make_engine, 1, forward_logs=True)
    with pytest.raises(WorkerDiedError):
        executor.submit(logging_jobs.log_and_die).result(LONGEST)
    assert told(caplog) == ["last words"]


def test_what_does_not_pickle_is_told_in_words(
    sqlite_database: Database,
    make_executor: MakeExecutor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A traceback arrives as text, an attribute that does not pickle not at all."""
    executor = make_executor(sqlite_database.make_engine, 1, forward_logs=True)
    executor.submit(logging_jobs.log_exception).result(LONGEST)
    (text,) = told(caplog)
    assert text.startswith("failed\nTraceback")
    assert text.endswith("LookupError: nowhere")


def test_warnings_are_forwarded(
    sqlite_database: Database,
    make_executor: MakeExecutor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Under the name that ``logging.captureWarnings`` gives them."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        context = multiprocessing.get_context("fork")
        executor = make_executor(
            sqlite_database.make_engine, 1, context, forward_logs=True
        )
        executor.submit(logging_jobs.warn).result(LONGEST)
    (text,) = told(caplog, "py.warnings")
    assert "UserWarning: old ways" in text


def test_records_below_the_parents_level_are_not_handled(
    sqlite_database: Database,
    context: BaseContext,
    make_executor: MakeExecutor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The levels that were set when the executor was made hold in workers."""
    caplog.set_level(logging.WARNING, "tests.jobs")
    executor = make_executor(sqlite_database.make_engine, 1, context, forward_logs=True)
    caplog.set_level(logging.INFO, "tests.jobs")
    executor.submit(logging_jobs.log_numbers, 0, 3).result(LONGEST)
    executor.submit(logging_jobs.log_exception).result(LONGEST)
    assert [text.partition("\n")[0] for text in told(caplog)] == ["failed"]


def test_copy_that_a_job_forks_is_not_held_up_by_what_it_logs(
    sqlite_database: Database,
    make_executor: MakeExecutor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Another thread may have been sending a record at the fork; its own are dropped."""
    executor = make_executor(sqlite_database.make_engine, 1, forward_logs=True)
    assert executor.submit(logging_jobs.log_in_copies, 20).result(LONGEST) == {0}
    assert set(told(caplog)) <= {"in the worker"}


def test_time_limit_does_not_cut_a_record(
    sqlite_database: Database,
    make_executor: MakeExecutor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A job is interrupted between two of them, and the worker goes on."""
    executor = make_executor(sqlite_database.make_engine, 1, forward_logs=True)
    worker = executor.submit(jobs.pid).result(LONGEST)
    limited = executor.options(timeout=0.05)
    for _ in range(10):
        with pytest.raises(JobTimeoutError):
            limited.submit(logging_jobs.log_for_ever).result(LONGEST)
    assert executor.submit(jobs.pid).result(LONGEST) == worker
    assert set(told(caplog)) == {"again"}


def test_records_stay_in_workers_unless_asked_for(
    sqlite_database: Database,
    make_executor: MakeExecutor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As in the standard pool."""
    executor = make_executor(sqlite_database.make_engine, 1)
    executor.submit(logging_jobs.log_exception).result(LONGEST)
    assert told(caplog) == []


def test_record_is_sent_while_the_time_limit_is_paused() -> None:
    """It would cut a message in two, and whatever follows it."""
    sent_while: list[str] = []
    state = "running"

    @contextmanager
    def paused() -> Iterator[None]:
        nonlocal state
        state = "paused"
        yield
        state = "running"

    forwarder = Forwarder(lambda _data: sent_while.append(state))
    forwarder.uninterrupted = paused
    forwarder.handle(logging.makeLogRecord({"msg": "whole"}))
    assert (sent_while, state) == (["paused"], "running")


def test_time_limit_that_is_paused_strikes_afterwards() -> None:
    """No signal is heard inside the block, and none is needed at its end."""
    tries = threading.Semaphore(0)
    alarm = Alarm(tries.release)
    before = signal.getsignal(signal.SIGURG)
    steps: list[str] = []

    def work() -> None:
        with alarm.paused():
            for _ in range(3):  # from the second on, a signal comes with it
                assert tries.acquire(timeout=LONGEST)
            steps.append("whole")
        steps.append("too late")

    try:
        with pytest.raises(JobInterrupt), alarm.set(0.0):
            work()
    finally:
        signal.signal(signal.SIGURG, before)
    assert steps == ["whole"]
