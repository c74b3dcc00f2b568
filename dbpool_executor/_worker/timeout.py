"""Ends a job that takes longer than it may.

Runs in a worker. First the statement is cancelled on the server, so that nothing goes
on there; a while later, if the job is still at it, it is interrupted like by Ctrl-C.
What both do not end, the parent kills.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger("dbpool_executor")

_SIGNAL = getattr(signal, "SIGURG", None)  # ignored by whoever does not expect it
_STATEMENT_GRACE = 0.2  # seconds for a cancelled statement to come back to the job


class JobInterrupt(BaseException):
    """Ends a job from outside.

    Not an Exception: SQLAlchemy gives up a connection that is interrupted in the
    middle of a statement only for what is not one.
    """


class Alarm:
    """The time limit of the running job.

    Args:
        cancel: Cancels the running statements on the server, and says whether there is
            none that it could not.

    Attributes:
        has_cancelled: What that has said last of the running job.
    """

    def __init__(self, cancel: Callable[[], bool]) -> None:
        self._cancel = cancel
        self.has_cancelled = False
        # Guards the three below. Held while statements are cancelled, so that neither a
        # COMMIT nor the next job's statements can be under way meanwhile.
        self._changed = threading.Condition()
        self._deadline: float | None = None  # on time.monotonic(), while a job has one
        self._is_committing = False
        self._has_expired = False
        self._may_interrupt = False  # read by the signal handler, which takes no lock
        self._thread: threading.Thread | None = None

    @contextmanager
    def set(self, seconds: float) -> Iterator[None]:
        """Limit what is done inside the block.

        Args:
            seconds: From now on.

        Raises:
            JobInterrupt: The time was up before COMMIT began, however the block ended;
                its cause is what the block raised.
        """
        self._start(seconds)
        cause: BaseException | None = None
        try:
            try:
                yield
            finally:
                self._may_interrupt = False
        except BaseException as exc:
            cause = exc
        with self._changed:
            self._may_interrupt = False
            self._deadline = None
        if self._has_expired:
            raise JobInterrupt from cause
        if cause is not None:
            raise cause

    def begin_commit(self) -> None:
        """Let a COMMIT begin, which is not cancelled; raise if the time is up."""
        if self._deadline is None:
            return
        # Before the lock is taken: raised between that and the block, it would never be
        # released.
        self._may_interrupt = False
        with self._changed:
            if self._has_expired:
                raise JobInterrupt
            self._is_committing = True

    def end_commit(self) -> None:
        """Note that a COMMIT of the job's own, if there was one, is over."""
        if self._is_committing:
            with self._changed:
                self._is_committing = False
                self._may_interrupt = True
                self._changed.notify()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keep JobInterrupt out of the block.

        Raises:
            JobInterrupt: At its end, if the time was up. A job that does little else
                would be missed by every signal.
        """
        # In other threads it is not raised, and what they put back would be too old.
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        might, self._may_interrupt = self._may_interrupt, False
        try:
            yield
        finally:
            self._may_interrupt = might
        if might and self._has_expired:
            raise JobInterrupt

    def _start(self, seconds: float) -> None:
        if self._thread is None and _SIGNAL is not None:
            signal.signal(_SIGNAL, self._interrupt)
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        with self._changed:
            self._is_committing = self._has_expired = False
            self._deadline = time.monotonic() + seconds
            self._may_interrupt = True
            self._changed.notify()

    def _interrupt(self, _number: int, _frame: object) -> None:
        if self._may_interrupt and self._has_expired:
            raise JobInterrupt

    def _watch(self) -> None:
        main = threading.main_thread().ident
        with self._changed:
            while True:
                if self._deadline is None or self._is_committing:
                    self._changed.wait()
                elif (left := self._deadline - time.monotonic()) > 0:
                    self._changed.wait(left)
                else:
                    # Again and again, in case it fell between two statements, or where
                    # nothing can be raised.
                    self._end_statement()
                    if self._has_expired and main is not None and _SIGNAL is not None:
                        signal.pthread_kill(main, _SIGNAL)
                    self._has_expired = True
                    self._changed.wait(_STATEMENT_GRACE)

    def _end_statement(self) -> None:
        self.has_cancelled = False
        try:
            self.has_cancelled = self._cancel()
        except Exception:
            log.warning("a statement was not cancelled", exc_info=True)
