"""What can fail, stage by stage: the error, its outcome, and what the database holds.

Each row runs on every database, between two innocent jobs. What the network and COMMIT
do is in ``test_commit_lost``; what happens at a moment of COMMIT in ``test_outcomes``.
"""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from sqlalchemy.exc import IntegrityError

import failures
import faults
import jobs
import servers
from dbpool_executor import (
    ArgumentsLostError,
    DBPoolExecutor,
    JobExitedError,
    JobFuture,
    JobTimeoutError,
    NotPlainError,
    Outcome,
    OutcomeUnknownError,
    ResultLostError,
    TransactionAbortedError,
    WorkerDiedError,
    WorkerStartError,
    outcome_of,
)
from dbpool_executor._wire import channel as _channel
from dbpool_executor._wire.locate import name_of
from processes import MakeExecutor, worker_pids
from servers import Database
from waiting import LONGEST, Gate, wait_until


class Fault(NamedTuple):
    """A row of the table.

    Attributes:
        stage: What fails.
        job: What is called, with the name of an item.
        args: What it gets besides.
        error: What its future raises.
        outcome: What both say of the job's transaction.
        stored: Whether the item is there afterwards.
        keeps_worker: Whether the same worker does the next job.
        where: The databases that the row is about.
        options: Of the job.
    """

    stage: str
    job: Callable[..., object]
    args: tuple[object, ...]
    error: type[BaseException]
    outcome: Outcome
    stored: bool
    keeps_worker: bool
    where: list[str] = servers.DATABASES
    options: dict[str, Any] = {}  # noqa: RUF012 - of a tuple, and never changed


BACK, NEVER = Outcome.ROLLED_BACK, Outcome.NEVER_STARTED
DONE, UNKNOWN = Outcome.COMMITTED, Outcome.UNKNOWN
die, leave = faults.die, partial(faults.explode, SystemExit(3))
refuse = partial(faults.explode, PermissionError("refused"))
have = faults.insert_and_have
SHORT = {"timeout": 0.2, "kill_after": 60}
HASTY = {"timeout": 0.2, "kill_after": 0.2}
POSTGRESQLS = servers.POSTGRESQLS
MARIADBS = [name for name in servers.SERVERS if name not in POSTGRESQLS]

# fmt: off
FAULTS = [
    Fault("argument-pickle", jobs.insert_and_give, (faults.FailsToPickle(),), ValueError, NEVER, False, True),
    Fault("argument-unpickle", jobs.insert_and_give, (faults.Explosive(),), ArgumentsLostError, NEVER, False, True),
    Fault("argument-exits", jobs.insert_and_give, (faults.ExitsOnUnpickling(),), ArgumentsLostError, NEVER, False, True),
    Fault("argument-dies", jobs.insert_and_give, (faults.DiesOnUnpickling(),), WorkerDiedError, BACK, False, False),
    Fault("call", jobs.insert_and_raise, (LookupError("no"),), LookupError, BACK, False, True),
    Fault("call-falsy", faults.raise_falsy, (), faults.FalsyError, BACK, False, True),
    Fault("call-exits", jobs.insert_and_raise, (SystemExit(3),), JobExitedError, BACK, False, True),
    Fault("call-interrupted", jobs.insert_and_raise, (KeyboardInterrupt(),), JobExitedError, BACK, False, True),
    Fault("exception-unpickle", faults.raise_explosive, (), faults.ExplosiveError, BACK, False, True),
    Fault("sigkill", faults.insert_and_die, (), WorkerDiedError, BACK, False, False),
    Fault("sigterm", faults.insert_and_die, (signal.SIGTERM,), WorkerDiedError, BACK, False, False),
    Fault("segv", faults.insert_and_die, (signal.SIGSEGV,), WorkerDiedError, BACK, False, False),
    Fault("os-exit", faults.insert_and_exit, (0,), WorkerDiedError, BACK, False, False),
    Fault("statement", failures.insert_twice, (), IntegrityError, BACK, False, True),
    Fault("flush", failures.insert_twice_unflushed, (), IntegrityError, BACK, False, True),
    Fault("swallowed", jobs.insert_and_swallow_error, (), TransactionAbortedError, BACK, False, True, POSTGRESQLS),
    Fault("swallowed-1205", failures.insert_and_swallow_timeout, (), TransactionAbortedError, BACK, False, True, MARIADBS),
    Fault("result-not-plain", faults.give_item, (), NotPlainError, BACK, False, True),
    Fault("result-pickle", faults.give_fails_to_pickle, (), ValueError, BACK, False, True),
    Fault("result-lock", faults.give_lock, (), TypeError, BACK, False, True),
    Fault("commit-hook", have, ("commit", refuse), OutcomeUnknownError, UNKNOWN, False, True),
    Fault("commit-refused", jobs.insert_dangling_link, (), IntegrityError, BACK, False, True, POSTGRESQLS),
    Fault("commit-dies", have, ("commit", die), OutcomeUnknownError, UNKNOWN, False, False),
    Fault("commit-dies-after", have, ("after commit", die), ResultLostError, DONE, True, False),
    Fault("committed-dies", have, ("close", die), ResultLostError, DONE, True, False),
    Fault("result-unpickle", faults.give_explosive, (), ResultLostError, DONE, True, True),
    Fault("result-exits", faults.give_exits_on_unpickling, (), ResultLostError, DONE, True, True),
    Fault("own-commit-dies", faults.commit_oneself_and_die, (), OutcomeUnknownError, UNKNOWN, True, False),
    Fault("timeout-statement", failures.insert_and_query, (), JobTimeoutError, BACK, False, True, options=SHORT),
    Fault("timeout-loop", failures.insert_and_loop, (), JobTimeoutError, BACK, False, True, options=SHORT),
    Fault("timeout-stopped", failures.insert_and_stop, (), JobTimeoutError, BACK, False, False, options=HASTY),
]
# fmt: on
ROWS = [
    pytest.param(fault, name, id=f"{fault.stage}-{name}")
    for fault in FAULTS
    for name in fault.where
]


