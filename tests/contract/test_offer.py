"""Jobs whose caller sends them and reads their answers, and callers interrupted at it."""

from __future__ import annotations

import dis
import gc
import itertools
import os
import select
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import faults
import jobs
from dbpool_executor import DBPoolExecutor, ResultLostError, WorkerDiedError
from dbpool_executor._dispatch.fast_lane import Offer
from dbpool_executor._dispatch.job import Job
from dbpool_executor._forks.ends import make_ends
from dbpool_executor._wire.channel import Channel, Kind, Message, frame
from dbpool_executor._wire.options import DEFAULTS
from processes import MakeExecutor, dispatchers
from servers import Database
from values import Box
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
    return Job(None, call, DEFAULTS)


def finished(channel: Channel, offer: Offer) -> Job | None:
    """Do what the dispatcher does when it wakes."""
    if offer.taken is None:
        return None
    job, data = offer.taken
    channel.send_rest(data if offer.unsent is None else offer.unsent)
    return job


def test_first_job_is_sent_and_the_next_is_not(
    channels: tuple[Channel, Channel],
) -> None:
    """The worker gets one job, with the number that the dispatcher will know."""
    mine, theirs = channels
    offer, first = Offer(mine, 3), job()
    assert offer.take(first)
    assert not offer.take(job(b"other"))
    assert offer.unsent == b""
    assert first.running()
    assert finished(mine, offer) is first
    assert theirs.receive() == [Message(Kind.JOB, [b"call", b""], 3)]


def test_job_that_comes_behind_one_that_waits_is_not_taken(
    channels: tuple[Channel, Channel],
) -> None:
    """It would overtake that one; and it can still be cancelled."""
    mine, theirs = channels
    offer, late = Offer(mine, 1), job()
    offer.is_open = False
    assert not offer.take(late)
    assert late.cancel()
    assert theirs.receive() == []


def test_large_job_is_left_to_the_dispatcher(
    channels: tuple[Channel, Channel],
) -> None:
    """A socket might take a part of it, and a caller does not wait for the rest."""
    mine, theirs = channels
    offer = Offer(mine, 1)
    assert not offer.take(job(bytes(LARGE)))
    assert finished(mine, offer) is None
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
    assert offer.unsent
    while theirs.receive():
        pass
    assert finished(mine, offer) is taken
    assert theirs.receive() == [Message(Kind.JOB, [b"call", b""], 1)]


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
    executor = with_offer(make_executor(sqlite_database.make_engine, 2))
    future = executor.submit(jobs.wait_at_gate, gate.address, "through")
    gate.arrival()
    stats = executor.stats()
    assert (stats.workers, stats.idle, stats.running, stats.queued) == (1, 0, 1, 0)
    assert future.running()
    assert not future.cancel()
    executor.shutdown(wait=False, cancel_futures=True)
    gate.open()
    assert future.result(LONGEST) == "through"


class Submits(bytes):
    """A call during whose framing a signal's handler submits another job."""

    submit: Callable[[], object]

    def __len__(self) -> int:
        self.submit()
        return super().__len__()


def test_job_that_is_submitted_in_the_middle_of_another_takes_its_place(
    channels: tuple[Channel, Channel],
) -> None:
    """Only one of the two is the worker's."""
    mine, theirs = channels
    offer, first, second = Offer(mine, 1), job(Submits(b"late")), job(b"early")
    Submits.submit = lambda _self: offer.take(second)
    assert not offer.take(first)
    assert finished(mine, offer) is second
    assert theirs.receive() == [Message(Kind.JOB, [b"early", b""], 1)]


def test_answer_is_not_read_while_the_last_is_on_its_way_to_its_future(
    channels: tuple[Channel, Channel],
) -> None:
    """It is left to the dispatcher, which knows of both then."""
    mine, theirs = channels
    last = job(), Message(Kind.RESULT, [b"last"])
    offer = Offer(mine, 2, 1, 1000, last)
    assert offer.take(job())
    theirs.send(Message(Kind.RESULT, [b"next"]))
    assert offer.followed() is None
    assert offer.told is last
    assert mine.take_in(b"".join(offer.inbox)) == [Message(Kind.RESULT, [b"next"])]


