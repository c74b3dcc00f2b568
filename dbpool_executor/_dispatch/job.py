"""A job on its way, which is the future of its caller as well.

Runs in the parent.
"""

from __future__ import annotations

import pickle
import traceback
from _thread import get_ident
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, InvalidStateError
from concurrent.futures._base import (
    CANCELLED,
    CANCELLED_AND_NOTIFIED,
    FINISHED,
    LOGGER,
    PENDING,
    RUNNING,
)
from contextlib import suppress
from typing import Any, NamedTuple, Protocol, TypeAlias

from .._forks.hooks import job_lock
from .._wire.calls import Call, Label, Name, loads_result
from .._wire.channel import Kind, Message
from .._wire.exceptions import loads_failure, note_outcome, set_cause
from .._wire.options import DEFAULTS, JobOptions
from ..errors import (
    DBPoolError,
    JobTimeoutError,
    Outcome,
    OutcomeUnknownError,
    ResultLostError,
    WorkerTraceback,
)
from .asked import Asked, Condition, Waiters
from .future import JobFuture
from .guarded_log import GuardedLog, log
from .verdict import lost_result_error

# Nothing is called inside where a handler of a signal could run: it might wait for a job.
# And no exception of one can come between it and the block that lets go of it, as with a
# condition, whose entry is a Python function.
_lock = job_lock


class Known(NamedTuple):
    """A result that needs no unpickling."""

    value: object


Told = Message | bytes | int | BaseException | Known
"""What a job ends by: an answer, the pickle of a short one or the number that it brings,
or an error of the parent's."""

_End: TypeAlias = "tuple[Job, object]"
_UNDER_WAY = (PENDING, RUNNING)
_CANCELLED = (CANCELLED, CANCELLED_AND_NOTIFIED)


class FastLane(Protocol):
    """Where callers send jobs and read their answers by themselves."""

    def read_answer(self, job: Job, timeout: float | None) -> float | None:
        """Wait for an answer in the place of the dispatcher, if that may be.

        Args:
            job: Of it.
            timeout: Seconds to wait at most; None for no bound.

        Returns:
            The seconds that are left.
        """

    def call_dispatcher(self) -> None:
        """Have the dispatcher see to a job that somebody has just asked for."""


