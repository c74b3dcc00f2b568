"""The one thread that talks to workers.

Runs in the parent. Callers reach it by what they append, and by a byte that wakes it;
it sends the jobs that wait to idle workers, and settles the futures of those answered.
"""

from __future__ import annotations

import math
import os
import selectors
import sys
import threading
import time
from _thread import start_new_thread
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import Any

from .._forks import process_id
from .._forks.ends import make_ends
from .._launch.handle import WorkerHandle
from .._wire.calls import Call, Label, Name, pack_call
from .._wire.channel import Kind, Message, Stage
from .._wire.exceptions import ASK_LEDGER, REPEAT, advice_of
from .._wire.logs import handle_record
from .._wire.options import DEFAULTS, JobOptions
from .._wire.phase import Transaction
from .._worker import ledger_jobs
from .._worker.main import outcome_of_transaction
from ..errors import DBPoolError, Outcome, OutcomeUnknownError, ResultLostError
from . import pace, verdict
from .fast_lane import Offers
from .flag import Flag
from .fleet import Ending, Worker, Workers
from .guarded_log import log
from .interpreter_exit import at_exit
from .job import Job, Known, Told, end_unasked, read
from .retries import Repeats
from .starts import DEFAULT_LIMITS, StartLimits
from .stats import Stats
from .verdict import may_repeat, never_sent_error, resolved_error

_WAY_SECONDS = 5e-5  # for which a caller gives way
_WAY_EVERY = 5e-4  # seconds, at most, to a thread that is late
_NOTICE_SECONDS = 0.2  # after which an end of the thread is noticed
_LONG_PICKLE = 1 << 20  # bytes, which may be hundreds of thousands of objects

_FAILED_LOOKS = 100  # in a row, after which the thread gives up
_AFTER_FAILED_LOOK = 0.01  # seconds
_SETTLED_BY_LEDGER = (Outcome.UNKNOWN, Outcome.COMMITTED)
# It waits for the transaction of the lost job, but not for ever.
_ASKS_LEDGER = DEFAULTS.with_(timeout=10.0, kill_after=1.0, retries=20)
_LEDGER_TRIES = 10
_IN_ITS_COMMIT = (OutcomeUnknownError, ResultLostError)


