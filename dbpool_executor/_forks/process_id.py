"""The number of this process, for who must know whether it is a forked copy.

Runs in both processes, and at each fork of them. To ask the system is a call, and two of
them are a tenth of all that a trivial job takes.
"""

from __future__ import annotations

import os
import threading

known_pid: int | None = os.getpid()
"""What ``os.getpid()`` gives; None while this process forks, when one must ask."""

lock = threading.RLock()
"""Held during a fork: another one is not to begin meanwhile."""


def forget() -> None:
    """Have everybody ask, until :func:`note`."""
    global known_pid
    known_pid = None


def note() -> None:
    """Note the number of this process, which may be a copy since :func:`forget`."""
    global known_pid
    known_pid = os.getpid()
