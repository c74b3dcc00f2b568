"""A job on its way, which is the future of its caller as well.

Runs in the parent.
"""

from __future__ import annotations

import logging
import pickle
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, InvalidStateError
from concurrent.futures._base import (
    CANCELLED,
    CANCELLED_AND_NOTIFIED,
    FINISHED,
    PENDING,
    RUNNING,
)
from contextlib import suppress
from typing import Any, TypeAlias

from .._forks.job_lock import job_lock
from .._wire.calls import Call, Name, loads_result
from .._wire.channel import Kind, Message
from .._wire.exceptions import loads_exception, set_cause
from .._wire.options import DEFAULTS, JobOptions
from ..errors import JobTimeoutError, Outcome, OutcomeUnknownError, ResultLostError

log = logging.getLogger("dbpool_executor")


# Who has it enters no condition, since who is in one may want it to make another. So
# nothing is called inside where a handler of a signal could run. And Ctrl-C cannot come
# between it and the block that lets go of it, as with a condition, whose entry is a Python
# function.
_lock = job_lock


class _Condition(threading.Condition):
    """A condition of few objects.

    It keeps no methods of its lock and no deque: of what is waited for by ``wait()`` or
    ``as_completed()`` there may be thousands, and the collector of garbage would look at
    them all.
    """

    __slots__ = ("_lock", "_waiters")

    def __init__(self) -> None:
        self._lock: Any = threading.RLock()
        self._waiters: Collection[Any] = ()

    def wait(self, timeout: float | None = None) -> bool:
        self._waiters = self._waiters or []
        return super().wait(timeout)

    def acquire(self, *args: Any, **kwargs: Any) -> bool:
        return bool(self._lock.acquire(*args, **kwargs))

    def release(self) -> None:
        self._lock.release()

    def _is_owned(self) -> bool:
        return bool(self._lock._is_owned())

    def _release_save(self) -> object:
        return self._lock._release_save()

    def _acquire_restore(self, state: object) -> None:
        self._lock._acquire_restore(state)


Told = Message | bytes | int | BaseException
"""What a job ends by: an answer, the pickle of a short one or the number that it brings,
or an error of the parent's."""

_End: TypeAlias = "tuple[Job, object]"
_ReadAnswer: TypeAlias = "Callable[[Job, float | None], float | None]"


