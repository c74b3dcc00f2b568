"""Ends a worker when its parent is gone, or has asked it to end.

Runs in a worker. Both are told by the lifeline: a pipe whose other end the parent alone
holds. A thread waits for its end, has the server cancel what runs there for this worker,
and ends the process. A job that is in C code may hold the interpreter, so that this thread
never gets it: then the process is ended without it, see :func:`_end_without_interpreter`.
"""

from __future__ import annotations

import _thread
import faulthandler
import multiprocessing
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from .._forks.ends import End
from .._wire.phase import Phase, PhaseRecord
from .process_tree import signal_descendants

_GRACE = 1.5  # seconds to cancel, and to let a COMMIT end
_COMMIT_GRACE = 0.3  # seconds of those, for a COMMIT to end
_HANDLER_GRACE = 0.5  # seconds for what the job does at a signal
_HOLD_GRACE = 0.1  # seconds for a job to come out of a call
_CANCEL_ATTEMPTS = 3
_LOOK_EVERY = 0.01  # seconds, for the end of a COMMIT
# Signals that no program expects: one holds the main thread, one ends the process.
_has_fcntl_signals = sys.platform.startswith("linux")
_HOLDS = signal.SIGRTMAX - 2 if _has_fcntl_signals else None
_ENDS = signal.SIGRTMAX - 1 if _has_fcntl_signals else None
_F_SETSIG = 10  # fcntl(2); fcntl.F_SETSIG is missing from Python 3.11
_KILL = getattr(signal, "SIGKILL", signal.SIGTERM)


class Cancels(Protocol):
    """Has statements on a server."""

    def cancel_statements(self) -> object:
        """Cancel what runs there; from any thread."""


class ParentWatch:
    """The thread that waits for the end of the lifeline.

    Args:
        lifeline: The worker's end of it.

    Attributes:
        record: The worker's phase record, when it has one.
        database: The worker's engine, when it has one.
        before_end: What is done first, if anything; what it raises is dropped.
    """

    def __init__(self, lifeline: End) -> None:
        self._lifeline = lifeline
        self.record: PhaseRecord | None = None
        self.database: Cancels | None = None
        self.before_end: Callable[[], None] | None = None
        self._is_held = threading.Event()
        # Before any other thread of this worker starts, see there.
        _end_without_interpreter(lifeline)
        if _HOLDS is not None:
            signal.signal(_HOLDS, self._hold)
        threading.Thread(target=self._run, name="DBPoolFollower", daemon=True).start()

    def _run(self) -> None:
        _wait_for_end(self._lifeline)
        if not _has_fcntl_signals:
            # A driver that waits for a server that is mute may hold the interpreter. This
            # timer needs none. But a fork of a process that has set one waits for ever.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            faulthandler.dump_traceback_later(_GRACE, exit=True, file=nowhere)
        if self.before_end is not None:
            with suppress(Exception):
                self.before_end()
        number = _KILL
        if self.record is not None:
            # From here on no COMMIT begins, and no job.
            number = self.record.stop_signal() or number
            self.record.stop(number)
            # A job that swallows the error of a cancelled statement would send the next.
            if _HOLDS is not None:
                signal.pthread_kill(threading.main_thread().ident or 0, _HOLDS)
            end = time.monotonic() + _COMMIT_GRACE
            # Also after a COMMIT of the job's own, whose end is not noted.
            while self.record.read().phase is Phase.COMMITTING:
                if time.monotonic() > end:
                    break
                time.sleep(_LOOK_EVERY)
        if self.database is not None and not self._is_ending_its_job():
            with suppress(Exception):
                self._cancel(self.database)
        with suppress(Exception):
            signal_descendants(os.getpid(), number)
        os.kill(os.getpid(), number)
        # The job may have a handler for it.
        time.sleep(_HANDLER_GRACE)
        os.kill(os.getpid(), _KILL)

    def _is_ending_its_job(self) -> bool:
        """Say whether what runs is the last COMMIT of a job, which is not cancelled."""
        if self.record is None:
            return False
        progress = self.record.read()
        return progress.phase is Phase.COMMITTING and not progress.has_own_commit

    def _cancel(self, database: Cancels) -> None:
        for _ in range(_CANCEL_ATTEMPTS):
            # Once the job is held it sends no more statements. As long as it is in a call
            # that is cancelled, or the driver's, it is not: it may send another one.
            is_held = self._is_held.wait(_HOLD_GRACE)
            database.cancel_statements()
            if is_held:
                break

    def _hold(self, _number: int, _frame: object) -> None:
        self._is_held.set()
        if self.record is not None:
            self.record.hold_if_stopped()


def _wait_for_end(lifeline: End) -> None:
    if hasattr(select, "poll"):
        # For nothing but that the other end is closed. What multiprocessing waits for
        # is held open by forked copies of the parent; this is not.
        poll = select.poll()
        poll.register(lifeline, 0)
        poll.poll()
    elif (parent := multiprocessing.parent_process()) is not None:
        parent.join()


def _end_without_interpreter(lifeline: End) -> None:
    """Have the system end this process after the lifeline has ended, whatever it does.

    The kernel sends a signal at the end of a pipe (fcntl(2), "F_SETSIG"). It may reach
    one thread only, which sleeps for ever, and all that happens there needs no
    interpreter: the handler of faulthandler writes two texts to a socket that is full,
    each until its time is up, and then lets the signal do what it does by default, which
    is to end the process. So the thread that can cancel statements has that long for it.
    """
    if _ENDS is None:
        return
    import fcntl

    number = _ENDS
    full, _others[:] = _full_socket(_GRACE / 2)
    faulthandler.register(number, file=full, all_threads=False, chain=True)
    forever = _thread.allocate_lock()
    forever.acquire()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    _thread.start_new_thread(forever.acquire, ())
    # The threads that this one starts inherit that it is blocked.
    signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    descriptor = lifeline.fileno()
    fcntl.fcntl(descriptor, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(descriptor, _F_SETSIG, number)
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_ASYNC)


_others: list[socket.socket] = []  # kept open


def _full_socket(seconds: float) -> tuple[int, list[socket.socket]]:
    """Give a socket in which a write of one byte fails after so many seconds."""
    ends = socket.socketpair()
    full, _ = ends
    full.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the system's least
    full.setblocking(False)
    for size in (1 << 12, 1):
        with suppress(BlockingIOError):
            while True:
                full.send(b"\0" * size)
    os.set_blocking(full.fileno(), True)
    whole, part = divmod(seconds, 1.0)
    limit = struct.pack("@ll", int(whole), int(part * 1e6))  # a timeval
    full.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
    return full.fileno(), list(ends)
