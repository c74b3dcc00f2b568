"""Stops automatic garbage collection for a while.

Runs in every process that imports the package: while SQLAlchemy is imported and while
connections are looked for, and at a fork.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class CollectionPause:
    """Stops automatic garbage collection for as long as any thread needs it."""

    def __init__(self) -> None:
        # Guards the other two. Never held across a fork: a thread that waits for it
        # in the copy would wait for ever.
        self._lock = threading.Lock()
        self._count = 0  # begun and not yet ended
        self._was_on = False  # before the first of them

    def __enter__(self) -> None:
        self.begin()

    def __exit__(self, *_exc: object) -> None:
        self.end()

    def begin(self) -> None:
        """Stop it, until :meth:`end`."""
        with self._lock:
            if not self._count:
                self._was_on = gc.isenabled()
            self._count += 1
            gc.disable()

    def end(self) -> None:
        """Let it go on, unless another thread has need of the pause."""
        with self._lock:
            self._count -= 1
            if self._was_on and not self._count:
                gc.enable()

    def end_in_child(self) -> None:
        """Do as :meth:`end` does, in a copy of the process that was forked since."""
        # Another thread may have held the lock, or have had need of the pause as well.
        self._lock = threading.Lock()
        self._count = 1
        self.end()


collection_pause = CollectionPause()
"""That of this process."""


_FROZEN_AT_START = 1000  # more than CPython 3.12 freezes by itself, less than anybody


@contextmanager
def counted_as_old() -> Iterator[None]:
    """Have what is imported inside the block not looked at until all old objects are.

    As it is by default, the collector looks at all of SQLAlchemy several times while it
    is imported, for a tenth of the time that this takes.
    """
    with collection_pause:
        yield
        # Not if the program has frozen something, which would be undone.
        if gc.get_freeze_count() < _FROZEN_AT_START:
            gc.freeze()
            gc.unfreeze()
