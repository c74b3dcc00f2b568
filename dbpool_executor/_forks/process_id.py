"""The number of this process, for who must know whether it is a forked copy.

Runs in both processes, and at each fork of them. To ask the system is a call, and two of
them are a tenth of all that a trivial job takes.
"""

from __future__ import annotations

import os
import threading

known_pid: int | None = os.getpid()
"""What ``os.getpid()`` gives; None while this process forks, when one must ask.

A hook that was registered before the one here is called sooner in the copy.
"""

_lock = threading.RLock()  # held during a fork: another one is not to begin meanwhile


def _forget() -> None:
    global known_pid
    _lock.acquire()
    known_pid = None


def _note() -> None:
    global known_pid
    known_pid = os.getpid()
    _lock.release()


# Whoever forks in C and goes on with Python has these called as well
# (docs.python.org/3/c-api/sys.html, "PyOS_AfterFork_Child").
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_forget, after_in_parent=_note, after_in_child=_note)
