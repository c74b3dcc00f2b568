"""An event that no exception of a signal's handler can leave locked.

Runs in the parent, in callers' threads and in the dispatcher's.
"""

from __future__ import annotations

import math
import threading
import time
from _thread import LockType, allocate_lock, get_ident

_NOTICE_SECONDS = 0.2  # after which the main thread notices a signal at the latest


class Flag:
    """Is set once or again, and wakes those who wait for it.

    ``threading.Event`` enters a condition, and that is a Python function: an exception
    that a signal's handler raises inside, after the lock was taken, leaves it locked for
    ever, and whoever sets the event hangs. Here nothing is locked. The order is enough:
    a waiter enters its own lock in the list and then looks at the flag; who sets it does
    that first, and then looks at the list.
    """

    __slots__ = ("_is_set", "_sleepers")

    def __init__(self) -> None:
        self._is_set = False
        self._sleepers: list[LockType] = []

    def is_set(self) -> bool:
        """Say whether it is set."""
        return self._is_set

    def set(self) -> None:
        """Set it and wake all who wait; again, if that was interrupted."""
        self._is_set = True
        for sleeper in self._sleepers[:]:
            try:  # noqa: SIM105 - a call between the two could be interrupted
                sleeper.release()
            except RuntimeError:
                pass  # it was woken before

    def clear(self) -> None:
        """Have those who wait from now on wait until it is set again."""
        self._is_set = False

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is set.

        Args:
            timeout: Seconds to wait at most; None for no bound.

        Returns:
            Whether it is set.
        """
        if self._is_set:
            return True
        sleeper = allocate_lock()
        sleeper.acquire()
        self._sleepers.append(sleeper)
        try:
            if not self._is_set:
                _sleep(sleeper, timeout)
        finally:
            self._sleepers.remove(sleeper)
        return self._is_set


def seconds_to_sleep(end: float) -> float | None:
    """Say for how long a thread may sleep that a signal's handler may have to wake.

    A signal that comes when the main thread has let go of the interpreter, and does not
    sleep yet, is noticed only when it wakes.

    Args:
        end: On ``time.monotonic()``, when it is to wake; infinite for no bound.

    Returns:
        The seconds; None for no bound.
    """
    most = math.inf
    if get_ident() == threading.main_thread().ident:
        most = _NOTICE_SECONDS
    left = min(max(end - time.monotonic(), 0.0), most)
    return None if left == math.inf else left


def _sleep(sleeper: LockType, timeout: float | None) -> None:
    end = math.inf if timeout is None else time.monotonic() + timeout
    while True:
        seconds = seconds_to_sleep(end)
        if sleeper.acquire(True, -1.0 if seconds is None else seconds):
            return
        if time.monotonic() >= end:
            return
