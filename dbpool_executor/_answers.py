"""Short answers of jobs that came in a group, over a pipe.

Runs in both processes. A few bytes take a pipe a third of the time that a socket takes,
but much take it twice as long, and it is slower to wake who waits for one job. An answer
is the result of one job, framed as::

    number of the job: 8 bytes | nanoseconds that it took: 8 | length: 4 | its pickle

All other answers go over the channel, and mean the first job that has none. The order of
all is known by that: an answer here that is for a later job waits for one there.
"""

from __future__ import annotations

import select
import struct
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from ._boundary import Buffer
from ._streams import End

_HEAD = struct.Struct("<QQI")
# So many bytes are written whole, or not at all (pipe(7), "PIPE_BUF").
_MOST = getattr(select, "PIPE_BUF", 512)
_READ_SIZE = 1 << 16


class Answer(NamedTuple):
    """A short answer.

    Attributes:
        number: Of the job, counted from 1 in the worker's life.
        nanoseconds: That it has taken.
        pickle: Of its result.
    """

    number: int
    nanoseconds: int
    pickle: bytes


_new = tuple.__new__


class AnswerWriter:
    """The worker's end.

    Args:
        end: Of the pipe, owned by this from now on.
    """

    def __init__(self, end: End) -> None:
        self._end = end

    def write(self, number: int, parts: Sequence[Buffer], nanoseconds: int) -> bool:
        """Write an answer, if it is short.

        Args:
            number: Of the job.
            parts: Of its result.
            nanoseconds: That it has taken.

        Returns:
            Whether it was.
        """
        pickle = parts[0]
        if len(parts) != 1 or len(pickle) > _MOST - _HEAD.size:
            return False
        with suppress(OSError):  # the parent is gone: the channel tells
            self._end.send(_HEAD.pack(number, nanoseconds, len(pickle)) + pickle)
        return True


class AnswerReader:
    """The parent's end, which does not block.

    Args:
        end: Of the pipe, owned by this from now on.

    Attributes:
        waiting: Answers that were read, in order, until the dispatcher takes them.
        bytes_received: In its life.
    """

    def __init__(self, end: End) -> None:
        self._end = end
        end.setblocking(False)
        self._rest = b""  # the beginning of an answer
        self.waiting: deque[Answer] = deque()
        self.bytes_received = 0

    def fileno(self) -> int:
        """Give the descriptor, for a selector."""
        return self._end.fileno()

    def read(self) -> None:
        """Read all answers that are there."""
        with suppress(OSError):
            while data := self._end.recv(_READ_SIZE):
                self._take_in(data)
                if len(data) < _READ_SIZE:
                    break

    def _take_in(self, data: bytes) -> None:
        self.bytes_received += len(data)
        if self._rest:
            data = self._rest + data
        size, unpack, add = _HEAD.size, _HEAD.unpack_from, self.waiting.append
        start, end = 0, len(data)
        while end - start >= size:
            number, nanoseconds, length = unpack(data, start)
            body = start + size
            if end - body < length:
                break
            start = body + length
            # Not Answer(), whose __new__ is no C function.
            add(_new(Answer, (number, nanoseconds, data[body:start])))
        self._rest = data[start:]

    def close(self) -> None:
        """Close this end."""
        self._end.close()
