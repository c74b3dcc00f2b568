"""Starts the forkserver that workers are forked from, and sees whether it lives.

Runs in the parent.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from multiprocessing import forkserver
from typing import Any

# Not the main module, by default preloaded since Python 3.14: what it raises would end
# the forkserver and be told to nobody, and what it connects would be in every worker.
_PRELOADED = [
    "dbpool_executor._worker.main",
    "dbpool_executor._launch.last_preload",
]
_server: Any = forkserver._forkserver


def start_forkserver() -> None:
    """Start the forkserver, unless it runs, with what each worker would import.

    What the program has chosen to preload is left as it is; there is no public way to
    ask for that.
    """
    if getattr(_server, "_preload_modules", None) == ["__main__"]:
        _server.set_forkserver_preload(_PRELOADED)
    # A Ctrl-C while it starts would print a traceback. But what the program itself
    # starts through it would inherit that SIGINT is blocked: the last import undoes it.
    undone = getattr(_server, "_preload_modules", None) == _PRELOADED
    with sigint_blocked() if undone else nullcontext():
        try:
            forkserver.ensure_running()
        except ChildProcessError:
            # It is another process's child: this one is a forked copy. Or it was
            # killed, and somebody else has reaped it.
            _forget()
            forkserver.ensure_running()


def server_pid() -> int | None:
    """Give the process id of the forkserver that started the last process."""
    pid: int | None = getattr(_server, "_forkserver_pid", None)
    return pid


def is_server_of(pid: int) -> bool:
    """Say whether the forkserver with a process id is there to tell how workers ended."""
    if pid != server_pid():
        return False
    try:
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return ended is None


def _forget() -> None:
    with _server._lock:
        descriptor, _server._forkserver_alive_fd = _server._forkserver_alive_fd, None
        _server._forkserver_pid = _server._forkserver_address = None
    if descriptor is not None:
        with suppress(OSError):
            os.close(descriptor)


@contextmanager
def sigint_blocked() -> Iterator[None]:
    """Let no Ctrl-C reach this thread inside the block, nor what it starts there."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
