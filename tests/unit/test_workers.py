"""Which jobs are sent to which worker, and taken back.

No process: the workers are stand-ins, at the other end of real channels.
"""

from __future__ import annotations

import math
import selectors
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

import jobs
from dbpool_executor import WorkerDiedError
from dbpool_executor._dispatch import dispatcher as _dispatcher
from dbpool_executor._dispatch import fleet as _fleet
from dbpool_executor._dispatch.dispatcher import Dispatcher
from dbpool_executor._dispatch.fleet import Worker, Workers
from dbpool_executor._dispatch.job import Job
from dbpool_executor._forks.ends import make_ends, make_pipe
from dbpool_executor._launch.handle import WorkerHandle
from dbpool_executor._wire.calls import dumps_result, loads_calls
from dbpool_executor._wire.channel import Channel, Kind, Message, frame
from dbpool_executor._wire.options import DEFAULTS
from dbpool_executor._wire.phase import (
    RECALL_DELAY,
    WORDS,
    PhaseRecord,
    Progress,
    Transaction,
)
from dbpool_executor._wire.short_answers import AnswerReader, AnswerWriter


class Body:
    """Stands for a worker process: the test reads its channel and writes its record."""

    count = 0

    def __init__(self) -> None:
        Body.count += 1
        self.number = self.pid = Body.count
        self.end = None
        mine, theirs = make_ends()
        mine.setblocking(False)
        theirs.setblocking(False)
        self.channel, self.theirs = Channel(mine), Channel(theirs)
        read, written = make_pipe()
        self.answers, self.writer = AnswerReader(read), AnswerWriter(written)
        self.record = PhaseRecord([0] * WORDS)
        self.is_killed = False

    def recall(self, number: int) -> None:
        """Do as a worker on this machine."""
        self.record.recall(number)

    def stop(self, _number: int) -> float:
        """Note that it was killed."""
        self.is_killed = True
        return 1.0

    def kill(self) -> None:
        """Note that it was killed."""
        self.is_killed = True

    def progress(self) -> Progress:
        """Do as a worker on this machine."""
        return self.record.read()

    def transaction(self) -> Transaction:
        """Say that none was noted."""
        return Transaction()

    def bury(self) -> int:
        """Give the exit code of a worker that was killed."""
        self.close()
        return -9

    @property
    def bytes_received(self) -> int:
        """Do as a worker on this machine."""
        return self.channel.bytes_received + self.answers.bytes_received

    def close(self) -> None:
        """Close all ends."""
        for end in (self.channel, self.theirs, self.answers, self.writer._end):
            end.close()

    def messages(self) -> list[Message]:
        """Read what was sent to it."""
        return self.theirs.receive()


def body_of(worker: Worker) -> Body:
    """Give the stand-in of a worker."""
    return cast("Body", worker.body)


@pytest.fixture
def workers() -> Iterator[Workers]:
    """Two workers that are idle; a job takes about one millisecond."""
    with selectors.DefaultSelector() as selector:
        start: Any = Body
        workers = Workers(cast("type[WorkerHandle]", start), 2, None, selector)
        for _ in range(2):
            workers.start_one()
        for worker in workers.all.values():
            workers.note_ready(worker)
        workers._learn(0.00099)
        yield workers
        for worker in workers.all.values():
            selector.unregister(worker.body.channel)
            selector.unregister(worker.body.answers)
            body_of(worker).close()


def make_jobs(count: int) -> list[Job]:
    """Make jobs as ``submit()`` does."""
    return [Job(("jobs", "pid"), (), DEFAULTS) for _ in range(count)]


def answer(workers: Workers, worker: Worker, count: int) -> None:
    """Note that a worker has answered some of what was sent to it."""
    for _ in range(count):
        worker.sent.pop(0)
    workers.note_answers(worker, count, count * 990_000, 0)


def look_again(workers: Workers, waiting: int) -> list[Job]:
    """Do what the dispatcher does some milliseconds later."""
    assert workers._next_look < math.inf
    workers._next_look = 0.0
    return workers.take_back(waiting)