# -- Answers ---------------------------------------------------------------------------


def with_offer(executor: DBPoolExecutor) -> DBPoolExecutor:
    """Let an executor start a worker, and wait until callers may use it."""
    executor.submit(jobs.pid).result(LONGEST)
    offers = executor._dispatcher._offers
    wait_until(lambda: offers.standing is not None, "an offer")
    return executor


def sleeps_of_dispatcher() -> int:
    """Ask the system how often the dispatcher's thread has gone to sleep."""
    (thread,) = dispatchers()
    status = Path(f"/proc/self/task/{thread.native_id}/status").read_text()
    (line,) = (text for text in status.splitlines() if text.startswith("voluntary"))
    return int(line.split()[1])


needs_epoll = pytest.mark.skipif(
    not hasattr(select, "epoll"), reason="only Linux can switch who listens"
)


@needs_epoll
def test_jobs_one_at_a_time_do_not_wake_the_dispatcher(
    sqlite_database: Database, make_executor: MakeExecutor, gate: Gate
) -> None:
    """Who waits for a job that came alone gets its answer from the worker."""
    executor = with_offer(make_executor(sqlite_database.make_engine, 2))
    before = sleeps_of_dispatcher()
    with ThreadPoolExecutor(1) as threads:
        for number in range(20):
            future = executor.submit(jobs.wait_at_gate, gate.address, number)
            gate.arrival()
            waiting = threads.submit(future.result, LONGEST)
            reads(executor)
            gate.open()
            assert waiting.result(LONGEST) == number
            assert executor.stats().done == number + 2
    # Now and then an answer comes when its caller is only about to read it.
    assert sleeps_of_dispatcher() - before < 20


def test_caller_that_waits_gives_way_to_the_dispatcher(
    sqlite_database: Database, make_executor: MakeExecutor, gate: Gate
) -> None:
    """Other jobs come and are done while it reads, also by the same worker."""
    executor = with_offer(make_executor(sqlite_database.make_engine, 1))
    first = executor.submit(jobs.wait_at_gate, gate.address, "first")
    assert isinstance(first, Job)
    gate.arrival()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(first.result, LONGEST)
        reads(executor)
        second = executor.submit(jobs.give, "second")
        wait_until(first.is_asked_for, "the caller to wait as others do")
        gate.open()
        assert waiting.result(LONGEST) == "first"
        assert second.result(LONGEST) == "second"
    assert with_offer(executor).stats().done == 4


def reads(executor: DBPoolExecutor) -> None:
    """Wait until a caller reads the answer of the job that was sent last."""

    def is_read() -> bool:
        offer = executor._dispatcher._offers.standing
        return offer is not None and offer.is_read

    wait_until(is_read, "a caller that reads")


def test_result_is_there_when_it_came_too_late_for_its_caller(
    sqlite_database: Database, make_executor: MakeExecutor, gate: Gate
) -> None:
    """The caller's time is up; the dispatcher reads the answer then."""
    executor = with_offer(make_executor(sqlite_database.make_engine, 1))
    future = executor.submit(jobs.wait_at_gate, gate.address, "late")
    gate.arrival()
    for _ in range(3):
        with pytest.raises(TimeoutError):
            future.result(0.001)
    gate.open()
    assert wait([future], LONGEST).done
    assert future.result(LONGEST) == "late"


def test_two_who_wait_for_one_job_both_get_its_result(
    sqlite_database: Database, make_executor: MakeExecutor, gate: Gate
) -> None:
    """One of them reads, and tells the other."""
    executor = with_offer(make_executor(sqlite_database.make_engine, 1))
    future = executor.submit(jobs.wait_at_gate, gate.address, "through")
    gate.arrival()
    with ThreadPoolExecutor(3) as threads:
        first = threads.submit(future.result, LONGEST)
        reads(executor)
        others = [
            threads.submit(future.result, LONGEST),
            threads.submit(lambda: next(as_completed([future], LONGEST)).result()),
        ]
        gate.open()
        assert {f.result(LONGEST) for f in (first, *others)} == {"through"}


