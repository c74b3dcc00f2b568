"""One child process: its start, the signals sent to it, its end and its exit status.

Runs in the parent. ``multiprocessing`` starts the process. It trusts that nobody else reaps
its children, and sends signals to process ids. But a program may ignore SIGCHLD, and then
the system reaps them; a library may call ``waitpid(-1)``; a forkserver may be killed. So
the end of a process is read from its pidfd, and signals go through that: unlike a process
id, it never means another process (pidfd_open(2)).
"""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

from .._worker.process_tree import signal_descendants
from .forkserver import is_server_of, server_pid

_END_GRACE = 1.0  # seconds for a process to end after its channel has
_KILL_GRACE = 5.0  # seconds for a killed process to free its memory
_LOST = 255  # what multiprocessing makes of an exit status that no forkserver can tell


class PidFd:
    """Refers to a process, and becomes readable when that ends."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def fileno(self) -> int:
        """Give the descriptor, for a selector."""
        return self._descriptor

    def send(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._descriptor, number)

    def close(self) -> None:
        """Close it."""
        os.close(self._descriptor)
        self._descriptor = -1


class ChildProcess:
    """A process that ``multiprocessing`` starts, by whatever start method.

    Args:
        process: It, not yet started.

    Raises:
        Exception: Whatever its start raises.
    """

    def __init__(self, process: BaseProcess) -> None:
        self._process = process
        _start(process)
        self._popen: Any = vars(process)["_popen"]
        self.pid: int = self._popen.pid
        self._server_pid = server_pid() if self._popen.method == "forkserver" else None
        self._has_ended = False
        self.end: PidFd | None = self._open()

    def send(self, number: int) -> None:
        """Send a signal to the process, and not to another one that has its id now."""
        if self.end is not None:
            self.end.send(number)
        elif not self._has_ended and self._is_unreaped():
            with suppress(OSError):
                os.kill(self.pid, number)

    def send_to_tree(self, number: int) -> None:
        """Send a signal to the process and to all that descend from it."""
        signal_descendants(self.pid, number, self.end)
        self.send(number)

    def bury(self) -> int | None:
        """Free what is left of a process that has ended, or is about to.

        Returns:
            The exit code, as in ``multiprocessing.Process.exitcode``; None if it is not
            to be had.
        """
        if not self._wait(_END_GRACE):
            self.send_to_tree(signal.SIGKILL)
            self._wait(_KILL_GRACE)
        exitcode = self._exitcode()
        if self.end is not None:
            self.end.close()
            self.end = None
        self._has_ended = True
        if self._popen.returncode is None:
            # Else it is not let go of: for multiprocessing it would run for ever.
            self._popen.returncode = _LOST
        self._process.close()
        return exitcode

    def _open(self) -> PidFd | None:
        """Give the process's pidfd, where there is one."""
        if not hasattr(os, "pidfd_open"):
            return None
        try:
            end = PidFd(os.pidfd_open(self.pid))
        except OSError:  # it has been reaped by now, or the system knows no pidfd
            self._has_ended = not self._is_unreaped()
            return None
        # Looked at after: if the process was there by then, the id was its own.
        if self._is_unreaped():
            return end
        end.close()
        self._has_ended = True
        return None

    def _is_unreaped(self) -> bool:
        """Say whether the process id is still its own."""
        if self._popen.returncode is not None:
            return False
        if self._server_pid is not None:
            return not wait([self._popen.sentinel], 0)
        if not hasattr(os, "waitid"):
            return True
        try:
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return False
        return True

    def _wait(self, seconds: float) -> bool:
        """Wait until it has ended, and say whether it has."""
        if self._has_ended:
            return True
        if self.end is not None:
            poll = select.poll()
            poll.register(self.end, select.POLLIN)
            return bool(poll.poll(seconds * 1e3))
        return bool(wait([self._popen.sentinel], seconds))

    def _exitcode(self) -> int | None:
        if self._server_pid is not None:
            # The forkserver reaps it and tells how it ended, if it lives.
            wait([self._popen.sentinel], _END_GRACE)
            exitcode: int | None = self._popen.poll()
            is_lost = exitcode == _LOST and not is_server_of(self._server_pid)
            return None if is_lost else exitcode
        exitcode = self._popen.poll()
        if exitcode is None:
            # Reaped by somebody else. By a thread that called active_children(), it is
            # noted a moment later.
            time.sleep(0.01)
            exitcode = self._popen.poll()
        return exitcode


@contextmanager
def picklable_authkey() -> Iterator[None]:
    """Let processes be made and started inside the block where billiard's is current.

    Celery's prefork workers are: their key pickles for billiard's own children alone.
    """
    config: dict[str, Any] = vars(multiprocessing.current_process()).get("_config", {})
    key = config.get("authkey")
    own: Any = vars(multiprocessing.process)["AuthenticationString"]
    if key is None or isinstance(key, own):
        yield
        return
    config["authkey"] = own(key)
    try:
        yield
    finally:
        config["authkey"] = key


def _start(process: Any) -> None:
    if not multiprocessing.current_process().daemon:
        process.start()
        return
    # A daemonic process may have no children by multiprocessing, because they would be
    # left behind when it is killed (docs.python.org/3/library/multiprocessing.html,
    # "daemon"). Workers end with their parent by themselves. Nor would this process's
    # own end wait for them before it tells them to leave.
    process._popen = process._Popen(process)
    process._sentinel = process._popen.sentinel
