"""A channel that several threads send on.

Runs in a worker whose log records go to the parent.
"""

from __future__ import annotations

import socket
import threading
from collections import deque
from collections.abc import Sequence

from .._wire.calls import Buffer
from .._wire.channel import Channel, Kind, Message


class SharedChannel(Channel):
    """One on which finalizers send as well, in the middle of what a thread sends."""

    def __init__(self, end: socket.socket) -> None:
        super().__init__(end)
        self._waiting: deque[tuple[Message, ...]] = deque()
        self._sending = threading.Lock()  # from the first byte of a message to its last

    def send(self, *messages: Message) -> bool:
        """Send messages, now or when those that are being sent are through.

        Returns:
            As for :meth:`Channel.flush`.
        """
        self._waiting.append(messages)
        # Not waited for: garbage collection may log in the middle of a message, in the
        # very thread that sends it. Who has the lock sends what came meanwhile, and
        # looks again once it has let go.
        while self._waiting and self._sending.acquire(blocking=False):
            self._send_waiting()
        return True

    def send_one(self, kind: Kind, parts: Sequence[Buffer], number: int) -> bool:
        """Do as :meth:`send` does."""
        return self.send(Message(kind, parts, number))

    def drain(self) -> None:
        """Wait until all is sent, in whatever thread."""
        self._sending.acquire()
        self._send_waiting()

    def _send_waiting(self) -> None:
        try:
            while self._waiting:
                super().send(*self._waiting.popleft())
        finally:
            self._sending.release()
