"""Collects garbage when a worker has grown, not only after so many new objects.

Runs in a worker, in the thread that runs its jobs. A few objects in a cycle may hold
megabytes; the collector counts objects alone.
"""

from __future__ import annotations

import gc
import os
from contextlib import suppress

_LOOK_EVERY = 1_000_000  # nanoseconds; a look takes a few thousand
_STEP = 32 << 20  # bytes that a worker may grow by before it is collected
_PART = 4  # or this part of it, where that is more


class MemoryGrowth:
    """The growth of this process since garbage was collected last.

    Attributes:
        look_at: On ``time.monotonic_ns()``, when to look again.
    """

    def __init__(self) -> None:
        self.look_at = 0
        self._statm = -1
        self._page = 1
        with suppress(OSError, AttributeError, ValueError):  # Linux alone has it
            self._page = os.sysconf("SC_PAGE_SIZE")
            self._statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        self._most = 0  # bytes, beyond which it is collected
        self._allow()

    def look(self, now: int) -> None:
        """Collect garbage, if the process has grown by much; between jobs or calls.

        Args:
            now: On ``time.monotonic_ns()``.
        """
        self.look_at = now + _LOOK_EVERY
        if self._resident() > self._most:
            gc.collect()
            self._allow()

    def _allow(self) -> None:
        resident = self._resident()
        self._most = resident + max(_STEP, resident // _PART)

    def _resident(self) -> int:
        if self._statm < 0:
            return 0
        return int(os.pread(self._statm, 64, 0).split()[1]) * self._page