@pytest.mark.parametrize(("fault", "database"), ROWS, indirect=["database"])
def test_failure_is_told_exactly_and_costs_one_job(
    database: Database, make_executor: MakeExecutor, fault: Fault
) -> None:
    """The row's error and outcome, its item as it says, and the innocent jobs done."""
    database.execute("INSERT INTO item (name, amount) VALUES ('locked', 0)")
    executor = make_executor(
        faults.obedient(database.make_engine), 1, **faults.OBEDIENT
    )
    before = executor.submit(jobs.insert_and_tell_pid, "before")
    view = executor.options(**fault.options)
    future: JobFuture[object] = view.submit(fault.job, "a", *fault.args)
    after = executor.submit(jobs.insert_and_tell_pid, "after")
    with pytest.raises(fault.error) as raised:
        future.result(LONGEST)
    assert outcome_of(raised.value) is fault.outcome
    assert future.outcome is fault.outcome
    note = f"job {name_of(fault.job)}: {fault.outcome.value}"
    assert [n for n in raised.value.__notes__ if n.startswith("job ")] == [note]
    is_same = before.result(LONGEST) == after.result(LONGEST)
    assert is_same is fault.keeps_worker
    assert before.outcome is after.outcome is Outcome.COMMITTED
    stored = {"a"} if fault.stored else set()
    assert database.names() == {"locked", "before", "after"} | stored
    assert len(worker_pids()) == 1
    stats = executor.stats()
    assert (stats.done, stats.failed) == (2, 1 - (fault.stage == "argument-pickle"))
    assert stats.died == (not fault.keeps_worker)


# -- Facts: "What one bad event does to the other jobs" ------------------------------

OTHERS = [f"item {i}" for i in range(36)]


def with_36_others(
    executor: DBPoolExecutor, job: Callable[..., object], *args: object
) -> Future[object]:
    """Submit a job in the middle of 36 others, and see those done."""
    some = [executor.submit(jobs.insert_item, name) for name in OTHERS[:18]]
    future: Future[object] = executor.submit(job, *args)
    some += [executor.submit(jobs.insert_item, name) for name in OTHERS[18:]]
    for other in some:
        other.result(LONGEST)
    return future


