"""Jobs that a caller sends by itself, and callers that are interrupted at it."""

from __future__ import annotations

import dis
import itertools
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest

import jobs
from dbpool_executor._channel import Channel, Kind, Message, frame, make_ends
from dbpool_executor._job import Job
from dbpool_executor._offer import Offer
from processes import MakeExecutor
from servers import Database
from waiting import LONGEST, Gate, wait_until

LARGE = 1 << 20


@pytest.fixture
def channels() -> Iterator[tuple[Channel, Channel]]:
    """The parent's end of a channel, and the worker's."""
    mine, theirs = make_ends()
    mine.setblocking(False)
    theirs.setblocking(False)
    channels = Channel(mine), Channel(theirs)
    yield channels
    for channel in channels:
        channel.close()


def job(call: bytes = b"call") -> Job:
    """Make a job as ``submit()`` does."""
    return Job(Future(), [call])


def finished(channel: Channel, offer: Offer) -> Job | None:
    """Do what the dispatcher does when it wakes."""
    taken = offer.withdraw()
    if taken is None:
        return None
    channel.send_rest(taken[1])
    return taken[0]


def test_first_job_is_sent_and_the_next_is_not(
    channels: tuple[Channel, Channel],
) -> None:
    """The worker gets one job, with the number that the dispatcher will know."""
    mine, theirs = channels
    offer, first = Offer(mine, 3), job()
    assert not offer.is_taken
    assert offer.take(first)
    assert not offer.take(job(b"other"))
    assert offer.is_taken
    assert offer.is_sent
    assert first.future.running()
    assert finished(mine, offer) is first
    assert first.number == 3
    assert theirs.receive() == [Message(Kind.JOB, [b"call"], 3)]


def test_what_is_withdrawn_is_not_taken(channels: tuple[Channel, Channel]) -> None:
    """A job that comes too late can still be cancelled."""
    mine, theirs = channels
    offer, late = Offer(mine, 1), job()
    assert offer.withdraw() is None
    assert not offer.take(late)
    assert late.future.cancel()
    assert theirs.receive() == []


def test_large_job_is_left_to_the_dispatcher(
    channels: tuple[Channel, Channel],
) -> None:
    """A socket might take a part of it, and a caller does not wait for the rest."""
    mine, theirs = channels
    offer = Offer(mine, 1)
    assert not offer.take(job(bytes(LARGE)))
    assert not offer.is_taken
    assert theirs.receive() == []


def test_full_socket_is_left_to_the_dispatcher(
    channels: tuple[Channel, Channel],
) -> None:
    """The job is the worker's, and is sent as soon as there is room."""
    mine, theirs = channels
    while mine.send_at_once(b"".join(frame(Message(Kind.READY)))) == b"":
        pass
    offer, taken = Offer(mine, 1), job()
    assert offer.take(taken)
    assert not offer.is_sent
    while theirs.receive():
        pass
    assert finished(mine, offer) is taken
    assert theirs.receive() == [Message(Kind.JOB, [b"call"], 1)]


def test_worker_that_is_gone_is_left_to_the_dispatcher(
    channels: tuple[Channel, Channel],
) -> None:
    """It hears of the end of the channel, as for any other job."""
    mine, theirs = channels
    theirs.close()
    offer, taken = Offer(mine, 1), job()
    assert offer.take(taken)
    assert finished(mine, offer) is taken


def test_job_that_its_caller_has_sent_is_counted_and_cannot_be_cancelled(
    sqlite_database: Database, make_executor: MakeExecutor, gate: Gate
) -> None:
    """The dispatcher sleeps, and has not heard of it; and it is done all the same."""
    executor = make_executor(sqlite_database.make_engine, 2)
    executor.submit(jobs.pid).result(LONGEST)
    wait_until(lambda: executor._dispatcher._offer is not None, "an offer")
    future = executor.submit(jobs.wait_at_gate, gate.address, "through")
    gate.arrival()
    stats = executor.stats()
    assert (stats.workers, stats.idle, stats.running, stats.queued) == (1, 0, 1, 0)
    assert future.running()
    assert not future.cancel()
    executor.shutdown(wait=False, cancel_futures=True)
    gate.open()
    assert future.result(LONGEST) == "through"


# -- Interrupts ------------------------------------------------------------------------


class Interrupt(BaseException):
    """Stands for Ctrl-C."""


@contextmanager
def interrupted(step: int, names: set[str]) -> Iterator[Callable[[], bool]]:
    """Interrupt this thread where a signal can, in some functions of the package.

    The interpreter looks for signals when a call has returned, not in the middle of a
    ``with`` statement's entry or exit.

    Args:
        step: At which call, counted over all of them in the order of execution.
        names: The qualified names of the functions.

    Yields:
        Says whether it came to that.
    """
    steps = itertools.count()
    struck = False
    last: dict[FrameType, str] = {}

    def trace(frame: FrameType, event: str, _arg: object) -> Any:
        nonlocal struck
        if event == "call" and frame.f_code.co_qualname not in names:
            return None
        # At each event: set at the call alone, CPython 3.13 does not heed it.
        frame.f_trace_opcodes = True
        if event == "opcode":
            before = last.get(frame, "")
            last[frame] = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            if before.startswith("CALL") and next(steps) == step:
                struck = True
                raise Interrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield lambda: struck
    finally:
        sys.settrace(before)


def test_interrupted_taker_leaves_a_job_that_is_sent_once_or_never(
    channels: tuple[Channel, Channel],
) -> None:
    """Wherever Ctrl-C strikes: either nobody has the worker, or it gets the job."""
    mine, theirs = channels
    outcomes = set()
    for step in itertools.count():
        offer, taker = Offer(mine, step + 1), job()
        try:
            with interrupted(step, {"Offer.take"}) as has_struck:
                offer.take(taker)
        except Interrupt:
            pass
        found = finished(mine, offer)
        # What a worker does: it passes over a number that it has seen.
        seen = {message.number: message for message in theirs.receive()}
        if found is None:
            assert seen == {}
        else:
            assert found is taker
            assert seen == {step + 1: Message(Kind.JOB, [b"call"], step + 1)}
        outcomes.add(found is None)
        if not has_struck():
            break
    assert outcomes == {True, False}


def test_interrupted_submit_leaves_a_whole_executor(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """Wherever Ctrl-C strikes in it, the next job is done, and the end comes."""
    executor = make_executor(sqlite_database.make_engine, 1)
    for step in itertools.count():
        executor.submit(jobs.pid).result(LONGEST)
        wait_until(lambda: executor._dispatcher._offer is not None, "an offer")
        try:
            with interrupted(step, {"Dispatcher.add", "Offer.take"}) as has_struck:
                future = executor.submit(jobs.pid)
            future.result(LONGEST)
        except Interrupt:
            pass
        if not has_struck():
            break
    assert step > 10
    executor.submit(jobs.insert_item, "last").result(LONGEST)
    executor.shutdown()
    assert sqlite_database.names() == {"last"}
    assert executor.stats().running == 0
