"""Short answers of jobs that came in a group, over a pipe.

Runs in both processes. A few bytes take a pipe a third of the time that a socket takes,
but much take it twice as long, and it is slower to wake who waits for one job. An answer
is the result of one job. All have one length, so that one call takes apart whatever was
read::

    number of the job: 8 bytes | nanoseconds that it took: 8 | its pickle, and zeros: 112

All other answers go over the channel, and mean the first job that has none. The order of
all is known by that: an answer here that is for a later job waits for one there.
"""

from __future__ import annotations

import itertools
import pickle
import struct
from collections.abc import Sequence
from contextlib import suppress

from .._forks.ends import End
from .calls import Buffer

_MOST = 112  # bytes of a short pickle; what follows its end pickle.loads() ignores
# A pipe takes it whole, or not at all: up to 512 bytes and more (POSIX, "PIPE_BUF").
_ANSWER = struct.Struct(f"=QQ{_MOST}s")
_PICKLE = struct.Struct(f"=16x{_MOST}s")
# The pickle of a number of 32 bits: PROTO and which, BININT and the number, STOP.
_INT = struct.Struct(f"<19xi{_MOST - 7}x")
_BININT, _STOP = slice(18, None, _ANSWER.size), slice(23, None, _ANSWER.size)
_WORDS = _ANSWER.size // 8
_pack = _ANSWER.pack
_READ_SIZE = 1 << 16


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
        body = parts[0]
        if len(parts) != 1 or len(body) > _MOST:
            return False
        if type(body) is not bytes:
            body = bytes(body)
        try:  # noqa: SIM105 - for as long as the rest takes
            self._end.send(_pack(number, nanoseconds, body))
        except OSError:
            pass  # the parent is gone: the channel tells
        return True


class AnswerReader:
    """The parent's end, which does not block.

    Args:
        end: Of the pipe, owned by this from now on.

    Attributes:
        bytes_received: In its life.
    """

    def __init__(self, end: End) -> None:
        self._end = end
        end.setblocking(False)
        self._data = b""  # that was read and not taken
        self.bytes_received = 0

    def fileno(self) -> int:
        """Give the descriptor, for a selector."""
        return self._end.fileno()

    @property
    def count(self) -> int:
        """How many answers were read and not taken."""
        return len(self._data) // _ANSWER.size

    def read(self) -> None:
        """Read all answers that are there."""
        with suppress(OSError):
            while data := self._end.recv(_READ_SIZE):
                self.bytes_received += len(data)
                self._data += data
                if len(data) < _READ_SIZE:
                    break

    def take(self, numbers: list[int]) -> tuple[list[bytes] | list[int], int]:
        """Take the answers that are for the first of some jobs.

        Args:
            numbers: Of the jobs, no more than there are answers.

        Returns:
            Their pickles, each with zeros that follow it; or the results themselves, if
            all are numbers of 32 bits. And the nanoseconds that they have taken.
        """
        size = len(numbers) * _ANSWER.size
        answered = memoryview(self._data)[:size].cast("Q")[::_WORDS].tolist()
        if answered != numbers:
            pairs = zip(answered, numbers, strict=True)
            size = len(list(itertools.takewhile(_are_equal, pairs))) * _ANSWER.size
        data, self._data = self._data[:size], self._data[size:]
        layout = _INT if _are_ints(data) else _PICKLE
        results = list(itertools.chain.from_iterable(layout.iter_unpack(data)))
        return results, sum(memoryview(data).cast("Q")[1::_WORDS])

    def close(self) -> None:
        """Close this end."""
        self._end.close()


def _are_ints(answers: bytes) -> bool:
    count = len(answers) // _ANSWER.size
    return (
        answers[_BININT] == pickle.BININT * count
        and answers[_STOP] == pickle.STOP * count
    )


def _are_equal(pair: tuple[int, int]) -> bool:
    return pair[0] == pair[1]