class Dispatcher:
    """Sends waiting jobs to workers and settles their futures.

    Args:
        start_worker: Starts one worker.
        prepare: Called once, in a caller's thread, before the first worker starts.
        max_workers: Upper bound on workers.
        max_jobs: Jobs after which a worker is replaced; None for no bound.
        forks: Whether to start all workers at the first job, before there is a thread
            of ours that could hold a lock which a forked worker would inherit.
        limits: How long starts of workers may take.
    """

    def __init__(
        self,
        start_worker: Callable[[], WorkerHandle],
        prepare: Callable[[], None],
        max_workers: int,
        max_jobs: int | None,
        *,
        forks: bool,
        limits: StartLimits = DEFAULT_LIMITS,
    ) -> None:
        self._prepare = prepare
        self._at_once = max_workers if forks else 0
        self._pid = os.getpid()
        # Guards the begin, the flags of a shutdown, and what callers do with an offer. Not
        # what is queued: to take it and let go of it was a fifth of submit(). Never held
        # while callbacks run.
        self._lock = threading.RLock()
        self._waiting: deque[Job] = deque()  # appended to by callers
        self._is_open = False  # the thread has begun, and nothing is known against it
        # Whether the thread looks at what waits no more, or is about to find that out.
        self._has_ended = False
        self._closing = False
        self._cancelling = False
        self._sparing = False  # what a worker would have by now
        # By which all workers are to end, and why.
        self._stop_signal: tuple[int, str] | None = None
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()  # for who starts it
        self._ended = Flag()  # it has nothing left to do
        # True while the thread sleeps and a new job would be something to do.
        self._listening = False
        # When the thread has something to do for the workers, on time.monotonic(): 0
        # while it does it, infinite while it waits for a job; and then how many seconds
        # after that.
        self._due = math.inf
        self._until_due = 0.0
        # Each set when all workers are ready, or never will be.
        self._awaited: deque[Flag] = deque()
        self._bell, self._ear = make_ends()
        self._bell.setblocking(False)
        self._ear.setblocking(False)
        # From here on the thread's own.
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._ear, selectors.EVENT_READ)
        # While it sleeps: what callers may do without it.
        self._offers = Offers(self._lock, self._selector, self._wake)
        self._workers = Workers(
            start_worker, max_workers, max_jobs, self._selector, limits
        )
        self._failed_looks = 0  # of the selector, in a row
        self._fault: BaseException | None = None  # that has ended the thread
        self._postponed: set[Worker] = set()  # whose answers another's made wait
        self._told_jobs: list[Job] = []  # to be settled
        self._told: list[Told] = []  # what each of them ends by
        self._spared: set[Job] = set()  # not to be cancelled with those that wait
        self._repeats = Repeats()
        # Why all workers were killed: no job will be sent again.
        self._killed_for: str | None = None
        self._done = self._failed = self._retried = 0
        self._skipped = 0  # calls that a worker has found in the ledger
        self._looked_up = 0  # those that map() has found there

    # -- Called by other threads --------------------------------------------------

    def add(
        self,
        name: Name | Label | None,
        call: Call,
        options: JobOptions,
        keys: str | tuple[str, ...] | None = None,
    ) -> Job:
        """Queue a job; the first one starts the thread.

        Args:
            name: Of the function that it calls, as :func:`pack_call` gives it.
            call: As well.
            options: How it is run.
            keys: Its key in the ledger, or those of a chunk's calls.

        Raises:
            WorkerStartError: The executor is broken.
            RuntimeError: It was shut down, or this is a forked copy of its process.
        """
        # Before any lock: in a copy, a thread that is not there may hold it for ever.
        if self._pid != (process_id.known_pid or os.getpid()):
            self.check_owner()
        if not self._is_open:
            self._open()
        job = Job(name, call, options)
        if keys is not None:
            job.keys = keys
        if self._offers.standing is None:
            self._waiting.append(job)
        elif self._take_offer(job):
            return job
        # Looked at last, against _is_over() and _abandon(), which set it first.
        if self._has_ended and job.refuse():
            self._is_open = False
            self.check_open()
        if self._listening:
            self._due = time.monotonic() + self._until_due
            self._wake()
        # The thread is in a call to the system, or about to wake. It would have to wait
        # for the interpreter, 5 ms by default, if this one submitted on and on.
        if (now := time.monotonic()) >= self._due:
            if self._due:
                self._due = now + _WAY_EVERY
            time.sleep(_WAY_SECONDS)
        return job

    def _open(self) -> None:
        with self._lock:
            self.check_open()
            if self._thread is None:
                self._begin()
            at_exit.closes(self)
            self.check_open()  # workers that are forked may all have failed to start
            self._is_open = True

    def _take_offer(self, job: Job) -> bool:
        """Send a job to the worker that is offered, if it may have it, or queue it.

        Returns:
            Whether the worker has it.
        """
        with self._lock:
            offer = self._offers.standing
            if offer is None:
                self._waiting.append(job)
                return False
            if job.options.timeout is not None or not offer.take(job):
                offer.is_open = False  # a later job must not overtake this one
                self._waiting.append(job)
                return False
            job.fast_lane = self._offers
        if offer.unsent != b"":
            self._wake()
        return True

    def note_looked_up(self, count: int) -> None:
        """Count calls that were found in the ledger before they were submitted."""
        with self._lock:
            self._looked_up += count

    def check_open(self) -> None:
        """Raise as :meth:`add` would in the process that made the executor."""
        if self._workers.failure is not None:
            raise self._workers.failure.error()
        if self._fault is not None:
            raise BrokenProcessPool(
                f"the executor's own thread failed with {self._fault!r}; make a new "
                "executor, and report what the log has of it"
            )
        if self._closing:
            raise RuntimeError("cannot schedule new futures after shutdown")
        if at_exit.has_begun:
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    def is_copy(self) -> bool:
        """Say whether this is a forked copy of the process that made the executor."""
        return self._pid != os.getpid()

    def check_owner(self) -> None:
        """Refuse to work in a forked copy.

        Raises:
            RuntimeError: This is such a copy.
        """
        if self.is_copy():
            raise RuntimeError(
                "this executor belongs to the process that made it, and this is a "
                "forked copy of that process; make a new executor here"
            )

    def shutdown(self, *, cancel: bool, spare: bool = False) -> None:
        """Take no more jobs, and end once those taken are answered.

        Args:
            cancel: Whether to cancel the jobs that have not been sent.
            spare: Whether to do those all the same that wait only for their worker to
                start.
        """
        self.check_owner()
        with self._lock:
            self._sparing = cancel and spare and not self._cancelling
            self._cancelling = self._cancelling or cancel
            self.close()

    def close(self) -> None:
        """Do as :meth:`shutdown` does, where nobody is left to submit.

        Takes no lock: garbage collection may call it anywhere.
        """
        if self.is_copy():
            return
        self._closing = True
        self._is_open = False
        if self._thread is None:
            self._free()
        else:
            self._wake()

    def join(self, timeout: float | None = None) -> None:
        """Wait until the thread has ended; at once when called from that thread.

        Args:
            timeout: Seconds to wait at most; None for no bound.
        """
        thread = self._thread
        if thread is None or thread is threading.current_thread():
            return
        # Not Thread.join() alone: after an interrupt in there, up to CPython 3.12, a
        # thread that goes on counts as ended.
        if not self.is_copy() and self._ended.wait(timeout):
            thread.join()

    def start_workers(self, *, wait: bool) -> None:
        """Start all workers, ahead of the first job.

        Args:
            wait: Whether to return only when all of them are ready.

        Raises:
            WorkerStartError: The executor is broken.
            RuntimeError: It was shut down, or this is a forked copy of its process.
        """
        self.check_owner()
        self._open()
        ready = Flag()
        self._awaited.append(ready)
        self._wake()
        if wait:
            while not (ready.wait(_NOTICE_SECONDS) or self._ended.is_set()):
                pass
            self.check_open()

    def stop_workers(self, number: int, why: str) -> None:
        """End all workers, whatever they do, and cancel what waits.

        Args:
            number: The signal by which each ends.
            why: The reason, as a clause, for errors and the log.
        """
        self._stop_signal = number, why
        self.shutdown(cancel=True)

    def health(self) -> str:
        """Say in a word what state it is in."""
        if self.is_copy():
            return "copied"
        if self._workers.failure is not None or self._fault is not None:
            return "broken"
        return "shut down" if self._closing else "open"

    def stats(self) -> Stats:
        """Count workers and jobs; a snapshot."""
        workers, idle = len(self._workers.all), len(self._workers.idle)
        busy, done = self._workers.count_busy(), self._done
        if (offer := self._offers.standing) is not None:
            busy += offer.taken is not None
            done += offer.answered
        return Stats(
            workers=workers,
            idle=min(idle, workers - busy),
            # A job that came too late is left there.
            queued=0 if self._has_ended else len(self._waiting) + len(self._repeats),
            running=busy,
            done=done,
            failed=self._failed,
            retried=self._retried,
            died=self._workers.died,
            replaced=self._workers.replaced,
            stored=self._skipped + self._looked_up,
        )

    def _wake(self) -> None:
        self._listening = False
        try:  # noqa: SIM105 - a call between the two, and Ctrl-C could divide them
            self._bell.send(b"\0")
        except OSError:
            pass  # a byte is there already, or the thread has ended

    def _begin(self) -> None:
        self._prepare()
        # Fewer if it was interrupted before.
        for _ in range(self._at_once - len(self._workers.all)):
            self._workers.start_one()
        # In a thread that no signal reaches: an interrupt in Thread.start() may leave a
        # thread that waits for ever, or that nobody knows.
        started = Flag()
        start_new_thread(self._start_thread, (started,))
        started.wait()
        if self._thread is None:
            raise RuntimeError("can't start new thread")

    def _start_thread(self, started: Flag) -> None:
        try:
            with self._starting:
                if self._thread is None:
                    # Not a daemon: the exit of the interpreter closes and joins it.
                    self._thread = threading.Thread(
                        target=self._run, name="DBPoolDispatcher", daemon=False
                    )
                    self._thread.start()
        except RuntimeError:
            self._thread = None
        finally:
            started.set()

    # -- The thread -----------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._is_over():
                self._act()
                self._wait()
        except BaseException as exc:
            self._fault = exc
            self._abandon()
            log.critical("the dispatcher failed, its jobs are lost", exc_info=True)
        finally:
            try:
                self._free()
            finally:
                self._ended.set()

    def _is_ending(self) -> bool:
        return self._closing or self._workers.failure is not None

    def _is_over(self) -> bool:
        if not self._is_ending() or self._workers.all:
            return False
        if self._told or self._repeats:
            return False
        # Set first, then looked for what waits, against add(), which appends a job first
        # and then looks at this: at least one of the two sees the other.
        self._has_ended = True
        self._has_ended = not self._waiting
        return self._has_ended

    def _act(self) -> None:
        """Do all that can be done without waiting."""
        workers = self._workers
        if self._stop_signal is not None:
            stop, self._stop_signal = self._stop_signal, None
            self._killed_for = self._killed_for or stop[1]
            workers.stop_all(*stop)
        if self._cancelling:
            workers.hurry()
            self._killed_for = self._killed_for or workers.starts.gave_up
        if self._repeats:
            self._waiting += self._repeats.due()
        if workers.failure is not None:
            self._is_open = False
        if self._cancelling or workers.failure is not None:
            self._drop_waiting()
        self._waiting.extendleft(reversed(workers.take_back(len(self._waiting))))
        if self._waiting:
            workers.send_from(self._waiting)
            for _ in range(workers.starts_due(len(self._waiting))):
                workers.start_one()
        if self._awaited:
            self._start_ahead()
        if self._is_ending() and not (self._waiting or self._repeats):
            workers.tell_all_to_leave()

    def _start_ahead(self) -> None:
        workers = self._workers
        if not self._is_ending():
            for _ in range(workers.starts_due(sys.maxsize)):
                workers.start_one()
        if self._is_ending() or workers.are_all_ready:
            while self._awaited:
                self._awaited.popleft().set()

    def _wait(self) -> None:
        workers = self._workers
        # A busy worker is sent more when it answers: what is submitted until then adds
        # up to a full message.
        is_listening = self._listening = bool(workers.idle) or workers.has_room
        timeout = self._seconds_to_wait()
        if self._listening and timeout != 0.0 and not self._closing:
            self._offers.standing = workers.offer()
        # Last: whoever is woken needs the interpreter, which is let go of only now.
        self._due = math.inf
        self._settle()
        # Not self._listening: it may have been woken meanwhile, and is not to nap then.
        nap = workers.seconds_to_nap(len(self._waiting), is_listening=is_listening)
        self._until_due = pace.seconds_until_due(
            nap=nap,
            seconds_per_job=workers.usual_seconds,
            is_listening=is_listening,
        )
        if not is_listening:
            self._due = time.monotonic() + self._until_due
        if nap:
            time.sleep(nap)
        events = self._select(0.0 if self._told else timeout)
        if self._postponed:
            # Else the worker that answers fastest would always be the first.
            events.sort(key=lambda event: event[0].data not in self._postponed)
            self._postponed.clear()
        self._due = 0.0
        self._listening = False
        withdrawn = self._withdraw()
        if self._sparing:
            # Before the answers that came meanwhile: by those it would spare too many.
            self._sparing = False
            self._spare(workers.wanting(len(self._waiting)))
        if withdrawn is not None:
            self._take_in(*withdrawn)
        is_long_told = False
        for key, mask in events:
            worker: Worker | None = key.data
            if worker is None:
                with suppress(BlockingIOError):
                    self._ear.recv(4096)
                continue
            if worker.body.number not in workers.all:
                continue  # it was buried by another of its events
            if is_long_told and not worker.body.channel.is_between_messages:
                # That is settled before the rest of another long one is read: a worker
                # that waits for it leaves this thread a processor.
                self._postponed.add(worker)
                continue
            try:
                self._look_at(worker, key, mask)
            except BaseException as exc:
                self._lose(worker, exc)
                continue
            if self._told and _may_take_long(self._told[-1]):
                is_long_told = True
        workers.kill_overdue(self._postponed)

    def _select(self, timeout: float | None) -> list[tuple[selectors.SelectorKey, int]]:
        try:
            events = self._selector.select(timeout)
        except Exception:
            # For want of memory, say: what is there to be read is there at the next look.
            self._failed_looks += 1
            if self._failed_looks > _FAILED_LOOKS:
                raise
            time.sleep(_AFTER_FAILED_LOOK)
            return []
        self._failed_looks = 0
        return events

    def _look_at(self, worker: Worker, key: selectors.SelectorKey, mask: int) -> None:
        if key.fileobj is worker.body.answers:
            self._receive_answers(worker)
            return
        if key.fileobj is worker.body.end:
            # What it has sent is there. A process that it forked may hold its ends,
            # and theirs would not come for as long.
            worker.body.channel.is_final = True
        if mask & selectors.EVENT_WRITE:
            self._workers.watch(worker, sent=worker.body.channel.flush())
        if mask & selectors.EVENT_READ:
            self._receive(worker)

    def _lose(self, worker: Worker, exc: BaseException) -> None:
        """End a worker whose answers cannot be read, such as for want of memory."""
        if worker.body.number not in self._workers.all:
            self._end_unjudged(worker, exc)
            return
        why = f"reading its answer raised {type(exc).__name__}: {exc}"
        log.warning("the executor kills worker %s: %s", worker.body.pid, why)
        worker.killed_for = worker.killed_for or why
        try:
            with suppress(
                Exception
            ):  # it ends with its channel, or is killed by bury()
                worker.body.kill()
            self._note_ending(self._workers.bury(worker))
        except BaseException as another:
            self._end_unjudged(worker, another)

    def _end_unjudged(self, worker: Worker, exc: BaseException) -> None:
        """End the jobs of a worker that is buried without a verdict on them."""
        for end in (worker.body.channel, worker.body.answers):
            with suppress(BaseException):
                end.close()
        known = {*self._told_jobs, *self._waiting}
        for job in worker.sent:
            if job not in known:
                text = f"the executor could not judge its worker: {exc!r}"
                self._end(job, OutcomeUnknownError(text))

    def _withdraw(self) -> tuple[Worker, list[Message]] | None:
        """Take back what was offered.

        Returns:
            The worker that a caller had and what that has read from it; None if nothing.
        """
        offer = self._offers.withdraw()
        if offer is None:
            return None
        worker = self._workers.withdraw(offer)
        self._done += offer.answered
        if offer.told is not None:  # the caller was interrupted, or is about to do it
            self._done -= 1  # it is among those answered
            self._tell(*offer.told)
        # At the end of the stream the selector tells of it again.
        data = b"".join(offer.inbox)
        return (worker, worker.body.channel.take_in(data)) if data else None

    def _seconds_to_wait(self) -> float | None:
        workers = self._workers
        # Looked at again now that the flag is up: what came in between rang no bell.
        waiting = len(self._waiting)
        if waiting and (workers.idle or workers.failure or workers.starts_due(waiting)):
            return 0.0
        if self._is_ending() and not (waiting or workers.all or self._repeats):
            return 0.0
        wanted = waiting + len(self._awaited)
        times = workers.seconds_to_deadline(wanted), self._repeats.seconds_until_due()
        return min((seconds for seconds in times if seconds is not None), default=None)

    def _receive(self, worker: Worker) -> None:
        try:
            messages = worker.body.channel.receive()
        except EOFError:
            self._receive_answers(worker)
            self._note_ending(self._workers.bury(worker))
            return
        self._take_in(worker, messages)

    def _receive_answers(self, worker: Worker) -> None:
        worker.body.answers.read()
        self._workers.note_answers(worker, *self._take_answers(worker), 0)

    def _take_answers(self, worker: Worker) -> tuple[int, int]:
        """Take the short answers that were read, up to one for a later job.

        Returns:
            How many, and the nanoseconds that they have taken.
        """
        answers = worker.body.answers
        jobs = worker.sent[: answers.count]
        if not jobs:
            return 0, 0
        told, nanoseconds = answers.take([job.number for job in jobs])
        self._told_jobs += jobs[: len(told)]
        self._told += told
        del worker.sent[: len(told)]
        return len(told), nanoseconds

    def _take_in(self, worker: Worker, messages: list[Message]) -> None:
        # All short ones that were given before these are there by now.
        worker.body.answers.read()
        answered, nanoseconds = self._take_answers(worker)
        returned: list[Job] = []
        for message in messages:
            kind, _, number = message
            if kind is Kind.RESULT or kind is Kind.RESULT_UNKNOWN:
                self._tell(worker.sent.pop(0), message)
                answered += 1
                nanoseconds += number
            elif kind is Kind.FAILURE:
                job = worker.sent.pop(0)
                job.worker = worker.body.pid
                answered += 1
                nanoseconds += number
                advice = advice_of(message.parts)
                if advice == REPEAT:
                    self._repeat_or_settle(job, message)
                elif advice == ASK_LEDGER:
                    self._ask_ledger(job, message)
                else:
                    self._end(job, message)
            elif kind is Kind.LOG:
                # A filter may raise, and then it is no fault of the job.
                with suppress(BaseException):
                    handle_record(message.parts[0])
            elif kind is Kind.RETURNED:
                # If it is not that job, the job was taken off the worker's list before.
                if worker.sent and worker.sent[0].number == number:
                    returned.append(worker.sent.pop(0))
            elif kind is Kind.READY:
                self._workers.note_ready(worker)
            elif kind is Kind.SKIPPED:
                self._skipped += number
            elif kind is Kind.NOTE:
                self._workers.take_note(bytes(message.parts[0]).decode())
            elif kind is Kind.STAGE:
                self._workers.note_stage(worker, Stage(number))
            elif kind is Kind.START_FAILURE or kind is Kind.PASSING_START_FAILURE:
                may_pass = kind is Kind.PASSING_START_FAILURE
                self._workers.note_start_failure(
                    worker, message.parts, may_pass=may_pass
                )
            if worker.body.answers.count:
                more, longer = self._take_answers(worker)
                answered += more
                nanoseconds += longer
        self._waiting.extendleft(reversed(returned))
        self._workers.note_answers(worker, answered, nanoseconds, len(returned))

    def _note_ending(self, ending: Ending) -> None:
        self._waiting.extendleft(reversed(ending.again))
        for unread, lost in ending.unread:
            self._end(unread, lost)
        job, error = ending.job, ending.error
        if job is None or error is None:
            return
        # A claim that the job may have committed by itself proves nothing.
        is_settled = not ending.has_own_commit and error.outcome in _SETTLED_BY_LEDGER
        if job.keys is not None and is_settled:
            self._ask_ledger(job, error)
        elif ending.transaction.xid and error.outcome is Outcome.UNKNOWN:
            self._resolve(job, error, ending.transaction)
        else:
            self._end_lost(job, error)

    def _end_lost(self, job: Job, error: DBPoolError) -> None:
        """End a job whose worker has died, or repeat it."""
        if may_repeat(error):
            self._repeat_or_settle(job, error)
        else:
            self._end(job, error)

    def _end(self, job: Job, told: Told) -> None:
        job.attempts += 1
        self._tell(job, told)

    def _tell(self, job: Job, told: Told) -> None:
        self._told_jobs.append(job)
        self._told.append(told)

    def _repeat_or_settle(self, job: Job, told: Told) -> None:
        if job.attempts >= job.options.retries or self._killed_for is not None:
            self._end(job, told)
            return
        job.attempts += 1
        self._retried += 1
        self._repeats.add(job, told)

    def _resolve(self, job: Job, error: DBPoolError, which: Transaction) -> None:
        """Have another worker ask the server what became of a transaction."""

        def settle(asked: Future[Outcome]) -> None:
            outcome = Outcome.UNKNOWN
            if not asked.cancelled() and asked.exception() is None:
                outcome = asked.result()
                self._done -= 1  # the question is no job of the user's
            self._end_lost(job, resolved_error(error, outcome))
            self._wake()  # it has reckoned before how long it may sleep

        asked = Job(*pack_call(outcome_of_transaction, (which,), {}), DEFAULTS)
        asked.add_done_callback(settle)
        self._waiting.appendleft(asked)

    def _ask_ledger(
        self, job: Job, told: Message | DBPoolError, tries: int = _LEDGER_TRIES
    ) -> None:
        """Have a worker find out in the ledger what became of a job with a key."""

        def settle(asked: Future[list[Any] | None]) -> None:
            error = None if asked.cancelled() else asked.exception()
            if isinstance(error, _IN_ITS_COMMIT) and tries > 1:
                # Its own COMMIT was lost. To settle once more is harmless.
                self._ask_ledger(job, told, tries - 1)
                self._wake()
                return
            if asked.cancelled() or error is not None:
                self._end(job, told)
                return
            self._done -= 1  # the question is no job of the user's
            results = asked.result()
            if results is None:
                self._repeat_or_settle(job, verdict.rolled_back(told))
                self._wake()  # for how long this thread sleeps is decided by now
            else:
                is_one = isinstance(job.keys, str)
                self._end(job, Known(results[0] if is_one else results))

        keys = (job.keys,) if isinstance(job.keys, str) else job.keys
        asked = Job(*pack_call(ledger_jobs.settle, (keys,), {}), _ASKS_LEDGER)
        asked.add_done_callback(settle)
        self._waiting.appendleft(asked)

    def _settle(self) -> None:
        if not self._told:
            return
        jobs, self._told_jobs = self._told_jobs, []
        told, self._told = self._told, []
        try:
            results, errors = read(jobs, told)
        except BaseException:
            results, errors = _read_each(jobs, told)
        self._failed += len(errors)
        self._done += len(results) - len(errors)
        # Whoever is woken wants the interpreter: last, when all else is done.
        for job, result in end_unasked(jobs, results):
            job.end(result, errors.get(job))

    def _spare(self, count: int) -> None:
        """Let the first jobs wait on for the workers that start."""
        for job in self._waiting.copy():  # one that came late may be appended
            if len(self._spared) >= count:
                break
            if not job.cancelled():
                self._spared.add(job)

    def _drop_waiting(self) -> None:
        """Cancel what waits, or fail it where it cannot be cancelled any more."""
        failure = self._workers.failure
        if self._killed_for is not None or failure is not None:
            for job, told in self._repeats.give_up():
                self._tell(job, told)
        kept = []
        while self._waiting:
            job = self._waiting.popleft()
            if failure is not None:
                if job.take():
                    self._tell(job, failure.error())
            elif self._killed_for is None and job in self._spared:
                kept.append(job)
            elif job.drop():
                pass
            elif self._killed_for is not None:
                self._tell(job, never_sent_error(self._killed_for))
            else:
                kept.append(job)
        self._waiting.extend(kept)

    def _abandon(self) -> None:
        """Leave no future pending and no worker behind, after a fault of our own."""
        self._closing = True
        self._is_open = False
        self._has_ended = True  # who sees it asks for the reason, and finds it
        self._killed_for = "its own thread failed, see the log"
        for step in (self._withdraw, self._drop_waiting):
            with suppress(BaseException):
                step()
        for worker in list(self._workers.all.values()):
            self._abandon_worker(worker)
        with suppress(BaseException):
            self._drop_waiting()  # what those had not begun
        self._settle()

    def _abandon_worker(self, worker: Worker) -> None:
        worker.killed_for = worker.killed_for or self._killed_for
        try:
            with suppress(Exception):
                worker.body.kill()
            ending = self._workers.bury(worker)
            self._waiting.extendleft(reversed(ending.again))
            for job, error in ending.unread:
                self._end(job, error)
            if ending.job is not None and ending.error is not None:
                self._end(ending.job, ending.error)
        except BaseException as exc:
            self._end_unjudged(worker, exc)

    def _free(self) -> None:
        self._spared.clear()
        self._offers.close()
        self._selector.close()
        self._bell.close()
        self._ear.close()


def _read_each(
    jobs: list[Job], told: list[Told]
) -> tuple[list[object], dict[Job, BaseException]]:
    """Read what jobs end by, where one of the answers cannot be read."""
    results: list[object] = []
    errors: dict[Job, BaseException] = {}
    for job, answer in zip(jobs, told, strict=True):
        try:
            result, error = read([job], [answer])
        except BaseException as exc:
            # Of a failure too: what it says of the transaction is a part of it.
            lost = OutcomeUnknownError(f"reading its answer raised {exc!r}")
            result, error = [None], {job: job.told(lost, lost.outcome)}
            job.close_fast_path()
        results += result
        errors |= error
    return results, errors


def _may_take_long(told: Told) -> bool:
    """Say whether it may take milliseconds to unpickle an answer."""
    return isinstance(told, Message) and len(told.parts[0]) > _LONG_PICKLE
