"""A job on the parent's side: its future, what goes in one message, who is woken when.

No process.
"""

from __future__ import annotations

import gc
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import (
    CancelledError,
    Future,
    InvalidStateError,
    as_completed,
    wait,
)
from typing import Any, NoReturn

import pytest

from dbpool_executor._channel import Kind, Message
from dbpool_executor._dispatcher import Dispatcher
from dbpool_executor._job import Job, JobFuture
from dbpool_executor._options import DEFAULTS
from dbpool_executor._workers import _GROUP_BYTES, _next_jobs
from waiting import LONGEST, wait_until


def never() -> NoReturn:
    """Stand for what a dispatcher without jobs does not call."""
    raise AssertionError


def make_job(call: bytes = b"call", timeout: float | None = None) -> Job:
    """Make a job as ``submit()`` does."""
    return Job(JobFuture(), [call, b""], DEFAULTS.with_(timeout=timeout))


def in_thread(call: Any) -> threading.Thread:
    """Call something in a thread that waits."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


# -- The future ------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, 0, "text"])
def test_result_that_nobody_waits_for_is_there(value: object) -> None:
    """It takes the short way, and is found by whoever comes later."""
    future: JobFuture[object] = JobFuture()
    assert future.set_running_or_notify_cancel()
    assert not future.is_watched()
    assert future.running()
    future.set_result(value)
    assert future.done()
    assert future.result(0) is value
    assert future.exception(0) is None
    called: list[object] = []
    future.add_done_callback(called.append)
    assert called == [future]
    assert wait([future], 0).done == {future}


def test_future_has_what_every_future_has() -> None:
    """It does without ``Future.__init__``, whatever that may come to do."""
    ours, theirs = JobFuture[None](), vars(Future())
    condition = ours._condition
    assert isinstance(condition, type(theirs.pop("_condition")))
    assert condition is ours._condition
    assert condition._lock is ours._lock
    assert {name: getattr(ours, name) for name in theirs} == theirs


def test_collector_of_garbage_looks_at_a_fifth_for_a_future() -> None:
    """There may be a hundred thousand of them, and it looks at each more than once."""

    def objects_of(make: Callable[[], object]) -> int:
        before = len(gc.get_objects())
        futures = [make() for _ in range(100)]
        return len(gc.get_objects()) - before - len([futures])

    gc.collect()
    gc.disable()
    try:
        assert objects_of(JobFuture) * 5 <= objects_of(Future)
    finally:
        gc.enable()


def test_condition_is_let_go_of_however_often_it_was_entered() -> None:
    """A signal's handler may ask for the future that the main thread has in hand."""
    condition = JobFuture[None]()._condition
    entered = threading.Event()

    def wait_inside() -> None:
        with condition, condition:
            entered.set()
            assert condition.wait(LONGEST)

    waiting = in_thread(wait_inside)
    assert entered.wait(LONGEST)
    assert condition.acquire(timeout=LONGEST)
    condition.notify_all()
    condition.release()
    waiting.join(LONGEST)
    assert not waiting.is_alive()
    with pytest.raises(RuntimeError, match="un-acquired"):
        condition.notify()


def test_each_who_waits_is_told() -> None:
    """In result(), by a callback, in wait() and in as_completed()."""
    told: list[object] = []

    def by_result(future: JobFuture[int]) -> None:
        told.append(future.result(LONGEST))

    def by_wait(future: JobFuture[int]) -> None:
        told.append([f.result() for f in wait([future], LONGEST).done])

    def by_as_completed(future: JobFuture[int]) -> None:
        told.append([f.result() for f in as_completed([future], LONGEST)])

    for waiter, expected in ((by_result, 5), (by_wait, [5]), (by_as_completed, [5])):
        future: JobFuture[int] = JobFuture()
        future.set_running_or_notify_cancel()
        thread = in_thread(lambda w=waiter, f=future: w(f))
        wait_until(future.is_watched, "somebody who waits")
        future.set_result(5)
        thread.join(LONGEST)
        assert told.pop() == expected
    future = JobFuture()
    future.add_done_callback(lambda f: told.append(f.result()))
    assert future.is_watched()
    future.set_running_or_notify_cancel()
    future.set_result(6)
    assert told == [6]


def test_cancelled_future_is_neither_run_nor_given_a_result() -> None:
    """As for every future; a second result is refused as well."""
    cancelled: JobFuture[int] = JobFuture()
    assert cancelled.cancel()
    assert not cancelled.set_running_or_notify_cancel()
    done: JobFuture[int] = JobFuture()
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
    future: JobFuture[int] = JobFuture()
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
        made[number].future.add_done_callback(
            lambda _, n=number: seen.append((n, [j.future.done() for j in made]))
        )
    for job in made:
        assert job.take()
        dispatcher._told.append((job, Message(Kind.RESULT, [b"N."])))
    dispatcher._settle()
    dispatcher.close()
    assert seen == [(1, [True, True, True, False, True, True]), (3, [True] * 6)]
    assert all(job.future.result(0) is None for job in made)


# -- A message -------------------------------------------------------------------------


def test_jobs_of_a_message_are_neither_cancelled_nor_limited_nor_long() -> None:
    """What is left waits for the next one, in order."""
    cancelled = make_job()
    cancelled.future.cancel()
    limited = make_job(timeout=1.0)
    some = [make_job() for _ in range(3)]
    large = [make_job(bytes(_GROUP_BYTES // 2 + 1)) for _ in range(2)]
    waiting = deque([some[0], cancelled, some[1], limited, some[2], *large])
    assert _next_jobs(waiting, 100, alone=True) == some[:2]
    assert _next_jobs(waiting, 100, alone=False) == []
    assert _next_jobs(waiting, 100, alone=True) == [limited]
    assert _next_jobs(waiting, 100, alone=False) == [some[2], large[0]]
    assert _next_jobs(waiting, 100, alone=False) == [large[1]]
    assert not waiting


def test_no_more_jobs_go_in_a_message_than_were_asked_for() -> None:
    """One that is too long for any group goes as well, alone."""
    waiting = deque(make_job() for _ in range(5))
    assert len(_next_jobs(waiting, 2, alone=True)) == 2
    waiting = deque([make_job(bytes(10 * _GROUP_BYTES)), make_job()])
    assert len(_next_jobs(waiting, 2, alone=True)) == 1
    assert len(waiting) == 1
