"""Sends signals to the processes that descend from a worker: what its jobs have started.

Runs in both processes. Linux alone tells which those are.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Protocol


class Sender(Protocol):
    """Sends signals to one process."""

    def send(self, number: int) -> None:
        """Send a signal."""


def signal_descendants(pid: int, number: int, stopper: Sender | None = None) -> None:
    """Send a signal to all processes that descend from one, and not to itself.

    Args:
        pid: Of that process.
        number: Of the signal.
        stopper: Stops that process first, so that it starts and reaps no more of them;
            None if it is this process.
    """
    children = _children_of(pid)
    if not children:
        return
    if stopper is not None and number == signal.SIGKILL:
        stopper.send(signal.SIGSTOP)
        children = _children_of(pid)
    for child in children:
        with suppress(OSError, AttributeError):  # it has ended, or there is no pidfd
            descriptor = os.pidfd_open(child)
            try:
                # Its id may be another process's by now.
                if _parent_of(child) == pid:
                    signal_descendants(child, number, _Descendant(descriptor))
                    signal.pidfd_send_signal(descriptor, number)
            finally:
                os.close(descriptor)


class _Descendant:
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def send(self, number: int) -> None:
        signal.pidfd_send_signal(self._descriptor, number)


def _children_of(pid: int) -> list[int]:
    """Give the process ids of the children of a process, ended ones included."""
    found: list[int] = []
    with suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            # proc_pid_task_children(5), where the kernel has it.
            with suppress(OSError):
                text = Path(f"/proc/{pid}/task/{thread}/children").read_text("ascii")
                found += map(int, text.split())
    return found


def _parent_of(pid: int) -> int:
    text = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    # The name of the program may have spaces and parentheses in it.
    return int(text.rpartition(")")[2].split()[1])
