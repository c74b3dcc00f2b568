"""The workers of one executor: who is idle, who starts, who leaves, who died.

Runs in the parent, in the dispatcher's thread.
"""

from __future__ import annotations

import enum
import math
import selectors
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from .._launch.handle import KILL, HasFileno, WorkerHandle
from .._wire.calls import Buffer
from .._wire.channel import Stage
from .._wire.exceptions import dumps_exception, loads_exception
from .._wire.phase import RECALL_DELAY, Phase, Transaction
from ..errors import DBPoolError, Outcome, OutcomeUnknownError
from . import pace, verdict
from .batches import messages_for, next_jobs
from .fast_lane import Offer
from .guarded_log import log
from .job import Job
from .starts import DEFAULT_LIMITS, LEAVE_GRACE, Failure, StartLimits, Starts

_LATE = 0.2  # seconds by which this process is not late, unless it was stopped
_STOP_AGAIN = 0.1  # seconds, after a call to end a worker that has failed
_SPARED = 1.0  # seconds more for an answer that may be on its way


class State(enum.Enum):
    """The life of a worker."""

    STARTING = "starting"
    READY = "ready"
    LEAVING = "leaving"  # was told that no more jobs will come


class Ending(NamedTuple):
    """What the end of a worker means for its jobs.

    Attributes:
        again: The jobs to send again.
        job: The one that ended with it, if any.
        error: What that job ended with.
        transaction: The one that it was about to commit, if it has noted it.
        unread: Those before it, whose answers could not be read, with their errors.
        has_own_commit: Whether that job may have committed something by itself.
    """

    again: list[Job]
    job: Job | None = None
    error: DBPoolError | None = None
    transaction: Transaction = Transaction()
    unread: Sequence[tuple[Job, DBPoolError]] = ()
    has_own_commit: bool = False


class Recall(NamedTuple):
    """That jobs were taken back: up to which number, and when on time.monotonic()."""

    number: int
    at: float


@dataclass(slots=True, eq=False)
class Worker:
    """A worker and what is known of it."""

    body: WorkerHandle
    state: State = State.STARTING
    sent: list[Job] = field(default_factory=list)  # in order, not yet answered
    last_number: int = 0  # of the jobs sent to it in its life, those taken back too
    answered: int = 0  # jobs in its life
    since: float = 0.0  # on time.monotonic(): its first job was not begun before it
    received: int = 0  # bytes of answers, when it was last looked at
    recalled: Recall | None = None  # since it has answered last
    has_unsent: bool = False  # its channel did not take all
    is_overdue: bool = False  # it is killed for the timeout of its job
    killed_for: str | None = None  # why it is about to be killed by the executor
    was_spared: bool = False  # it was overdue, and perhaps only not listened to
    is_stopping: bool = False  # it is about to be ended, and gets no jobs
    stage: Stage = Stage.IMPORT  # of its start
    start_failure: Sequence[Buffer] | None = None
    may_start_later: bool = False  # by what that is


