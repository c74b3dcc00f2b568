"""How a test waits: for what it names, and never for a time.

Imported by tests. The other side of a gate is ``jobs.wait_at_gate``.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

LONGEST = 20.0
"""Seconds that a test waits for anything before it fails."""


def wait_until(predicate: Callable[[], T], what: str, timeout: float = LONGEST) -> T:
    """Wait until something is true, and give what it gave.

    Args:
        predicate: Called again and again.
        what: Names what is waited for.
        timeout: Seconds.

    Raises:
        AssertionError: It was not true in time.
    """
    deadline = time.monotonic() + timeout
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout:g} s in vain: {what}")
        time.sleep(0.01)


class Gate:
    """Where jobs wait until the test lets them go on."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(LONGEST)
        self._inside: dict[int, socket.socket] = {}  # by process id
        self.address: tuple[str, int] = self._listener.getsockname()

    def arrival(self) -> int:
        """Wait for the next job to arrive, and give the process id of its worker."""
        try:
            visitor, _ = self._listener.accept()
        except TimeoutError:
            raise AssertionError(f"waited {LONGEST:g} s for a job in vain") from None
        visitor.settimeout(LONGEST)
        pid = int.from_bytes(visitor.recv(8), "big")
        self._inside[pid] = visitor
        return pid

    def open(self, pid: int | None = None) -> None:
        """Let the jobs that have arrived go on, or the one of a worker."""
        for number in list(self._inside) if pid is None else [pid]:
            with self._inside.pop(number) as visitor, contextlib.suppress(OSError):
                visitor.sendall(b"\0")

    def close(self) -> None:
        """Let all jobs go on; those that come later fail."""
        # Shut down and not only closed: forked workers hold copies of the socket.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.open()
