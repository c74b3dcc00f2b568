"""The ends of sockets and pipes, each of which belongs to one process alone.

Runs in both processes, and at each fork of them.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection

_BUFFER_SIZE = 1 << 20  # of a socket; the system gives less, and more than by default

# Every open end of this process. A forked copy of the process closes its copies: the
# end of a stream is seen only when no process holds the other end any more.
_ends: weakref.WeakSet[socket.socket | Connection] = weakref.WeakSet()
# Guards _ends and the moment between the making of an end and its entry there, so that
# no fork of another thread falls in between.
_ends_lock = threading.RLock()
_kept = threading.local()


def make_ends() -> tuple[socket.socket, socket.socket]:
    """Make the two ends of a channel, which no forked process will share."""
    with _ends_lock:
        ends = socket.socketpair()
        for end in ends:
            end.setblocking(True)  # whatever socket.setdefaulttimeout() has said
            with suppress(OSError):  # more than the system allows
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_SIZE)
        _ends.update(ends)
    return ends


def make_pipe() -> tuple[Connection, Connection]:
    """Make the end of a pipe that reads and the one that writes, for one process each."""
    with _ends_lock:
        ends = multiprocessing.Pipe(duplex=False)
        _ends.update(ends)
    return ends


def own_end(end: socket.socket | Connection) -> None:
    """Note an end that another process has made for this one."""
    if isinstance(end, socket.socket):
        end.setblocking(True)
    with _ends_lock:
        _ends.add(end)


@contextmanager
def kept_by_child(*ends: socket.socket | Connection) -> Iterator[None]:
    """Let a process that this thread forks inside the block keep some ends."""
    _kept.ends = ends
    try:
        yield
    finally:
        _kept.__dict__.pop("ends", None)


def _close_inherited_ends() -> None:
    # Taken out: the block does not end in the child, whose own children keep nothing.
    kept = _kept.__dict__.pop("ends", ())
    for end in list(_ends):
        if end not in kept:
            end.close()
    _ends.clear()
    _ends.update(kept)
    _ends_lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_ends_lock.acquire,
        after_in_parent=_ends_lock.release,
        after_in_child=_close_inherited_ends,
    )