def test_worker_gets_three_groups_each_of_which_is_a_message(workers: Workers) -> None:
    """Of five milliseconds of work; and as many more as it has room for, one at least."""
    waiting = deque(make_jobs(60))
    workers.send_from(waiting)
    assert len(waiting) == 30
    for worker in workers.all.values():
        messages = body_of(worker).messages()
        assert [message.kind for message in messages] == [Kind.JOBS] * 3
        assert [message.number for message in messages] == [1, 6, 11]
        assert [loads_calls(message.parts[0]) for message in messages] == [
            [(jobs.pid, [()] * 5)]
        ] * 3
    first, second = workers.all.values()
    answer(workers, first, 7)
    answer(workers, second, 4)
    workers.send_from(waiting)
    assert [len(first.sent), len(second.sent)] == [15, 11]
    assert [message.number for message in body_of(first).messages()] == [16, 21]


def test_jobs_of_a_busy_worker_come_back_for_an_idle_one(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that it has not begun, if they would wait long, and nothing else waits."""
    clock = Clock(time.monotonic())
    monkeypatch.setattr(_fleet, "time", clock)
    workers.send_from(deque(make_jobs(40)))
    busy, idle = workers.all.values()
    assert look_again(workers, 0) == []
    answer(workers, idle, len(idle.sent))
    assert look_again(workers, 1) == []
    assert body_of(busy).record.begin(1)
    assert look_again(workers, 0) == []
    assert not body_of(busy).record.begin(2)
    behind = list(busy.sent)[2:]
    clock.now += 2 * RECALL_DELAY
    assert look_again(workers, 0) == behind
    workers.send_from(deque(behind))
    assert list(idle.sent) == behind[:8]


def test_last_jobs_go_where_fewest_are(workers: Workers) -> None:
    """Else one worker would be at them when the others are done."""
    workers.send_from(deque(make_jobs(30)))
    ahead, behind = workers.all.values()
    answer(workers, ahead, 10)
    answer(workers, behind, 3)
    waiting = deque(make_jobs(9))
    workers.send_from(waiting)
    assert [len(ahead.sent), len(behind.sent), len(waiting)] == [13, 12, 1]


def test_jobs_of_microseconds_are_not_divided_among_all(workers: Workers) -> None:
    """To send some to one more worker would take the parent longer than they take."""
    workers._learn(4e-6, jobs=100)
    workers._most = 5
    for _ in range(3):
        workers.start_one()
        workers.note_ready(list(workers.all.values())[-1])
    workers.send_from(deque(make_jobs(2000)))
    assert sorted(len(worker.sent) for worker in workers.all.values()) == [
        *[0] * 3,
        1000,
        1000,
    ]


def test_worker_that_leaves_has_no_share(workers: Workers) -> None:
    """What it still has is no reason for another to have more than the third."""
    workers._most = 3
    workers.start_one()
    leaving, *others = workers.all.values()
    workers.note_ready(others[-1])
    leaving.sent += make_jobs(12)
    workers._tell_to_leave(leaving)
    workers.send_from(deque(make_jobs(10)))
    assert [len(worker.sent) for worker in others] == [5, 5]


def test_answers_are_looked_at_when_they_usually_come(workers: Workers) -> None:
    """One that took long makes messages small, and the nap no longer."""
    workers.send_from(deque(make_jobs(60)))
    workers._bytes_per_answer = 50.0
    nap = workers.seconds_to_nap(30, is_listening=False)
    assert nap == pytest.approx(10 * 0.99e-3)
    first, _ = workers.all.values()
    first.sent.pop(0)
    workers._learn(0.004)
    assert workers._seconds_per_job == 0.004
    assert workers.seconds_to_nap(30, is_listening=False) < 1.5 * nap


@pytest.fixture
def dispatcher() -> Iterator[Dispatcher]:
    """Without its thread; three workers that are idle."""
    start: Any = Body
    dispatcher = Dispatcher(start, lambda: None, 3, None, forks=False)
    workers = dispatcher._workers
    for _ in range(3):
        workers.start_one()
    for worker in workers.all.values():
        workers.note_ready(worker)
    yield dispatcher
    for worker in workers.all.values():
        body_of(worker).close()
    dispatcher.close()


def test_long_answers_are_settled_one_by_one_and_in_turn(
    dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has answered again comes after who waits; that one is not killed for it."""
    monkeypatch.setattr(_dispatcher, "_LONG_PICKLE", 1 << 16)
    jobs, workers = make_jobs(6), dispatcher._workers
    dispatcher._waiting += jobs
    for _ in range(4):
        idle = list(workers.idle)
        dispatcher._act()
        for worker in idle:  # it reads a part of what comes, and then the rest
            body_of(worker).theirs.send(
                Message(Kind.RESULT, dumps_result(bytes(100_000)))
            )
        dispatcher._wait()
        for worker in workers.all.values():
            if set(worker.sent) & set(jobs[:3]):
                workers._kill_at[worker] = 0.0
    dispatcher._settle()
    assert all(job.result(0) == bytes(100_000) for job in jobs[:3])
    assert not any(job.done() for job in jobs[3:])
    assert not any(body_of(worker).is_killed for worker in workers.all.values())


def test_job_that_may_not_be_offered_is_not_overtaken(dispatcher: Dispatcher) -> None:
    """The next one could have the worker that is offered, but comes after it."""
    dispatcher._is_open = True
    dispatcher._offers.standing = dispatcher._workers.offer()
    limited, short = (
        dispatcher.add(("jobs", "pid"), (), options)
        for options in (DEFAULTS.with_(timeout=1.0), DEFAULTS)
    )
    assert list(dispatcher._waiting) == [limited, short]
    dispatcher._waiting.clear()


def test_who_cannot_send_all_of_a_job_wakes_the_dispatcher(
    dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sends the rest, as soon as there is room."""
    workers = dispatcher._workers
    worker = workers.idle[-1]
    dispatcher._is_open = True
    dispatcher._offers.standing = workers.offer()
    channel = body_of(worker).channel
    monkeypatch.setattr(channel, "send_at_once", lambda data: data[1:])
    job = dispatcher.add(("jobs", "pid"), (), DEFAULTS)
    assert dispatcher._ear.recv(4096)
    assert not dispatcher._waiting
    dispatcher._withdraw()
    assert worker.sent == [job]


def test_answers_by_pipe_and_by_channel_are_taken_in_the_order_of_the_jobs(
    dispatcher: Dispatcher,
) -> None:
    """One by pipe waits for an earlier job's, which may still be on its way."""
    dispatcher._workers._learn(0.001)
    jobs = make_jobs(7)
    worker = dispatcher._workers.idle[-1]
    dispatcher._workers._send(worker, jobs)
    body = body_of(worker)
    long = Message(Kind.RESULT, dumps_result(bytes(100_000)), 1000)
    first, second = b"".join(frame(long))[:50_000], b"".join(frame(long))[50_000:]

    def taken_when(sends: Callable[[], object]) -> list[int]:
        sends()
        dispatcher._wait()
        dispatcher._wait()
        return [number for number, job in enumerate(jobs, 1) if job.done()]

    def by_pipe(*numbers: int) -> None:
        for number in numbers:
            assert body.writer.write(number, dumps_result(number), 1000)

    assert taken_when(lambda: by_pipe(1, 2)) == [1, 2]
    assert taken_when(lambda: body.theirs.send_at_once(first)) == [1, 2]
    assert taken_when(lambda: by_pipe(4)) == [1, 2]
    assert taken_when(lambda: body.theirs.send_at_once(second)) == [1, 2, 3, 4]
    # Both at once, and the channel is read first.
    short = Message(Kind.RESULT, dumps_result(6), 1000)
    by_pipe(5, 7)
    body.theirs.send(short)
    dispatcher._receive(worker)
    dispatcher._settle()
    assert [job.result(0) for job in jobs[3:]] == [4, 5, 6, 7]
    assert not worker.sent
    assert worker.answered == 7


def test_answer_in_the_pipe_is_one_when_the_channel_has_ended(
    dispatcher: Dispatcher,
) -> None:
    """It is read before the worker is judged, also if the end is heard of first."""
    dispatcher._workers._learn(0.001)
    answered, running, waiting = jobs = make_jobs(3)
    worker = dispatcher._workers.idle[-1]
    dispatcher._workers._send(worker, jobs)
    body = body_of(worker)
    assert body.record.begin(1)
    assert body.writer.write(1, dumps_result("given"), 1000)
    assert body.record.begin(2)
    body.theirs.close()
    dispatcher._receive(worker)
    dispatcher._settle()
    assert answered.result(0) == "given"
    with pytest.raises(WorkerDiedError):
        running.result(0)
    assert list(dispatcher._waiting) == [waiting]
    dispatcher._waiting.clear()


def test_who_is_overdue_is_killed_while_long_answers_wait(
    dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may follow each other without end."""
    monkeypatch.setattr(_dispatcher, "_LONG_PICKLE", 1 << 16)
    dispatcher._waiting += make_jobs(3)
    dispatcher._act()
    stuck, *others = dispatcher._workers.all.values()
    for worker in others:
        body_of(worker).theirs.send(Message(Kind.RESULT, dumps_result(bytes(100_000))))
    dispatcher._wait()
    stuck.was_spared = True  # for an answer of its own, which has not come
    dispatcher._workers._kill_at[stuck] = 0.0
    dispatcher._wait()
    assert [len(worker.sent) for worker in others].count(1) == 1
    assert body_of(stuck).is_killed


def test_short_answer_does_not_wait_for_a_long_one(
    dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its worker could be idle while the other's is unpickled."""
    monkeypatch.setattr(_dispatcher, "_LONG_PICKLE", 1)
    dispatcher._waiting += make_jobs(3)
    dispatcher._act()
    for worker in dispatcher._workers.all.values():
        body_of(worker).theirs.send(Message(Kind.RESULT, [b"N."]))
    dispatcher._wait()
    assert len(dispatcher._told) == 3


class Clock:
    """Stands for the time module: it goes when somebody sleeps, or says so."""

    def __init__(self, now: float = 1.0) -> None:
        self.now = now
        self.pauses: list[float] = []

    def monotonic(self) -> float:
        """Tell the time."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Note that somebody did."""
        self.pauses.append(seconds)
        self.now += seconds


def when_callers_gave_way(
    dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> list[int]:
    """Let a caller submit two jobs each millisecond, while the thread sleeps for six."""
    clock, found = Clock(), []
    select = dispatcher._selector.select

    def submit_meanwhile(_timeout: float | None) -> list[Any]:
        for millisecond in range(6):
            pauses = len(clock.pauses)
            for _ in range(2):
                dispatcher.add(("jobs", "pid"), (), DEFAULTS)
            found.extend([millisecond] * (len(clock.pauses) - pauses))
            clock.now += 0.001
        return select(0.0)

    with monkeypatch.context() as patch:
        patch.setattr(_dispatcher, "time", clock)
        patch.setattr(dispatcher, "_thread", threading.current_thread())
        patch.setattr(dispatcher._selector, "select", submit_meanwhile)
        dispatcher._wait()
    return found


def test_callers_give_way_when_an_answer_is_due(
    dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that wakes could not have the interpreter otherwise. Not at each job."""
    dispatcher._workers._learn(0.0035)
    dispatcher._waiting += make_jobs(3)
    dispatcher._act()
    assert not dispatcher._workers.idle
    assert when_callers_gave_way(dispatcher, monkeypatch) == [4, 5]


def test_caller_that_wakes_the_thread_gives_way_to_it(
    dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for the first job, which goes to the worker that was offered."""
    dispatcher._workers._learn(0.0035)
    assert when_callers_gave_way(dispatcher, monkeypatch) == [0, 1, 2, 3, 4, 5]


def test_callers_give_way_later_for_jobs_of_microseconds(
    dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would lose more by it than is won if they did as soon as it is woken."""
    dispatcher._workers._learn(1e-6)
    assert when_callers_gave_way(dispatcher, monkeypatch) == [2, 3, 4, 5]


def test_callers_give_way_at_each_job_while_the_thread_acts(
    dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lets go of the interpreter several times in one turn."""
    clock = Clock()

    def submit_meanwhile(_spared: object) -> None:
        for _ in range(3):
            dispatcher.add(("jobs", "pid"), (), DEFAULTS)

    with monkeypatch.context() as patch:
        patch.setattr(_dispatcher, "time", clock)
        patch.setattr(dispatcher, "_thread", threading.current_thread())
        patch.setattr(dispatcher._workers, "kill_overdue", submit_meanwhile)
        patch.setattr(dispatcher._selector, "select", lambda _timeout: [])
        dispatcher._wait()
    assert len(clock.pauses) == 3


def test_thread_that_was_woken_while_it_settled_takes_no_nap(
    dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job has come for which there is room for another worker."""
    clock, workers = Clock(), dispatcher._workers
    workers._learn(0.001)
    workers._bytes_per_answer = 50.0
    dispatcher._waiting += make_jobs(9)
    dispatcher._act()
    workers._most = 4
    assert workers.seconds_to_nap(0, is_listening=False) > 0
    monkeypatch.setattr(_dispatcher, "time", clock)
    monkeypatch.setattr(dispatcher, "_settle", dispatcher._wake)
    dispatcher._wait()
    assert clock.pauses == []
