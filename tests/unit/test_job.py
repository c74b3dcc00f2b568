"""A job on the parent's side: its future, what goes in one message, who is woken when.

No process.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import (
    CancelledError,
    Future,
    InvalidStateError,
    as_completed,
    wait,
)
from typing import Any, NoReturn

import pytest

import jobs
from dbpool_executor._dispatch import job as _job
from dbpool_executor._dispatch.batches import _GROUP_BYTES, messages_for, next_jobs
from dbpool_executor._dispatch.dispatcher import Dispatcher
from dbpool_executor._dispatch.job import Job, Told, end_unasked, read, taken
from dbpool_executor._wire.calls import Call, Name, dumps_result, loads_calls
from dbpool_executor._wire.channel import Kind, Message
from dbpool_executor._wire.exceptions import dumps_exception
from dbpool_executor._wire.options import DEFAULTS, loads_options
from dbpool_executor.errors import ResultLostError, WorkerStartError
from waiting import LONGEST, wait_until


def never() -> NoReturn:
    """Stand for what a dispatcher without jobs does not call."""
    raise AssertionError


def make_job(call: bytes = b"call", timeout: float | None = None) -> Job:
    """Make a job as ``submit()`` does."""
    return Job(None, call, DEFAULTS.with_(timeout=timeout))


def in_thread(call: Any) -> threading.Thread:
    """Call something in a thread that waits."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


# -- The future ------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, 0, "text"])
def test_result_that_nobody_waits_for_is_there(value: object) -> None:
    """It takes the fast path, and is found by whoever comes later."""
    job = make_job()
    assert job.take()
    assert not end_unasked([job], [value])
    assert job.done()
    assert not job.is_asked_for()
    assert job.result(0) is value
    assert job.exception(0) is None
    called: list[object] = []
    job.add_done_callback(called.append)
    assert called == [job]
    assert wait([job], 0).done == {job}


def test_fast_path_is_closed_to_jobs_that_were_asked_for() -> None:
    """And to what is cancelled, or done already, or closed it itself."""
    jobs = [make_job() for _ in range(6)]
    asked, _, cancelled, done, closed, job = jobs
    asked.add_done_callback(print)
    assert cancelled.cancel()
    assert taken([asked, cancelled, done, closed, job]) == [asked, done, closed, job]
    assert [j._state for j in jobs] == [
        "RUNNING", "PENDING", "CANCELLED_AND_NOTIFIED", "RUNNING", "RUNNING", "RUNNING"
    ]  # fmt: skip
    assert not end_unasked([done], [1])
    closed.close_fast_path()
    left = end_unasked(jobs, range(6))
    assert left == list(zip(jobs, range(6), strict=True))[:-1]
    assert job.result(0) == 5
    assert done.result(0) == 1