@pytest.mark.parametrize(
    ("job", "args", "error"),
    [
        (faults.insert_and_die, (), WorkerDiedError),
        (faults.raise_explosive, (), faults.ExplosiveError),
        (faults.give_explosive, (), ResultLostError),
        (jobs.insert_and_give, (faults.Explosive(),), ArgumentsLostError),
    ],
    ids=["killed", "exception", "result", "argument"],
)
def test_bad_job_costs_none_of_36_others(
    sqlite_database: Database,
    context: BaseContext,
    make_executor: MakeExecutor,
    job: Callable[..., object],
    args: tuple[object, ...],
    error: type[Exception],
) -> None:
    """Killed, or raising on unpickling as exception, as result and as argument."""
    executor = make_executor(sqlite_database.make_engine, 2, context)
    future = with_36_others(executor, job, "bad", *args)
    assert type(future.exception(LONGEST)) is error
    assert sqlite_database.names() - {"bad"} == set(OTHERS)
    assert executor.stats().done == 36


def test_idle_worker_that_is_killed_costs_no_job(
    sqlite_database: Database, context: BaseContext, make_executor: MakeExecutor
) -> None:
    """Nor does it cost the executor."""
    executor = make_executor(sqlite_database.make_engine, 2, context)
    psutil.Process(executor.submit(jobs.pid).result(LONGEST)).kill()
    with_36_others(executor, jobs.pid).result(LONGEST)
    assert sqlite_database.names() == set(OTHERS)


def test_initializer_that_raises_tells_its_cause_to_every_job(
    sqlite_database: Database, context: BaseContext, make_executor: MakeExecutor
) -> None:
    """No storm and no silence: one error object for each future, with the cause."""
    executor = make_executor(
        sqlite_database.make_engine, 2, context, initializer=faults.fail_to_initialize
    )
    futures = [executor.submit(jobs.insert_item, name) for name in OTHERS[:5]]
    errors = [future.exception(LONGEST) for future in futures]
    assert {type(error) for error in errors} == {WorkerStartError}
    assert len(set(map(id, errors))) == 5
    assert all("no such table" in str(e.__cause__) for e in errors if e)
    wait_until(lambda: not worker_pids(), "the last worker to end")
    assert sqlite_database.count() == 0


def test_worker_that_dies_once_in_its_initializer_costs_no_job(
    sqlite_database: Database,
    context: BaseContext,
    make_executor: MakeExecutor,
    tmp_path: Path,
) -> None:
    """Another is started."""
    executor = make_executor(
        sqlite_database.make_engine,
        1,
        context,
        initializer=failures.die_once,
        initargs=(tmp_path / "record",),
    )
    with_36_others(executor, jobs.pid).result(LONGEST)
    assert sqlite_database.names() == set(OTHERS)
    assert len((tmp_path / "record").read_text().split()) == 2


@pytest.mark.heavy
def test_worker_that_is_killed_while_it_sends_costs_no_other_job(
    sqlite_database: Database,
    context: BaseContext,
    make_executor: MakeExecutor,
    gate: Gate,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A result of 200 MB ends anywhere: its job is told of exactly."""
    executor = make_executor(
        faults.obedient(sqlite_database.make_engine), 2, context, **faults.OBEDIENT
    )
    chance = random.Random(4)
    job = failures.insert_and_give_bytes
    for i in range(4):
        future = executor.submit(job, f"large {i}", 200_000_000, gate.address)
        worker = psutil.Process(gate.arrival())
        # What the channel holds at the end is an answer, if it is the rest of one.
        killed = kill_at(worker, chance.randrange(190_000_000), monkeypatch)
        gate.open()
        assert killed.wait(LONGEST)
        assert isinstance(future.exception(LONGEST), ResultLostError)
    with_36_others(executor, jobs.pid).result(LONGEST)
    assert sqlite_database.names() == {*OTHERS, *(f"large {i}" for i in range(4))}


def is_dead(process: psutil.Process) -> bool:
    """Say whether a process has ended, whoever asks for its exit code."""
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def kill_at(
    worker: psutil.Process, offset: int, monkeypatch: pytest.MonkeyPatch
) -> threading.Event:
    """Kill a worker when so many bytes of its large result have been received.

    Returns:
        Set once it is killed.
    """
    killed = threading.Event()
    advance = _channel._LargeMessage.advance
    received = 0

    def count(message: _channel._LargeMessage, size: int) -> None:
        nonlocal received
        received += size
        if received >= offset and not killed.is_set():
            worker.kill()
            # It sends on as long as there is room.
            wait_until(lambda: is_dead(worker), "the end of the worker")
            killed.set()
        advance(message, size)

    monkeypatch.setattr(_channel._LargeMessage, "advance", count)
    return killed
