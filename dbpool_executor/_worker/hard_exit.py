"""Ends a process without what the interpreter does at its end.

Runs in a worker, and in copies of it that a job has forked.
"""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress

_FLUSH_GRACE = 1.0  # seconds


def leave() -> None:
    """End this process; what was printed is not lost."""
    # In a thread, and not waited for without end: another thread of the parent may have
    # been printing at the fork, and nobody releases that lock here.
    flusher = threading.Thread(target=_flush, daemon=True)
    flusher.start()
    flusher.join(_FLUSH_GRACE)
    os._exit(0)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
