"""The ends of sockets and pipes, each of which belongs to one process alone.

Runs in both processes, and at each fork of them.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import socket
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import NoReturn, Self


class PipeEnd:
    """One end of a pipe, with what is used of a socket's ways.

    Args:
        connection: Owns the end, and knows how to cross to another process.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.recv: Callable[[int], bytes] = partial(os.read, connection.fileno())
        self.send: Callable[[bytes], int] = partial(os.write, connection.fileno())

    def __reduce__(self) -> tuple[type[PipeEnd], tuple[Connection]]:
        return PipeEnd, (self._connection,)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """Give the descriptor, for a selector."""
        return self._connection.fileno()

    def setblocking(self, flag: bool) -> None:
        """Say whether to wait for what is to be read, or for room."""
        os.set_blocking(self.fileno(), flag)

    def close(self) -> None:
        """Close it."""
        self._connection.close()
        # The number may be another file's by now.
        self.recv = self.send = _refuse


def _refuse(_: object) -> NoReturn:
    raise OSError(errno.EBADF, os.strerror(errno.EBADF))


End = socket.socket | PipeEnd

_BUFFER_SIZE = 1 << 20  # of a socket; the system gives less, and more than by default

# Every open end of this process. A forked copy of the process closes its copies: the
# end of a stream is seen only when no process holds the other end any more.
_ends: weakref.WeakSet[End] = weakref.WeakSet()
_kept = threading.local()
lock = threading.RLock()
"""Guards that set, and the moment between the making of an end and its entry there: no
fork of another thread falls in between."""


def make_ends() -> tuple[socket.socket, socket.socket]:
    """Make the two ends of a channel, which no forked process will share."""
    with lock:
        ends = socket.socketpair()
        for end in ends:
            end.setblocking(True)  # whatever socket.setdefaulttimeout() has said
            with suppress(OSError):  # more than the system allows
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_SIZE)
        _ends.update(ends)
    return ends


def make_pipe() -> tuple[End, End]:
    """Make the end of a pipe that reads and the one that writes, as of a channel."""
    if sys.platform == "win32":
        return make_ends()  # no selector there takes a pipe
    with lock:
        read, written = map(PipeEnd, multiprocessing.Pipe(duplex=False))
        _ends.update((read, written))
    return read, written


def own_end(end: End) -> None:
    """Note an end that another process has made for this one."""
    end.setblocking(True)
    with lock:
        _ends.add(end)


@contextmanager
def kept_by_child(*ends: End) -> Iterator[None]:
    """Let a process that this thread forks inside the block keep some ends."""
    _kept.ends = ends
    try:
        yield
    finally:
        _kept.__dict__.pop("ends", None)


def close_inherited() -> None:
    """Close, in a forked copy, all ends but those that it was to keep."""
    # Taken out: the block does not end in the child, whose own children keep nothing.
    kept = _kept.__dict__.pop("ends", ())
    for end in list(_ends):
        if end not in kept:
            end.close()
    _ends.clear()
    _ends.update(kept)
