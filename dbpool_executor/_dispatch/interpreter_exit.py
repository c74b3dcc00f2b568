"""Lets the jobs of all executors end before the interpreter does.

Runs in the parent.
"""

from __future__ import annotations

import threading
import weakref
from typing import Protocol


class _Closable(Protocol):
    def close(self) -> None: ...
    def join(self) -> None: ...


class _InterpreterExit:
    def __init__(self) -> None:
        self.has_begun = False
        self._closables: weakref.WeakSet[_Closable] = weakref.WeakSet()

    def closes(self, closable: _Closable) -> None:
        """Close and join something when the interpreter ends."""
        self._closables.add(closable)

    def begin(self) -> None:
        self.has_begun = True
        closables = list(self._closables)
        for closable in closables:
            closable.close()
        for closable in closables:
            closable.join()


at_exit = _InterpreterExit()
# An atexit handler would run too late: since 3.12 no thread or process starts by then.
# concurrent.futures.process registers itself in the same way.
threading._register_atexit(at_exit.begin)  # type: ignore[attr-defined]
