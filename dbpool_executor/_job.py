"""A job on its way, and how its future is settled.

Runs in the parent.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, InvalidStateError
from concurrent.futures._base import FINISHED, PENDING, RUNNING
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar, cast

from ._boundary import Buffer, loads_result
from ._channel import Kind, Message
from ._exceptions import loads_exception, set_cause
from ._options import DEFAULTS, JobOptions
from .errors import JobTimeoutError, Outcome, OutcomeUnknownError, ResultLostError

log = logging.getLogger("dbpool_executor")

T = TypeVar("T")


class _Condition(threading.Condition):
    """A condition of a lock that somebody else has too.

    It keeps no methods of its lock and no deque: of what is waited for by ``wait()`` or
    ``as_completed()`` there may be thousands, and the collector of garbage would look at
    them all.
    """

    __slots__ = ("_lock", "_waiters")

    def __init__(self, lock: Any) -> None:
        self._lock = lock
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


_ReadAnswer: TypeAlias = "Callable[[JobFuture[Any], float | None], float | None]"


class JobFuture(Future[T]):
    """A future that raises its exception also when the exception is falsy.

    ``Future.result()`` asks for its truth up to CPython 3.13.0 and returns None.

    What happens to nearly each job takes a short way here, with the same lock; a group
    of short jobs goes through all of it at once. What is not usual takes the way of
    :class:`Future`, which enters its condition before all else. It is made only then, and
    the lists with it: else the collector of garbage would look at those of all jobs under
    way, for a tenth of the time that a short job takes here.

    Attributes:
        read_answer: Waits for the answer in the place of the dispatcher, if it may, and
            gives the seconds that are left; takes the future and the seconds.
    """

    # What is added late to a dictionary takes more memory, and more time.
    __slots__ = (
        "_done_callbacks",
        "_exception",
        "_lock",
        "_made_condition",
        "_result",
        "_state",
        "_waiters",
        "read_answer",
    )

    def __init__(self) -> None:
        # Not Future's own. A test compares what the two have.
        # The condition is entered by a Python function, in which Ctrl-C can strike
        # between the lock and the block that lets go of it; the lock is not.
        self._lock: Any = threading.RLock()
        self._made_condition: _Condition | None = None
        self._state = PENDING
        self._result = self._exception = None
        self.read_answer: _ReadAnswer | None = None

    @property
    def _condition(self) -> _Condition:  # type: ignore[override]
        if self._made_condition is None:
            with self._lock:
                if self._made_condition is None:  # no other thread was faster
                    self._waiters: list[Any] = []
                    self._done_callbacks: list[Callable[[Future[T]], object]] = []
                    # Last: Ctrl-C before it leaves nothing that anybody has seen.
                    self._made_condition = _Condition(self._lock)
        return self._made_condition

    def result(self, timeout: float | None = None) -> T:
        """Wait for the job and return its result.

        Args:
            timeout: Seconds to wait at most; None for no bound.

        Raises:
            TimeoutError: The job is not done by then.
            CancelledError: The future was cancelled.
            Exception: Whatever the job raised, or a DBPoolError.
        """
        if self._state != FINISHED and self.read_answer is not None:
            timeout = self.read_answer(self, timeout)
        if self._state != FINISHED:
            result = super().result(timeout)
            if result is not None:
                return result
        error = self.exception() if self._exception is not None else None
        if error is None:
            return cast("T", self._result)
        try:
            raise error
        finally:
            del error  # else the traceback and this frame hold each other

    def set_running_or_notify_cancel(self) -> bool:
        """Say whether the job is still to be run; from now on it cannot be cancelled."""
        with self._lock:
            if self._state == PENDING:
                self._state = RUNNING
                return True
        return super().set_running_or_notify_cancel()

    def is_watched(self) -> bool:
        """Say whether anybody would hear of it now if it were done."""
        condition = self._made_condition
        return condition is not None and bool(
            condition._waiters or self._waiters or self._done_callbacks
        )

    def set_unwatched_result(self, result: T) -> bool:
        """Give it its result if nobody is to be told.

        Returns:
            Whether it has it now.
        """
        with self._lock:
            if self._state != RUNNING or self.is_watched():
                return False
            self._result = result
            self._state = FINISHED
            return True

    def set_result(self, result: T) -> None:
        """Give it its result, and tell all who wait for it."""
        if not self.set_unwatched_result(result):
            super().set_result(result)


@dataclass(slots=True, eq=False)
class Job:
    """A call on its way.

    Attributes:
        future: What the caller holds.
        parts: The call and the options, as they are sent.
        options: How it is run.
        is_taken: Whether it cannot be cancelled any more.
        number: Which job it is in the life of the worker that has it.
        deliveries: Workers that died over it before they had begun it.
        attempts: How often it was answered.
        told: What it failed with last.
    """

    future: JobFuture[Any]
    parts: Sequence[Buffer]
    options: JobOptions = DEFAULTS
    is_taken: bool = False
    number: int = 0
    deliveries: int = 0
    attempts: int = 0
    told: Message | BaseException | None = None

    def take(self) -> bool:
        """Say whether it is still to be done; from now on it cannot be cancelled."""
        # Already: it was sent to a worker that did not begin it.
        if not self.is_taken:
            self.is_taken = self.future.set_running_or_notify_cancel()
        return self.is_taken

    def cancel(self) -> bool:
        """Cancel it unless it was taken."""
        if not self.future.cancel():
            return False
        # as_completed() and wait() hear of it only now.
        self.future.set_running_or_notify_cancel()
        return True

    def settle(self, told: Message | BaseException) -> bool:
        """Give the future its result or exception, and run its callbacks.

        Args:
            told: The worker's answer, or an error of the parent's own.

        Returns:
            Whether it was a result.
        """
        result = None
        error: BaseException | None = None
        if isinstance(told, BaseException):
            error = told
        elif told.kind is Kind.FAILURE:
            error = loads_exception(told.parts)
        else:
            try:
                result = loads_result(told.parts)
            except BaseException as exc:  # also a SystemExit must not end the thread
                commits = self.options.commit
                outcome = Outcome.COMMITTED if commits else Outcome.UNKNOWN
                error = ResultLostError(f"unpickling it raised {exc!r}", outcome)
                set_cause(error, exc)
        try:
            if error is None:
                self.future.set_result(result)
            else:
                self._note(error)
                self.future.set_exception(error)
        except InvalidStateError:
            pass  # whoever waits for it has read the answer
        except BaseException:
            log.exception("a future or one of its callbacks refused its answer")
        return error is None

    def _note(self, error: BaseException) -> None:
        if isinstance(error, (JobTimeoutError, OutcomeUnknownError)):
            log.warning("%s", error)
        if self.options.retries and self.attempts:
            with suppress(AttributeError):  # a class with slots alone
                BaseException.__setattr__(error, "attempts", self.attempts)