class Workers:
    """All workers of one executor.

    Args:
        start: Starts one worker.
        most: Upper bound on workers that may get jobs.
        max_jobs: Jobs after which a worker is replaced; None for no bound.
        selector: Where what they answer by is registered, with its Worker as data.
        limits: How long starts may take.
    """

    def __init__(
        self,
        start: Callable[[], WorkerHandle],
        most: int,
        max_jobs: int | None,
        selector: selectors.BaseSelector,
        limits: StartLimits = DEFAULT_LIMITS,
    ) -> None:
        self._start = start
        self.starts = Starts(limits)
        self._most = most
        self._max_jobs = max_jobs
        self._selector = selector
        self.all: dict[int, Worker] = {}  # by the number of the handle
        self.idle: list[Worker] = []  # the last to become idle is the next to work
        self._offered: Worker | None = None
        self._short: dict[Worker, None] = {}  # busy, and may be sent more
        self._seconds_per_job = self._bytes_per_answer = math.inf  # not too low
        # For when to look at answers: from one job that had to wait for a processor
        # nothing follows for the others.
        self.usual_seconds = math.inf
        # On time.monotonic(): when a worker is killed that is still at its job, or there.
        self._kill_at: dict[Worker, float] = {}
        # For workers that are stuck: on time.monotonic(), infinite if none has two jobs.
        self._next_look = math.inf
        self._notes: set[str] = set()  # that were logged
        self._starting = 0
        self._leaving = 0
        self._are_stopped = False  # all of them, so that none fails to start by itself
        self.died = 0
        self.replaced = 0
        self._ended = 0

    # -- Starting ---------------------------------------------------------------

    @property
    def failure(self) -> Failure | None:
        """Why no worker can start; None as long as one may."""
        return self.starts.failure

    @property
    def has_room(self) -> bool:
        """Whether another worker may be started."""
        return not self.starts.are_over and self._alive < self._most

    @property
    def are_all_ready(self) -> bool:
        """Whether there are as many workers as may be, and none of them starts."""
        return self._alive >= self._most and not self._starting

    def starts_due(self, waiting: int) -> int:
        """Say how many workers to start now for the jobs that wait."""
        if self.starts.are_over or self.starts.are_delayed():
            return 0
        return pace.workers_to_start(
            waiting=waiting,
            idle=len(self.idle),
            starting=self._starting,
            alive=self._alive,
            max_workers=self._most,
        )

    def wanting(self, waiting: int) -> int:
        """Say how many workers have no job only because they are not ready yet."""
        return len(self.idle) + self._starting + self.starts_due(waiting)

    def start_one(self) -> None:
        """Start a worker; a failure to do so counts as a failed start."""
        body: WorkerHandle | None = None
        self.starts.note_start()
        try:
            body = self._start()
            self._watch_new(worker := Worker(body))
        except BaseException as exc:
            log.warning("a worker could not be started", exc_info=True)
            if body is not None:
                body.kill()
                body.bury()
            text = f"{type(exc).__name__}: {exc}"
            self._note_failed_start(text, dumps_exception(exc))
            return
        self._time_stage(worker)
        if self._ended > self.replaced:
            self.replaced += 1
            if not self.starts.have_failed:  # of that the log says enough
                log.info("worker %s replaces one that has ended", body.pid)
        self.all[body.number] = worker
        self._starting += 1
        log.debug("worker %s was started", body.pid)

    def _watch_new(self, worker: Worker) -> None:
        registered: list[HasFileno] = []
        body = worker.body
        try:
            for end in (body.channel, body.answers, body.end):
                if end is not None:
                    self._selector.register(end, selectors.EVENT_READ, worker)
                    registered.append(end)
        except BaseException:
            for end in registered:
                self._selector.unregister(end)
            raise

    def take_note(self, text: str) -> None:
        """Log what a worker has to say, once for all workers."""
        if text not in self._notes:
            self._notes.add(text)
            log.warning("%s", text)

    def note_ready(self, worker: Worker) -> None:
        """Note that a worker has its engine and its initializer has run."""
        self.starts.note_ready()
        if worker.state is State.STARTING:
            self._starting -= 1
            worker.state = State.READY
            worker.was_spared = False
            if not worker.is_stopping:
                self._kill_at.pop(worker, None)
                self.idle.append(worker)
        log.debug("worker %s is ready", worker.body.pid)

    def note_stage(self, worker: Worker, stage: Stage) -> None:
        """Note how far the start of a worker has come."""
        worker.stage = stage
        if worker.state is State.STARTING and not worker.is_stopping:
            worker.was_spared = False
            if not self.starts.is_hurried:
                self._time_stage(worker)

    def note_start_failure(
        self, worker: Worker, parts: Sequence[Buffer], *, may_pass: bool
    ) -> None:
        """Note what a worker that starts has raised; its end follows."""
        worker.start_failure, worker.may_start_later = parts, may_pass

    def _time_stage(self, worker: Worker) -> None:
        seconds = self.starts.seconds_for_stage()
        if seconds is not None:
            self._kill_at[worker] = time.monotonic() + seconds

    @property
    def _alive(self) -> int:
        return len(self.all) - self._leaving

    def _note_failed_start(
        self, text: str, parts: Sequence[Buffer] | None, *, may_pass: bool = False
    ) -> None:
        if self._are_stopped:
            return
        able = self._alive - self._starting
        if self.starts.is_hurried:
            able += sum(
                worker.state is State.STARTING and not worker.is_stopping
                for worker in self.all.values()
            )
        self.starts.note_failure(text, parts, may_pass=may_pass, able=able)

    # -- Working ----------------------------------------------------------------

    def offer(self) -> Offer | None:
        """Offer an idle worker to callers, if there is one, until :meth:`withdraw`."""
        # The worker whose last job this may be has to be told so.
        if not self.idle or self._max_jobs is not None:
            return None
        worker = self.idle[-1]
        if worker.has_unsent or not worker.body.channel.is_between_messages:
            return None
        self._offered = worker
        return Offer(worker.body.channel, worker.last_number + 1)

    def withdraw(self, offer: Offer) -> Worker:
        """Note what callers have done with the worker that was offered."""
        worker, self._offered = self._offered, None
        assert worker is not None  # noqa: S101 - there is one for each offer
        if offer.answered:
            self._note_durations(worker, offer.answered, offer.nanoseconds)
        worker.last_number = offer.number - 1
        if offer.taken is not None:
            job, data = offer.taken
            self.idle.remove(worker)
            worker.since = time.monotonic()
            worker.last_number = job.number = offer.number
            worker.sent.append(job)
            unsent = data if offer.unsent is None else offer.unsent
            if unsent:
                self.watch(worker, sent=worker.body.channel.send_rest(unsent))
        return worker

    def count_busy(self) -> int:
        """Count the workers that have a job of the dispatcher's; from any thread."""
        return sum(bool(worker.sent) for worker in list(self.all.values()))

    def send_from(self, waiting: deque[Job]) -> None:
        """Send waiting jobs to the workers that may have some."""
        ready = [w for w in self.all.values() if w.state is State.READY]
        share = pace.share_of_each(
            unanswered=len(waiting) + sum(len(worker.sent) for worker in ready),
            workers=len(ready),
            usual_seconds=self.usual_seconds,
        )
        while waiting and (self.idle or self._short):
            worker = self.idle[-1] if self.idle else next(iter(self._short))
            count = pace.jobs_to_send(
                waiting=len(waiting),
                sent=len(worker.sent),
                seconds_per_job=self._seconds_per_job,
                share=share,
            )
            if self._max_jobs is not None:
                left = self._max_jobs - worker.answered - len(worker.sent)
                count = min(count, left)
            if not count:
                # It has enough, by what is known now of how long jobs take.
                del self._short[worker]
                continue
            jobs = next_jobs(waiting, count, alone=not worker.sent)
            if jobs:
                self._send(worker, jobs)
            elif worker.sent:
                del self._short[worker]

    def _send(self, worker: Worker, jobs: list[Job]) -> None:
        if worker.sent:
            del self._short[worker]
        else:
            self.idle.remove(worker)
            worker.since = time.monotonic()
        for number, job in enumerate(jobs, worker.last_number + 1):
            job.number = number
        worker.last_number += len(jobs)
        worker.sent += jobs
        size = pace.group_size(self._seconds_per_job)
        groups = [jobs[first : first + size] for first in range(0, len(jobs), size)]
        try:
            messages = [m for g in groups for m in messages_for(g, g[0].number)]
            self.watch(worker, sent=worker.body.channel.send(*messages))
        except BaseException as exc:
            # What it has not begun goes to another, once its channel has ended.
            worker.killed_for = f"sending it a job raised {exc!r}"
            worker.is_stopping = True
            self._kill_at[worker] = time.monotonic() + _STOP_AGAIN
            with suppress(Exception):
                worker.body.kill()
            return
        if len(worker.sent) > 1 and self._next_look == math.inf:
            self._next_look = time.monotonic() + pace.PATIENCE
        if worker.answered + len(worker.sent) == self._max_jobs:
            self._tell_to_leave(worker)
        options = jobs[0].options
        if options.timeout is not None:
            # The worker itself has cancelled the statement by then.
            self._kill_at[worker] = worker.since + options.timeout + options.kill_after

    def note_answers(
        self, worker: Worker, count: int, nanoseconds: int, returned: int
    ) -> None:
        """Note that a worker's first jobs were taken from what was sent to it.

        Args:
            worker: The worker.
            count: How many it has answered.
            nanoseconds: How long those have taken.
            returned: How many it has not begun, since they were taken back.
        """
        if count:
            self._note_durations(worker, count, nanoseconds)
            worker.since = time.monotonic()
            worker.recalled = None
            worker.was_spared = False
            if not worker.is_stopping:
                self._kill_at.pop(worker, None)
        if count or returned:
            self._note_sent_less(worker)

    def _note_durations(self, worker: Worker, count: int, nanoseconds: int) -> None:
        worker.answered += count
        received = worker.body.bytes_received
        self._learn(nanoseconds / 1e9 / count, count)
        self._bytes_per_answer = pace.updated_estimate(
            self._bytes_per_answer, (received - worker.received) / count, count
        )
        worker.received = received

    def take_back(self, waiting: int) -> list[Job]:
        """Give the jobs that were sent ahead and wait for the wrong worker."""
        if self._next_look == math.inf or (now := time.monotonic()) < self._next_look:
            return []
        self._next_look = math.inf
        taken: list[Job] = []
        for worker in self.all.values():
            if len(worker.sent) < 2:
                continue
            self._next_look = min(self._next_look, now + pace.PATIENCE)
            seconds_at_job = now - worker.since
            if seconds_at_job >= pace.PATIENCE:
                self._learn(seconds_at_job)
            if worker.recalled is None:
                if not pace.is_taken_back(
                    sent=len(worker.sent),
                    seconds_at_job=seconds_at_job,
                    seconds_per_job=self._seconds_per_job,
                    others_idle=bool(self.idle) and not waiting,
                ):
                    continue
                try:
                    worker.body.recall(worker.last_number)
                except Exception:  # noqa: S112 - it is tried again at the next look
                    continue
                # Not now: between the two this thread may have waited for a processor.
                worker.recalled = Recall(worker.last_number, time.monotonic())
            if now - worker.recalled.at < RECALL_DELAY:
                self._next_look = now + RECALL_DELAY
                continue
            try:
                begun, last = worker.body.progress().begun, worker.recalled.number
            except Exception:  # noqa: S112 - as there
                continue
            taken += (job for job in worker.sent if begun < job.number <= last)
            worker.sent = [j for j in worker.sent if not begun < j.number <= last]
            worker.recalled = None
            self._note_sent_less(worker)
        return taken

    def seconds_to_nap(self, waiting: int, *, is_listening: bool) -> float:
        """Say how long the answers of busy workers may add up."""
        sent = [len(worker.sent) for worker in self.all.values()]
        if self._starting or not sent:
            return 0.0
        return pace.seconds_to_nap(
            waiting=waiting,
            fewest=min(sent),
            most=max(sent),
            seconds_per_job=self.usual_seconds,
            bytes_per_answer=self._bytes_per_answer,
            is_listening=is_listening,
        )

    def _learn(self, sample: float, jobs: int = 1) -> None:
        sample = max(sample, 1e-6)
        self._seconds_per_job = pace.updated_estimate(
            self._seconds_per_job, sample, jobs
        )
        self.usual_seconds = pace.moving_average(self.usual_seconds, sample, jobs)

    def _note_sent_less(self, worker: Worker) -> None:
        if worker.is_stopping:
            return
        if worker.state is State.LEAVING:
            if not worker.sent:
                self._kill_at[worker] = time.monotonic() + LEAVE_GRACE
        elif worker.sent:
            self._short[worker] = None
        else:
            self._short.pop(worker, None)
            self.idle.append(worker)

    def watch(self, worker: Worker, *, sent: bool) -> None:
        """Have the selector tell when a channel takes more, while it has to."""
        if worker.has_unsent is sent:
            worker.has_unsent = not sent
            events = selectors.EVENT_READ | (0 if sent else selectors.EVENT_WRITE)
            self._selector.modify(worker.body.channel, events, worker)

    # -- Leaving ----------------------------------------------------------------

    def tell_all_to_leave(self) -> None:
        """Tell the workers without a job that no more will come."""
        for worker in self.all.values():
            if not worker.sent and worker.state is not State.LEAVING:
                self._tell_to_leave(worker)

    def _tell_to_leave(self, worker: Worker) -> None:
        if worker.state is State.STARTING:
            self._starting -= 1
        elif worker in self.idle:
            self.idle.remove(worker)
        self._short.pop(worker, None)
        worker.state = State.LEAVING
        self._leaving += 1
        if not (worker.sent or worker.is_stopping):
            # One that starts may have less time left, and gets no more by this.
            at = time.monotonic() + LEAVE_GRACE
            self._kill_at[worker] = min(at, self._kill_at.get(worker, at))
        self.watch(worker, sent=worker.body.channel.end_sending())

    def kill_overdue(self, spared: Collection[Worker]) -> None:
        """Kill the workers that were given time to leave, or for a job, and are over.

        Args:
            spared: Not these, which may have answered in time.
        """
        if not self._kill_at:
            return
        now = time.monotonic()
        over = {w for w, deadline in self._kill_at.items() if deadline <= now}
        for worker in over.difference(spared):
            if not worker.is_stopping:
                is_starting = worker.state is State.STARTING
                if (worker.sent or is_starting) and self._may_have_answered(
                    worker, now
                ):
                    continue
                worker.is_overdue = bool(worker.sent)
                worker.killed_for = "it did not leave in time"
                if is_starting:
                    worker.killed_for = self.starts.overdue_text(worker.stage)
                if worker.is_overdue:
                    job = worker.sent[0]
                    worker.killed_for = (
                        f"its job {job.label} did not end {job.options.kill_after:g} s "
                        "after its timeout"
                    )
                pid, why = worker.body.pid, worker.killed_for
                log.warning("the executor kills worker %s: %s", pid, why)
            self._stop(worker, KILL)

    def stop_all(self, number: int, why: str) -> None:
        """Have all workers cancel what they have on a server, and end them by a signal.

        Args:
            number: The signal.
            why: The reason, as a clause.
        """
        self._are_stopped = True
        for worker in self.all.values():
            worker.killed_for = worker.killed_for or why
            self._stop(worker, number)

    def hurry(self) -> None:
        """Have nothing wait long for a start: jobs that wait are cancelled."""
        if self.starts.is_hurried:
            return
        self.starts.is_hurried = True
        at = time.monotonic() + LEAVE_GRACE
        for worker in self.all.values():
            if worker.state is State.STARTING and not worker.is_stopping:
                self._kill_at[worker] = min(at, self._kill_at.get(worker, at))

    def _stop(self, worker: Worker, number: int) -> None:
        worker.is_stopping = True
        if worker in self.idle:
            self.idle.remove(worker)
        self._short.pop(worker, None)
        try:
            seconds = worker.body.stop(number)
        except Exception:
            seconds = _STOP_AGAIN
        self._kill_at[worker] = time.monotonic() + seconds

    def _may_have_answered(self, worker: Worker, now: float) -> bool:
        """Say, once for each job, whether its answer may be on its way.

        A process that was stopped for a while finds all deadlines past when it goes on,
        and is told of them sooner than of the answers that have come (epoll_wait(2),
        "EINTR").
        """
        if worker.was_spared:
            return False
        is_late = now - self._kill_at[worker] > _LATE
        try:
            is_late = is_late or worker.body.progress().phase is Phase.COMMITTED
        except Exception:  # then it is not known
            is_late = True
        if is_late:
            worker.was_spared = True
            self._kill_at[worker] = now + _SPARED
        return worker.was_spared

    def seconds_to_deadline(self, waiting: int) -> float | None:
        """Say how long the thread may sleep; None for no bound."""
        have_failed = self.starts.have_failed
        if not self._kill_at and self._next_look == math.inf and not have_failed:
            return None
        times = list(self._kill_at.values())
        if self._next_look != math.inf:
            times.append(self._next_look)
        if waiting and self.has_room and have_failed:
            times.append(self.starts.next_at)
        return max(0.0, min(times) - time.monotonic()) if times else None

    # -- Dying ------------------------------------------------------------------

    def bury(self, worker: Worker) -> Ending:
        """Judge a worker whose channel has ended, and free what is left of it."""
        body = worker.body
        for end in (body.channel, body.answers, body.end):
            if end is not None:
                with suppress(Exception):  # it is closed below, and forgotten with that
                    self._selector.unregister(end)
        del self.all[worker.body.number]
        self._short.pop(worker, None)
        self._kill_at.pop(worker, None)
        self._ended += 1
        pid, exitcode = worker.body.pid, worker.body.bury()
        death = verdict.death_of(pid, exitcode, worker.killed_for)
        if worker.state is not State.LEAVING or worker.sent:
            self.died += 1
        match worker.state:
            case State.STARTING:
                self._starting -= 1
                text, parts = f"{death} while it started", worker.start_failure
                if worker.is_stopping and worker.killed_for is not None:
                    text = worker.killed_for
                elif parts is not None:
                    cause = loads_exception(parts)
                    text = f"{type(cause).__name__}: {cause}"
                may_pass = worker.may_start_later and not worker.is_stopping
                self._note_failed_start(text, parts, may_pass=may_pass)
            case State.LEAVING:
                self._leaving -= 1
            case State.READY if not worker.sent:
                if worker in self.idle:
                    self.idle.remove(worker)
                log.info("%s while it was idle", death)
        progress = worker.body.progress()
        unread: list[tuple[Job, DBPoolError]] = []
        while worker.sent and worker.sent[0].number < progress.begun:
            # Only if reading them has failed.
            text = f"its answer was lost: {worker.killed_for or death}"
            unread.append((worker.sent.pop(0), OutcomeUnknownError(text)))
            unread[-1][0].worker = pid
        if not worker.sent:
            return Ending([], unread=unread)
        job, *others = worker.sent
        options = job.options
        outcome = verdict.outcome_at_end(
            job.number, progress, read_only=options.read_only
        )
        job.worker = pid
        is_begun = outcome is not Outcome.NEVER_STARTED
        verb, which = "ran" if is_begun else "had not begun", job.label_of_attempt
        log.warning("%s; it %s job %s: %s", death, verb, which, outcome.value)
        if not is_begun:
            job.deliveries += 1
            if job.deliveries < pace.DELIVERY_ATTEMPTS:
                return Ending([job, *others], unread=unread)
        limit = options.timeout if worker.is_overdue else None
        error = verdict.error_at_end(death, outcome, timeout=limit)
        return Ending(
            others,
            job,
            error,
            worker.body.transaction(),
            unread,
            progress.has_own_commit,
        )