class Job(JobFuture[Any]):
    """A call on its way, and the future of what comes of it.

    One object for both, of which there may be a hundred thousand, for the collector of
    garbage to look at again and again. It raises its exception also when that is falsy:
    ``Future.result()`` asks for its truth up to CPython 3.13.0 and returns None.

    What happens to nearly each job takes a fast path, under a lock that all jobs share,
    so that a group of short ones goes through all of it at once. The first who waits for
    a job, or wants to be told, closes it.

    Of :class:`Future` nothing is left that enters a condition. An exception that a
    signal's handler raises strikes anywhere in the main thread, and what it leaves undone
    the dispatcher does, which no signal reaches.

    Args:
        name: Of the function of a short call; its label if the call is a pickle.
        call: What is to be called, until the job is done.
        options: How it is run.

    Attributes:
        status: One of the states of a future.
        number: Which job it is in the life of the worker that has it.
        keys: Its key in the ledger, or those of a chunk's calls; None if it has none.
        deliveries: Workers that died over it before they had begun it.
        attempts: How often it has failed.
        worker: Process id of the worker in which it has failed; None if in none.
        fast_lane: Where callers read its answer, if it was sent there.
    """

    # What is added late to a dictionary takes more memory, and more time.
    __slots__ = (
        "_asked",
        "_exception",
        "_result",
        "call",
        "name",
        "number",
        "options",
        "status",
    )

    # Nearly no job has its own.
    fast_lane: FastLane | None = None
    keys: str | tuple[str, ...] | None = None
    deliveries = 0
    attempts = 0
    worker: int | None = None
    # As it was told, before the job is done; None for a result that was committed.
    _told_outcome: Outcome | None = None

    def __init__(
        self, name: Name | Label | None, call: Call, options: JobOptions
    ) -> None:
        # Not Future's own. A test compares what the two have.
        self._asked: Asked | None = None
        self.status = PENDING
        self._result = None
        self._exception = None
        self.name = name
        self.call = call
        self.options = options
        self.number = 0

    # -- For the standard library -----------------------------------------------------

    @property
    def _state(self) -> str:  # type: ignore[override]
        asked = self._asked
        if asked is None or not asked.views:
            return self.status
        return asked.views.get(get_ident(), self.status)

    @property
    def _condition(self) -> Condition:  # type: ignore[override]
        return Condition(self)

    @property
    def _waiters(self) -> Waiters:  # type: ignore[override]
        return Waiters(self)

    @property
    def _done_callbacks(self) -> list[Callable[[Future[Any]], object]]:
        return [*self.ask().callbacks]

    # -- For whoever holds the future ---------------------------------------------

    def done(self) -> bool:
        """Say whether it was cancelled, or has a result or an exception."""
        return self.status not in _UNDER_WAY

    def running(self) -> bool:
        """Say whether it was sent to a worker, and is not done."""
        return self.status == RUNNING

    def cancelled(self) -> bool:
        """Say whether it was cancelled."""
        return self.status in _CANCELLED

    def cancel(self) -> bool:
        """Cancel it, unless it was sent to a worker.

        Returns:
            Whether it is cancelled.
        """
        with _lock:
            if self.status == PENDING:
                self.status = CANCELLED
        if not self.cancelled():
            return False
        # Also if it was before: that may have been interrupted here.
        self._call_back()
        return True

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the job and return its result.

        Args:
            timeout: Seconds to wait at most; None for no bound.

        Raises:
            TimeoutError: The job is not done by then.
            CancelledError: The future was cancelled.
            Exception: Whatever the job raised, or a DBPoolError.
        """
        if self.status != FINISHED:
            if self.fast_lane is not None:
                timeout = self.fast_lane.read_answer(self, timeout)
            if self.status != FINISHED:
                self._wait(timeout)
        if self._exception is None:
            return self._result
        try:
            raise self._exception
        finally:
            del self  # else the traceback, this frame and the exception hold each other

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the job and return what it raised.

        Args:
            timeout: Seconds to wait at most; None for no bound.

        Returns:
            The exception; None if there is a result.

        Raises:
            TimeoutError: The job is not done by then.
            CancelledError: The future was cancelled.
        """
        if self.status != FINISHED:
            self._wait(timeout)
        return self._exception

    def add_done_callback(self, fn: Callable[[Future[Any]], object]) -> None:
        """Have something called when it is done or cancelled; at once if it is.

        Args:
            fn: Takes the future. What it raises is logged.
        """
        asked = self.ask()
        with _lock:
            is_early = self.status in _UNDER_WAY
            if is_early:
                asked.callbacks += (fn,)
        if is_early:
            self.call_dispatcher()
        else:
            self._call(fn)

    def _wait(self, timeout: float | None) -> None:
        asked = self.ask()
        self.call_dispatcher()
        while self.status in _UNDER_WAY:
            if not asked.wait(timeout):
                raise TimeoutError
        if self.status != FINISHED:
            error = CancelledError()
            note_outcome(
                error, Outcome.NEVER_STARTED, self._note(Outcome.NEVER_STARTED)
            )
            try:
                raise error
            finally:
                del error  # else its traceback and this frame hold each other

    # -- For those who wait -----------------------------------------------------------

    def ask(self) -> Asked:
        """Give those who wait for it; from now on it takes the slow path."""
        if self._asked is None:
            asked = Asked()
            with _lock:
                if self._asked is None:  # no other thread was faster
                    self._asked = asked
        return self._asked

    def is_asked_for(self) -> bool:
        """Say whether somebody may have to be told when it is done."""
        return self._asked is not None

    def call_dispatcher(self) -> None:
        """Have no caller read its answer, since another waits for it now."""
        if self.fast_lane is not None:
            self.fast_lane.call_dispatcher()

    def tell(self, waiter: Any) -> None:
        """Tell a waiter of ``wait()`` or ``as_completed()`` that it is done."""
        if self.status != FINISHED:
            waiter.add_cancelled(self)
        elif self._exception is None:
            waiter.add_result(self)
        else:
            waiter.add_exception(self)

    def _call_back(self) -> None:
        """Wake those who sleep and call the callbacks, each once."""
        asked = self._asked
        if asked is None:
            return
        asked.set()
        while True:
            with _lock:
                callbacks = asked.callbacks
                asked.callbacks = callbacks[1:]
            if not callbacks:
                return
            self._call(callbacks[0])

    def _call(self, fn: Callable[[Future[Any]], object]) -> None:
        try:
            fn(self)
        except Exception:
            GuardedLog(LOGGER).exception("exception calling callback for %r", self)

    @property
    def outcome(self) -> Outcome | None:
        """What is known of its transaction; None until it is done."""
        if not self.done():
            return None
        if self.cancelled():
            return Outcome.NEVER_STARTED
        if self._told_outcome is not None:
            return self._told_outcome
        # Somebody else has ended it, by set_exception().
        return Outcome.COMMITTED if self._exception is None else Outcome.UNKNOWN

    @property
    def label(self) -> str:
        """The name of its function, as people read it."""
        return ".".join(self.name) if isinstance(self.name, tuple) else str(self.name)

    @property
    def label_of_attempt(self) -> str:
        """Its label, and which attempt it is at, if it has failed before."""
        attempt = f" (attempt {self.attempts + 1})" if self.attempts else ""
        return self.label + attempt

    def __repr__(self) -> str:
        told = "" if self.outcome is None else f" outcome={self.outcome.value!r}"
        state = self.status.lower()
        if self.cancelled():
            state = "cancelled"
        elif self.done():
            what = self._result if self._exception is None else self._exception
            verb = "returned" if self._exception is None else "raised"
            state += f" {verb} {type(what).__name__}"
        return (
            f"<{JobFuture.__name__} {self.label} at {id(self):#x} state={state}{told}>"
        )

    # -- For the executor -----------------------------------------------------------

    def take(self) -> bool:
        """Say whether it is still to be done; from now on it cannot be cancelled."""
        with _lock:
            if self.status == PENDING:
                self.status = RUNNING
        # Already: it was sent to a worker that did not begin it.
        return self.status == RUNNING or self._note_cancelled()

    def drop(self) -> bool:
        """Cancel it unless it was taken."""
        if not self.cancel():
            return False
        self._note_cancelled()
        return True

    def refuse(self) -> bool:
        """Cancel it, if it is still to be taken and nobody else has it."""
        with _lock:
            if self.status != PENDING or self._asked is not None:
                return False
            self.status = CANCELLED
        return True

    def _note_cancelled(self) -> bool:
        # Where as_completed() and wait() hear of a job that was cancelled, once. And what
        # cancel() was to do, if that was interrupted.
        waiters: list[Any] = []
        with _lock:
            if self.status == CANCELLED:
                self.status = CANCELLED_AND_NOTIFIED
                if self._asked is not None:
                    waiters, self._asked.waiters = self._asked.waiters, []
        for waiter in waiters:
            self.tell(waiter)
        self._call_back()
        self.call = _NO_CALL
        return False

    def set_running_or_notify_cancel(self) -> bool:
        """Do as :meth:`take` does; for a future that nobody has taken."""
        if self.status not in (PENDING, CANCELLED):
            raise RuntimeError("Future in unexpected state")
        return self.take()

    def close_fast_path(self) -> None:
        """Have it end as if somebody had asked for it."""
        self.ask()

    def lost(self, exc: BaseException) -> ResultLostError:
        """Give what it raises if its result does not unpickle."""
        self.attempts += 1
        return lost_result_error(exc, self._told_outcome, self.options)

    def end_unasked(self, result: object) -> bool:
        """Give it its result, if nobody is to be told.

        Returns:
            Whether it has it now.
        """
        with _lock:
            if self.status != RUNNING or self._asked is not None:
                return False
            self._result = result
            self.status = FINISHED
        self.call = _NO_CALL
        return True

    def set_result(self, result: Any) -> None:
        """Give it its result, and tell all who wait for it."""
        self._finish(result, None)

    def set_exception(self, exception: BaseException | None) -> None:
        """Give it its exception, and tell all who wait for it."""
        self._finish(None, exception)

    def _finish(self, result: Any, error: BaseException | None) -> None:
        waiters: list[Any] = []
        with _lock:
            is_open = self.status in _UNDER_WAY
            if is_open:
                self._result = result
                self._exception = error
                self.status = FINISHED
                if self._asked is not None:
                    waiters, self._asked.waiters = self._asked.waiters, []
        if not is_open:
            raise InvalidStateError(f"{self.status}: {self!r}")
        for waiter in waiters:
            self.tell(waiter)
        self._call_back()

    def end(self, result: object, error: BaseException | None) -> None:
        """Give it its result or its exception, and tell all who wait for it."""
        try:
            if error is None:
                self.set_result(result)
            else:
                self._tell_of(error)
                self.set_exception(error)
        except InvalidStateError:
            pass  # whoever waits for it has read the answer
        except BaseException:
            log.exception("a future or one of its callbacks refused its answer")
        self.call = _NO_CALL

    def told(self, error: BaseException, outcome: Outcome | None) -> BaseException:
        """Note what it will raise, and what happened to its transaction.

        Returns:
            What it is to raise.
        """
        self._told_outcome = outcome or Outcome.ROLLED_BACK
        if not isinstance(error, StopIteration):
            return error
        # It would end whatever iterates over results, and cannot be set on a future of
        # asyncio's: as in a generator (PEP 479).
        other = RuntimeError("the job raised StopIteration")
        set_cause(other, error)
        return other

    def _tell_of(self, error: BaseException) -> None:
        outcome = self._told_outcome or Outcome.ROLLED_BACK
        if isinstance(error, (JobTimeoutError, OutcomeUnknownError)):
            where = "" if self.worker is None else f" in worker {self.worker}"
            log.warning("job %s%s: %s", self.label, where, error)
        if isinstance(error, DBPoolError) and error.key is None:
            error.key = self.keys
        try:
            if self.options.retries and self.attempts:
                with suppress(AttributeError):  # a class with slots alone
                    BaseException.__setattr__(error, "attempts", self.attempts)
            note_outcome(error, outcome, self._note(outcome))
        except (
            Exception
        ):  # of the exception's own class; the job has to end all the same
            log.debug("an exception of job %s took no note", self.label, exc_info=True)

    def _note(self, outcome: Outcome) -> str:
        attempt = f" (attempt {self.attempts})" if self.attempts > 1 else ""
        return f"job {self.label}: {outcome.value}{attempt}"