class Job(Future[Any]):
    """A call on its way, and the future of what comes of it.

    One object for both, of which there may be a hundred thousand, for the collector of
    garbage to look at again and again. It raises its exception also when that is falsy:
    ``Future.result()`` asks for its truth up to CPython 3.13.0 and returns None.

    What happens to nearly each job takes a short way here, under a lock that all jobs
    share, so that a group of short ones goes through all of it at once. What is not usual
    takes the way of :class:`Future`, which enters its condition before all else. That is
    made when somebody asks for it, and closes the short way. It has a lock of its own:
    ``as_completed()`` enters those of several futures in the order of their addresses.

    Args:
        name: Of the function of a short call; None if the call is a pickle.
        call: What is to be called, until the job is done.
        options: How it is run.

    Attributes:
        number: Which job it is in the life of the worker that has it.
        deliveries: Workers that died over it before they had begun it.
        attempts: How often it has failed.
        read_answer: Waits for the answer in the place of the dispatcher, if it may, and
            gives the seconds that are left; takes the job and the seconds.
    """

    # What is added late to a dictionary takes more memory, and more time.
    __slots__ = (
        "_done_callbacks",
        "_exception",
        "_made_condition",
        "_result",
        "_state",
        "_waiters",
        "call",
        "name",
        "number",
        "options",
    )

    # Nearly no job has its own.
    read_answer: _ReadAnswer | None = None
    deliveries = 0
    attempts = 0

    def __init__(self, name: Name | None, call: Call, options: JobOptions) -> None:
        # Not Future's own. A test compares what the two have.
        self._made_condition: _Condition | None = None
        self._state = PENDING
        self._result = None
        self._exception = None
        self.name = name
        self.call = call
        self.options = options
        self.number = 0

    @property
    def _condition(self) -> _Condition:  # type: ignore[override]
        if self._made_condition is None:
            condition = _Condition()
            waiters: list[Any] = []
            callbacks: list[Callable[[Future[Any]], object]] = []
            with _lock:
                if self._made_condition is None:  # no other thread was faster
                    self._waiters = waiters
                    self._done_callbacks = callbacks
                    self._made_condition = condition
        return self._made_condition

    # -- For whoever holds the future ---------------------------------------------

    def done(self) -> bool:
        """Say whether it was cancelled, or has a result or an exception."""
        return self._state == FINISHED or super().done()

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the job and return its result.

        Args:
            timeout: Seconds to wait at most; None for no bound.

        Raises:
            TimeoutError: The job is not done by then.
            CancelledError: The future was cancelled.
            Exception: Whatever the job raised, or a DBPoolError.
        """
        if self._state == FINISHED and self._exception is None:
            return self._result
        if self._state != FINISHED and self.read_answer is not None:
            timeout = self.read_answer(self, timeout)
        if self._state != FINISHED:
            result = super().result(timeout)
            if result is not None:
                return result
        error = self.exception() if self._exception is not None else None
        if error is None:
            return self._result
        try:
            raise error
        finally:
            del error  # else the traceback and this frame hold each other

    # -- For the executor -----------------------------------------------------------

    def take(self) -> bool:
        """Say whether it is still to be done; from now on it cannot be cancelled."""
        with _lock:
            if self._state == PENDING and self._made_condition is None:
                self._state = RUNNING
        # Already: it was sent to a worker that did not begin it.
        return self._state == RUNNING or self._take_asked()

    def drop(self) -> bool:
        """Cancel it unless it was taken."""
        if not self.cancel():
            return False
        self._take_asked()
        return True

    def refuse(self) -> bool:
        """Cancel it, if it is still to be taken and nobody else has it."""
        with _lock:
            if self._state != PENDING or self._made_condition is not None:
                return False
            self._state = CANCELLED
        return True

    def _take_asked(self) -> bool:
        # Where as_completed() and wait() hear of a job that was cancelled, once.
        if (
            self._state != CANCELLED_AND_NOTIFIED
            and self.set_running_or_notify_cancel()
        ):
            return True
        self.call = _NO_CALL
        return False

    def is_asked_for(self) -> bool:
        """Say whether somebody may have to be told when it is done."""
        return self._made_condition is not None

    def close_short_way(self) -> None:
        """Have it end as if somebody had asked for it."""
        self._condition  # noqa: B018 - it is made

    def lost(self, exc: BaseException) -> ResultLostError:
        """Give what it raises if its result does not unpickle."""
        commits = self.options.commit
        outcome = Outcome.COMMITTED if commits else Outcome.UNKNOWN
        error = ResultLostError(f"unpickling it raised {exc!r}", outcome)
        set_cause(error, exc)
        self.attempts += 1
        return error

    def end_unasked(self, result: object) -> bool:
        """Give it its result, if nobody is to be told.

        Returns:
            Whether it has it now.
        """
        with _lock:
            if self._state != RUNNING or self._made_condition is not None:
                return False
            self._result = result
            self._state = FINISHED
        self.call = _NO_CALL
        return True

    def end(self, result: object, error: BaseException | None) -> None:
        """Give it its result or its exception, and tell all who wait for it."""
        try:
            if error is None:
                self.set_result(result)
            else:
                self._note(error)
                self.set_exception(error)
        except InvalidStateError:
            pass  # whoever waits for it has read the answer
        except BaseException:
            log.exception("a future or one of its callbacks refused its answer")
        self.call = _NO_CALL

    def _note(self, error: BaseException) -> None:
        if isinstance(error, (JobTimeoutError, OutcomeUnknownError)):
            log.warning("%s", error)
        if self.options.retries and self.attempts:
            with suppress(AttributeError):  # a class with slots alone
                BaseException.__setattr__(error, "attempts", self.attempts)


_NO_CALL = b""  # of a job that is done: its arguments may be large


def failed_job(error: Exception) -> Job:
    """Give the job of a call that cannot be sent."""
    job = Job(None, _NO_CALL, DEFAULTS)
    job.set_exception(error)
    return job


# -- Groups ----------------------------------------------------------------------------
# In the dispatcher's thread, where no signal's handler runs. The steps of one job's are
# repeated here: to call them would take ten times as long.


def taken(jobs: list[Job]) -> list[Job]:
    """Take jobs, and give those that are still to be done."""
    others = False
    with _lock:
        for job in jobs:
            if job._state == PENDING and job._made_condition is None:
                job._state = RUNNING
            else:
                others = True
    if not others:
        return jobs
    return [job for job in jobs if job._state == RUNNING or job.take()]


def read(
    jobs: Sequence[Job], told: Sequence[Told]
) -> tuple[list[Any], dict[Job, BaseException]]:
    """Read what jobs end by.

    Returns:
        Their results, and the exceptions of those that have none, for which None stands
        among the results. To those the short way is closed.
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
            if isinstance(answer, Message) and answer.kind is Kind.RESULT:
                results.append(loads_result(answer.parts))
                continue
            error = answer
        except BaseException as exc:  # also a SystemExit must not end the thread
            error = job.lost(exc)
        if isinstance(error, Message):
            error = loads_exception(error.parts)
        results.append(None)
        errors[job] = error
        job.close_short_way()
    return results, errors


def end_unasked(jobs: Sequence[Job], results: Sequence[object]) -> list[_End]:
    """Give jobs their results, where nobody is to be told.

    Args:
        jobs: They; to those that have no result the short way is closed.
        results: In the same order.

    Returns:
        What is left, in order.
    """
    left = []
    with _lock:
        for job, result in zip(jobs, results, strict=True):
            if job._state == RUNNING and job._made_condition is None:
                job._result = result
                job._state = FINISHED
                job.call = _NO_CALL
            else:
                left.append((job, result))
    return left
