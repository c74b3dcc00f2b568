"""What is kept for those who wait for a future, and how the standard library reaches it.

Runs in the parent. ``concurrent.futures.wait()`` and ``as_completed()`` take the locks of
all futures one by one, in Python: an exception that a signal's handler raises in between
would leave some of them locked, for ever. So here they lock nothing. What they take a
lock for, that no future changes between their look at it and their entry among those who
wait, each thread has by a view: from ``acquire()`` to ``release()`` it sees the state
that was there, and what has changed meanwhile it hears at its entry.
"""

from __future__ import annotations

import threading
from _thread import get_ident
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures._base import CANCELLED_AND_NOTIFIED, FINISHED
from contextlib import suppress
from typing import Any, Protocol

from .._forks.hooks import job_lock
from .flag import Flag

_lock = job_lock
_TOLD = (CANCELLED_AND_NOTIFIED, FINISHED)  # those who wait were told


class Asked(Flag):
    """Those who wait for one future. Set when it is done, or cancelled.

    Attributes:
        callbacks: Not called yet.
        waiters: Of ``wait()`` and ``as_completed()``, not told yet.
        views: By the thread that has one, the state that it sees.
    """

    __slots__ = ("callbacks", "views", "waiters")

    def __init__(self) -> None:
        super().__init__()
        self.callbacks: tuple[Callable[[Future[Any]], object], ...] = ()
        self.waiters: list[Any] = []
        self.views: dict[int, str] = {}


class Askable(Protocol):
    """A future, as it is seen from here."""

    status: str

    def ask(self) -> Asked:
        """Give those who wait for it."""

    def call_dispatcher(self) -> None:
        """Have no caller read its answer."""

    def tell(self, waiter: Any) -> None:
        """Tell a waiter that it is done."""


class Condition:
    """A future's ``_condition``, for the standard library.

    Args:
        job: The future.
    """

    __slots__ = ("_job",)

    def __init__(self, job: Askable) -> None:
        self._job = job

    def acquire(self) -> bool:
        """Have this thread see the state as it is now."""
        self._job.ask().views[get_ident()] = self._job.status
        return True

    def release(self) -> None:
        """Have this thread see the state as it is."""
        self._job.ask().views.pop(get_ident(), None)

    def __enter__(self) -> bool:
        # A view that was left by somebody who was interrupted is too old.
        self.release()
        return True

    def __exit__(self, *_exc: object) -> None: ...


class Waiters:
    """A future's ``_waiters``, for the standard library.

    Args:
        job: The future.
    """

    __slots__ = ("_job",)

    def __init__(self, job: Askable) -> None:
        self._job = job

    def append(self, waiter: Any) -> None:
        """Have a waiter of ``wait()`` or ``as_completed()`` told, once.

        Args:
            waiter: It counts the futures that it has seen not to be done.
        """
        job, asked = self._job, self._job.ask()
        # Whoever sets it must not hang on what a signal has left locked.
        if isinstance(waiter.event, threading.Event):
            event, waiter.event = waiter.event, Flag()
            if event.is_set():  # by a future of another executor
                waiter.event.set()
        seen = asked.views.get(get_ident(), job.status)
        with _lock:
            is_late = job.status in _TOLD
            if not is_late:
                asked.waiters += [waiter]  # no call, see _lock of a job
        if not is_late:
            job.call_dispatcher()
        elif seen not in _TOLD:
            job.tell(waiter)

    def remove(self, waiter: Any) -> None:
        """Have it told no more."""
        with suppress(ValueError):  # it was told
            self._job.ask().waiters.remove(waiter)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._job.ask().waiters)