_NO_CALL = b""  # of a job that is done: its arguments may be large


def failed_job(label: Label, error: Exception) -> Job:
    """Give the job of a call that cannot be sent.

    Args:
        label: Names it.
        error: Loses its traceback, whose frames hold all that the callers have at hand
            for as long as the future is kept; it stays as text, as of what a worker
            raises.
    """
    if not isinstance(error, DBPoolError):
        set_cause(error, WorkerTraceback("".join(traceback.format_exception(error))))
    BaseException.__setattr__(error, "__context__", None)
    BaseException.__setattr__(error, "__traceback__", None)
    job = Job(label, _NO_CALL, DEFAULTS)
    job.end(None, job.told(error, Outcome.NEVER_STARTED))
    return job


# -- Groups ----------------------------------------------------------------------------
# In the dispatcher's thread, where no signal's handler runs. The steps of one job's are
# repeated here: to call them would take ten times as long.


def taken(jobs: list[Job]) -> list[Job]:
    """Take jobs, and give those that are still to be done."""
    others = False
    with _lock:
        for job in jobs:
            if job.status == PENDING and job._asked is None:
                job.status = RUNNING
            else:
                others = True
    if not others:
        return jobs
    return [job for job in jobs if job.status == RUNNING or job.take()]


def read(
    jobs: Sequence[Job], told: Sequence[Told]
) -> tuple[list[Any], dict[Job, BaseException]]:
    """Read what jobs end by.

    Returns:
        Their results, and the exceptions of those that have none, for which None stands
        among the results. To those the fast path is closed.
    """
    results: list[Any] = []
    errors: dict[Job, BaseException] = {}
    loads = pickle.loads
    for job, answer in zip(jobs, told, strict=True):
        error: Message | BaseException
        try:
            if isinstance(answer, int):
                results.append(answer)
                continue
            if isinstance(answer, bytes):
                results.append(loads(answer))
                continue
            if isinstance(answer, Message) and answer.kind is not Kind.FAILURE:
                if answer.kind is Kind.RESULT_UNKNOWN:
                    job._told_outcome = Outcome.UNKNOWN
                results.append(loads_result(answer.parts))
                continue
            if isinstance(answer, Known):
                results.append(answer.value)
                continue
            error = answer
        except BaseException as exc:  # also a SystemExit must not end the thread
            error = job.lost(exc)
        outcome: Outcome | None = None
        if isinstance(error, Message):
            error, outcome = loads_failure(error.parts)
        elif isinstance(error, DBPoolError):
            outcome = error.outcome
        results.append(None)
        errors[job] = job.told(error, outcome)
        job.close_fast_path()
    return results, errors


def end_unasked(jobs: Sequence[Job], results: Sequence[object]) -> list[_End]:
    """Give jobs their results, where nobody is to be told.

    Args:
        jobs: They; to those that have no result the fast path is closed.
        results: In the same order.

    Returns:
        What is left, in order.
    """
    left = []
    with _lock:
        for job, result in zip(jobs, results, strict=True):
            if job.status == RUNNING and job._asked is None:
                job._result = result
                job.status = FINISHED
                job.call = _NO_CALL
            else:
                left.append((job, result))
    return left