def test_callbacks_are_not_called_by_who_waits(
    sqlite_database: Database, make_executor: MakeExecutor, gate: Gate
) -> None:
    """They may need what that thread holds."""
    executor = with_offer(make_executor(sqlite_database.make_engine, 1))
    future = executor.submit(jobs.wait_at_gate, gate.address, "through")
    gate.arrival()
    callers: list[threading.Thread] = []
    future.add_done_callback(lambda _: callers.append(threading.current_thread()))
    gate.open()
    assert future.result(LONGEST) == "through"
    wait_until(lambda: callers, "the callback")
    assert callers == list(dispatchers())


def test_threads_that_submit_and_wait_all_get_their_results(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """Offers, readers and the dispatcher follow each other closely."""
    executor = with_offer(make_executor(sqlite_database.make_engine, 2))

    def work(thread: int) -> list[int]:
        keys = range(1000 * thread, 1000 * thread + 200)
        return [executor.submit(jobs.give, key).result(LONGEST) for key in keys]

    with ThreadPoolExecutor(4) as threads:
        for thread, found in enumerate(threads.map(work, range(4), timeout=LONGEST)):
            assert found == list(range(1000 * thread, 1000 * thread + 200))
    assert with_offer(executor).stats().done == 802


def test_large_result_is_left_to_the_dispatcher(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """Its caller has read the first piece of it."""
    executor = with_offer(make_executor(sqlite_database.make_engine, 1))
    assert executor.submit(jobs.give, bytes(LARGE)).result(LONGEST) == bytes(LARGE)
    assert executor.submit(jobs.give, 1).result(LONGEST) == 1


def test_result_that_would_end_its_caller_is_lost(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """It raises in the caller's thread first, and that is not the caller's affair."""
    executor = with_offer(make_executor(sqlite_database.make_engine, 1))
    future = executor.submit(faults.give_exits_on_unpickling, "kept")
    with pytest.raises(ResultLostError):
        future.result(LONGEST)
    assert sqlite_database.names() == {"kept"}
    assert executor.submit(jobs.give, 1).result(LONGEST) == 1
    stats = executor.stats()
    assert (stats.done, stats.failed) == (2, 1)


def test_job_that_fails_while_its_caller_reads(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """Its exception comes, and nothing of it stays."""
    executor = with_offer(make_executor(sqlite_database.make_engine, 1))
    future = executor.submit(jobs.insert_and_raise, "lost", LookupError("here"))
    with pytest.raises(LookupError, match="here"):
        future.result(LONGEST)
    assert sqlite_database.names() == set()
    assert executor.stats().failed == 1


def test_worker_that_dies_while_a_caller_reads(
    sqlite_database: Database, make_executor: MakeExecutor, gate: Gate
) -> None:
    """The dispatcher hears of the end, and the caller of the job's."""
    executor = with_offer(make_executor(sqlite_database.make_engine, 1))
    future = executor.submit(jobs.insert_at_gate, "lost", gate.address)
    pid = gate.arrival()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(future.result, LONGEST)
        reads(executor)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerDiedError):
            waiting.result(LONGEST)
    assert executor.submit(jobs.give, 1).result(LONGEST) == 1
    assert sqlite_database.names() == set()


def test_executor_that_is_shut_down_while_a_caller_reads(
    sqlite_database: Database, make_executor: MakeExecutor, gate: Gate
) -> None:
    """The job is done, and the end comes."""
    executor = with_offer(make_executor(sqlite_database.make_engine, 1))
    future = executor.submit(jobs.wait_at_gate, gate.address, "through")
    gate.arrival()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(future.result, LONGEST)
        reads(executor)
        executor.shutdown(wait=False)
        gate.open()
        assert waiting.result(LONGEST) == "through"
    executor.shutdown()
    assert not dispatchers()


def test_result_is_not_kept_by_the_executor(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """It is gone with its future, and not only when the next job comes."""
    executor = with_offer(make_executor(sqlite_database.make_engine, 1))
    future = executor.submit(jobs.give, Box("any"))
    gc.disable()
    try:
        result = weakref.ref(future.result(LONGEST))
        del future
        assert result() is None
    finally:
        gc.enable()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_copy_leaves_the_answer_to_the_process_itself(
    sqlite_database: Database, make_executor: MakeExecutor, gate: Gate
) -> None:
    """There nobody reads it, as before."""
    executor = with_offer(make_executor(sqlite_database.make_engine, 1))
    future = executor.submit(jobs.wait_at_gate, gate.address, "through")
    gate.arrival()
    pid = os.fork()
    if not pid:
        try:
            future.result(0.01)
        except TimeoutError:
            os._exit(3)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
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
            assert seen == {step + 1: Message(Kind.JOB, [b"call", b""], step + 1)}
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
        with_offer(executor)
        try:
            with interrupted(step, {"Dispatcher.add", "Offer.take"}) as has_struck:
                future = executor.submit(jobs.pid)
            future.result(LONGEST)
        except Interrupt:
            pass
        if not has_struck():
            break
    assert step > 5
    executor.submit(jobs.insert_item, "last").result(LONGEST)
    executor.shutdown()
    assert sqlite_database.names() == {"last"}
    assert executor.stats().running == 0


READING = {
    "Job.result",
    "Job.is_asked_for",
    "Job.end_unasked",
    "Offers.read_answer",
    "Offers._read",
    "Offers._settle",
    "Offer.followed",
    "Offer.__init__",
    "_Handover.give",
    "_Handover.take_back",
    "Channel.receive_into",
    "unframe",
    "loads_result",
}


@needs_epoll
@pytest.mark.parametrize("names", [READING, {"_Handover.give.<locals>.wait"}])
def test_interrupted_reader_loses_no_result(
    sqlite_database: Database, make_executor: MakeExecutor, gate: Gate, names: set[str]
) -> None:
    """Wherever Ctrl-C strikes in ``result()``, the future is done, and counted once."""
    executor = with_offer(make_executor(sqlite_database.make_engine, 1))
    step = misses = 0
    for number in itertools.count():
        future = executor.submit(jobs.insert_at_gate, str(number), gate.address)
        gate.arrival()
        with ThreadPoolExecutor(1) as threads:
            is_over = threading.Event()
            opened = threads.submit(open_when_read, gate, executor, is_over)
            try:
                with interrupted(step, names) as has_struck:
                    future.result(LONGEST)
            except Interrupt:
                pass
            is_over.set()
            opened.result(LONGEST)
        assert wait([future], LONGEST).done, step
        assert future.exception(LONGEST) is None
        with_offer(executor)
        assert executor.stats().done == 2 * number + 3
        # The last interrupt may have woken the dispatcher only now, who reads then.
        step, misses = (step + 1, 0) if has_struck() else (step, misses + 1)
        if misses == 5:
            break
    assert step > (20 if names is READING else 2)
    executor.shutdown()
    assert sqlite_database.names() == {str(found) for found in range(number + 1)}


def open_when_read(
    gate: Gate, executor: DBPoolExecutor, is_over: threading.Event
) -> None:
    """Let a job go on when a caller reads, or will not."""

    def is_time() -> bool:
        offer = executor._dispatcher._offers.standing
        # The dispatcher may have taken it back: the last interrupt has woken it.
        return is_over.is_set() or offer is None or not offer.taken or offer.is_read

    wait_until(is_time, "a caller that reads")
    gate.open()


@needs_epoll
def test_interrupt_in_the_middle_of_unpickling_is_the_callers(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """The result is not lost: the dispatcher unpickles it again."""
    executor = with_offer(make_executor(sqlite_database.make_engine, 1))
    faults.InterruptsOnce.has_struck = False
    future = executor.submit(faults.give_interrupts_once, "kept")
    with pytest.raises(KeyboardInterrupt):
        future.result(LONGEST)
    assert isinstance(future.result(LONGEST), faults.InterruptsOnce)
    assert sqlite_database.names() == {"kept"}