def test_what_answers_bring_is_read_in_order() -> None:
    """An exception comes by no fast path, and only its own job has it."""

    def pickled(value: object) -> bytes:
        return b"".join(bytes(part) for part in dumps_result(value))

    told: list[tuple[Told, object]] = [
        (-5, -5),
        (pickled("short") + bytes(9), "short"),
        (Message(Kind.RESULT, dumps_result([1, 2])), [1, 2]),
        (Message(Kind.FAILURE, dumps_exception(KeyError("its"))), KeyError),
        (LookupError("ours"), LookupError),
        (b"no pickle", ResultLostError),
        (Message(Kind.RESULT, [b"no pickle"]), ResultLostError),
        (pickled(LookupError("a value")), LookupError),
        (0, 0),
    ]
    jobs = taken([make_job() for _ in told])
    results, errors = read(jobs, [what for what, _ in told])
    assert list(errors) == jobs[3:7]
    left = end_unasked(jobs, results)
    assert [job for job, _ in left] == jobs[3:7]
    for job, result in left:
        job.end(result, errors.get(job))
    for job, (_, expected) in zip(
        jobs[:3] + jobs[8:], told[:3] + told[8:], strict=True
    ):
        assert job.result(0) == expected
    for job, (_, expected) in zip(jobs[3:7], told[3:7], strict=True):
        assert type(job.exception(0)) is expected
    assert isinstance(jobs[7].result(0), LookupError)


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads pass the interpreter to each other all the time."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("turn", range(40))
def test_whoever_asks_in_the_middle_of_the_short_way_hears_of_it_once(
    turn: int,
) -> None:
    """A job is run or cancelled, never both, and each callback is called once."""
    jobs = [make_job() for _ in range(100)]
    start = threading.Barrier(4)
    called: list[Future[Any]] = []
    results: list[object] = []

    def ask() -> None:
        start.wait(LONGEST)
        for job in jobs[turn:]:
            job.add_done_callback(called.append)

    def cancel() -> None:
        start.wait(LONGEST)
        for job in reversed(jobs):
            job.cancel()

    def wait_for_all() -> None:
        start.wait(LONGEST)
        for job in jobs:
            try:
                results.append(job.result(LONGEST))
            except CancelledError:
                results.append(None)

    threads = [in_thread(call) for call in (ask, cancel, wait_for_all)]
    start.wait(LONGEST)
    run = taken(jobs)
    for job, result in end_unasked(run, run):
        job.end(result, None)
    for thread in threads:
        thread.join(LONGEST)
        assert not thread.is_alive()
    assert results == [job if job in run else None for job in jobs]
    assert all(job.cancelled() != (job in run) for job in jobs)
    assert sorted(map(id, called)) == sorted(map(id, jobs[turn:]))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_copy_may_ask_for_a_job_whatever_threads_did_at_the_fork() -> None:
    """The lock of the fast path is not taken for ever there."""
    entered, forking = threading.Event(), threading.Event()

    def hold() -> None:
        with _job._lock:
            entered.set()
            forking.wait(LONGEST)
            time.sleep(0.2)  # the fork waits for it, or has happened by then

    holder = in_thread(hold)
    assert entered.wait(LONGEST)
    os.register_at_fork(before=forking.set)  # called before those of the package
    pid = os.fork()
    if not pid:
        is_free = _job._lock.acquire(timeout=1)
        os._exit(0 if is_free and not make_job().is_asked_for() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    holder.join(LONGEST)
    assert not holder.is_alive()


def test_job_that_is_done_keeps_no_arguments() -> None:
    """Its caller may keep the future, and they may be large."""
    short, asked, failed = (make_job(bytes(100)) for _ in range(3))
    for job in (short, asked, failed):
        assert job.take()
        assert job.call
    asked.add_done_callback(lambda _: None)
    end_unasked([short], [1])
    asked.end(1, None)
    failed.end(None, LookupError())
    assert not (short.call or asked.call or failed.call)


def test_future_has_what_every_future_has() -> None:
    """It does without ``Future.__init__``, whatever that may come to do."""
    ours, theirs = make_job(), vars(Future())
    assert hasattr(ours, "_condition")
    assert list(ours._waiters) == theirs.pop("_waiters")
    del theirs["_condition"]
    assert {name: getattr(ours, name) for name in theirs} == theirs


def test_collector_of_garbage_looks_at_a_fifth_for_a_future() -> None:
    """There may be a hundred thousand of them, and it looks at each more than once."""

    def make_short() -> Job:
        return Job(("jobs", "give"), (1,), DEFAULTS)

    def objects_of(make: Callable[[], object]) -> int:
        before = len(gc.get_objects())
        futures = [make() for _ in range(100)]
        return len(gc.get_objects()) - before - len([futures])

    gc.collect()
    gc.disable()
    try:
        assert objects_of(make_short) * 5 <= objects_of(Future)
    finally:
        gc.enable()


def test_future_that_changes_while_wait_looks_at_it_is_counted_once() -> None:
    """``wait()`` locks nothing, and still sees all futures at one moment."""

    class Changes(Future[Any]):
        """Stands among the futures, and has another done at a step of wait()."""

        def __init__(self, when: int, call: Callable[[], object]) -> None:
            self.steps = {when: call}
            self.step = 0
            super().__init__()

        @property  # type: ignore[override]
        def _state(self) -> str:
            self.step += 1
            self.steps.pop(self.step, int)()
            return "FINISHED"

        @_state.setter
        def _state(self, _state: str) -> None: ...

    for when in (1, 2):  # as it looks for those that are done, and when it counts
        done, later = make_job(), make_job()
        for future in (done, later):
            future.set_running_or_notify_cancel()
        changes = Changes(when, lambda future=done: future.set_result(1))
        timer = threading.Timer(0.02, later.set_result, (2,))
        timer.start()
        assert not wait([done, changes, later], LONGEST).not_done
        assert not changes.steps
        timer.join()


def test_view_of_an_interrupted_wait_is_not_seen_later() -> None:
    """Neither by another wait(), nor in what is told of the future."""
    future = make_job()
    future.set_running_or_notify_cancel()
    future._condition.acquire()
    future.set_result(1)
    assert future.done()
    assert "finished" in repr(future)
    future._condition.acquire()
    assert wait([future], 0).done == {future}


def test_each_who_waits_is_told() -> None:
    """In result(), by a callback, in wait() and in as_completed()."""
    told: list[object] = []

    def by_result(future: Job) -> None:
        told.append(future.result(LONGEST))

    def by_wait(future: Job) -> None:
        told.append([f.result() for f in wait([future], LONGEST).done])

    def by_as_completed(future: Job) -> None:
        told.append([f.result() for f in as_completed([future], LONGEST)])

    for waiter, expected in ((by_result, 5), (by_wait, [5]), (by_as_completed, [5])):
        future = make_job()
        future.set_running_or_notify_cancel()
        thread = in_thread(lambda w=waiter, f=future: w(f))
        wait_until(future.is_asked_for, "somebody who waits")
        future.set_result(5)
        thread.join(LONGEST)
        assert told.pop() == expected
    future = make_job()
    future.add_done_callback(lambda f: told.append(f.result()))
    assert future.is_asked_for()
    future.set_running_or_notify_cancel()
    future.set_result(6)
    assert told == [6]


def test_cancelled_future_is_neither_run_nor_given_a_result() -> None:
    """As for every future; a second result is refused as well."""
    cancelled = make_job()
    assert cancelled.cancel()
    assert not cancelled.set_running_or_notify_cancel()
    done = make_job()
    done.set_running_or_notify_cancel()
    done.set_result(1)
    for future in (cancelled, done):
        with pytest.raises(InvalidStateError):
            future.set_result(2)
    with pytest.raises(CancelledError):
        cancelled.result(0)
    assert not done.cancel()
    assert done.result(0) == 1


def test_result_that_is_not_there_in_time_is_told() -> None:
    """And the exception, once it is there, is raised each time."""
    future = make_job()
    with pytest.raises(TimeoutError):
        future.result(0)
    future.set_running_or_notify_cancel()
    future.set_exception(LookupError("gave up"))
    for _ in range(2):
        with pytest.raises(LookupError, match="gave up"):
            future.result(0)


def test_who_waits_is_woken_when_all_else_is_settled() -> None:
    """It would want the interpreter in the middle; among those told the order stays."""
    dispatcher = Dispatcher(never, never, 1, None, forks=False)
    made = [make_job() for _ in range(6)]
    seen: list[tuple[int, list[bool]]] = []
    for number in (1, 3):
        made[number].add_done_callback(
            lambda _, n=number: seen.append((n, [j.done() for j in made]))
        )
    for job in made:
        assert job.take()
        dispatcher._tell(job, Message(Kind.RESULT, [b"N."]))
    dispatcher._settle()
    dispatcher.close()
    assert seen == [(1, [True, True, True, False, True, True]), (3, [True] * 6)]
    assert all(job.result(0) is None for job in made)


# -- The end ----------------------------------------------------------------------------


def test_job_that_comes_when_the_thread_has_ended_is_refused() -> None:
    """Nobody would do it, and its future would never be done."""
    dispatcher = Dispatcher(never, lambda: None, 1, None, forks=False)

    class Late(deque[Job]):
        def append(self, job: Job) -> None:
            dispatcher.shutdown(cancel=False)
            dispatcher.join(LONGEST)
            super().append(job)

    dispatcher._open()
    dispatcher._waiting = Late()
    with pytest.raises(RuntimeError, match="after shutdown"):
        dispatcher.add(None, b"call", DEFAULTS)
    assert dispatcher.health() == "shut down"
    assert all(job.cancelled() for job in dispatcher._waiting)
    assert dispatcher.stats().queued == 0


def test_job_that_comes_for_an_offer_that_is_gone_is_refused_as_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The thread took it back and ended, a moment after it was seen."""
    dispatcher = Dispatcher(never, lambda: None, 1, None, forks=False)
    dispatcher._open()

    def end(_: Job) -> bool:
        dispatcher.shutdown(cancel=False)
        dispatcher.join(LONGEST)
        return False

    monkeypatch.setattr(dispatcher._offers, "standing", object())
    monkeypatch.setattr(dispatcher._offers, "withdraw", lambda: None)
    monkeypatch.setattr(dispatcher, "_take_offer", end)
    with pytest.raises(RuntimeError, match="after shutdown"):
        dispatcher.add(None, b"call", DEFAULTS)


def test_job_that_comes_while_the_thread_looks_for_the_last_time_is_refused() -> None:
    """It says that it has ended before it looks, and not only then."""
    dispatcher = Dispatcher(never, lambda: None, 1, None, forks=False)
    refused: list[bool] = []

    class Looked(deque[Job]):
        def __len__(self) -> int:
            seen = super().__len__()
            if dispatcher._closing and not refused:
                dispatcher._is_open = True  # as if it had been asked before the end
                refused.append(False)
                with pytest.raises(RuntimeError, match="after shutdown"):
                    dispatcher.add(None, b"call", DEFAULTS)
                refused[0] = True
            return seen

    dispatcher._waiting = Looked()
    dispatcher._open()
    dispatcher.shutdown(cancel=False)
    dispatcher.join(LONGEST)
    assert refused == [True]


def test_job_that_comes_while_others_are_spared_is_not_in_the_way() -> None:
    """A caller may have asked whether it is open before it was shut down."""
    dispatcher = Dispatcher(never, never, 1, None, forks=False)

    class Overtaken(Job):
        def cancelled(self) -> bool:
            dispatcher._waiting.append(make_job())
            return super().cancelled()

    spared = [Overtaken(None, b"call", DEFAULTS) for _ in range(3)]
    dispatcher._waiting += spared
    dispatcher._spare(2)
    assert dispatcher._spared == set(spared[:2])
    dispatcher.close()


def test_broken_executor_refuses_jobs_and_keeps_none() -> None:
    """Workers that are forked are started before the thread, and may all fail."""

    def fails() -> NoReturn:
        raise OSError("no more processes")

    dispatcher = Dispatcher(fails, lambda: None, 4, None, forks=True)
    for _ in range(3):
        with pytest.raises(WorkerStartError, match="no more processes"):
            dispatcher.add(None, b"call", DEFAULTS)
        dispatcher.join(LONGEST)
    assert dispatcher.health() == "broken"
    assert not dispatcher._waiting


def test_jobs_that_were_cancelled_are_no_fault_when_others_are_spared() -> None:
    """They are passed over when it is asked who is spared, and dropped after that."""
    dispatcher = Dispatcher(never, never, 1, None, forks=False)
    made = [make_job() for _ in range(4)]
    for job in made[:2]:
        job.cancel()
    dispatcher._waiting += made
    dispatcher._spare(1)
    dispatcher._drop_waiting()
    assert [job.cancelled() for job in made] == [True, True, False, True]
    assert list(dispatcher._waiting) == made[2:3]
    assert not wait(made[:2], 0).not_done
    dispatcher.close()


def test_job_that_was_taken_in_the_end_is_not_refused() -> None:
    """It will be done: to say that it was refused would be a lie."""
    dispatcher = Dispatcher(never, never, 1, None, forks=False)

    class Taken(deque[Job]):
        def append(self, job: Job) -> None:
            super().append(job)
            dispatcher._has_ended = job.take()

    dispatcher._is_open = True
    dispatcher._waiting = Taken()
    job = dispatcher.add(None, b"call", DEFAULTS)
    assert job.running()
    dispatcher.close()


# -- A message -------------------------------------------------------------------------


def test_jobs_of_a_message_are_neither_cancelled_nor_limited_nor_long() -> None:
    """What is left waits for the next one, in order."""
    cancelled = make_job()
    cancelled.cancel()
    limited = make_job(timeout=1.0)
    some = [make_job() for _ in range(3)]
    large = [make_job(bytes(_GROUP_BYTES // 2 + 1)) for _ in range(2)]
    waiting = deque([some[0], cancelled, some[1], limited, some[2], *large])
    assert next_jobs(waiting, 100, alone=True) == some[:2]
    assert next_jobs(waiting, 100, alone=False) == []
    assert next_jobs(waiting, 100, alone=True) == [limited]
    assert next_jobs(waiting, 100, alone=False) == [some[2], large[0]]
    assert next_jobs(waiting, 100, alone=False) == [large[1]]
    assert not waiting


def test_jobs_with_the_same_options_go_in_one_message() -> None:
    """In order, a function once for its calls in a row.

    A pickle that would be alone in one is not pickled once more.
    """
    limits = DEFAULTS.with_(retries=1)
    give: tuple[Name, Call] = ("jobs", "give"), (1,)
    add: tuple[Name, Call] = ("jobs", "add"), (1, 2)
    packed = None, b"pickle"
    waiting = [
        *(Job(*call, DEFAULTS) for call in (give, give, packed, packed, add, give)),
        *(Job(*call, limits) for call in (give, packed)),
        Job(*packed, DEFAULTS),
        Job(*give, limits),
    ]
    sent = []
    for message in messages_for(waiting, 7):
        first, options = message.parts
        runs = loads_calls(first) if message.kind is Kind.JOBS else first
        sent.append((message.number, runs, loads_options(bytes(options))))
    give_once, packed_once = (jobs.give, [(1,)]), (None, [b"pickle"])
    twice = [(jobs.give, [(1,)] * 2), (None, [b"pickle"] * 2)]
    assert sent == [
        (7, [*twice, (jobs.add, [(1, 2)]), give_once], DEFAULTS),
        (13, [give_once, packed_once], limits),
        (15, b"pickle", DEFAULTS),
        (16, [give_once], limits),
    ]


def test_no_more_jobs_go_in_a_message_than_were_asked_for() -> None:
    """One that is too long for any group goes as well, alone."""
    waiting = deque(make_job() for _ in range(5))
    assert len(next_jobs(waiting, 2, alone=True)) == 2
    waiting = deque([make_job(bytes(10 * _GROUP_BYTES)), make_job()])
    assert len(next_jobs(waiting, 2, alone=True)) == 1
    assert len(waiting) == 1
