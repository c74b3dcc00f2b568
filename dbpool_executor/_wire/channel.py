"""Messages over a stream socket, one private channel for each worker.

Runs in both processes. A message is a kind and some parts, framed as::

    kind: 1 byte | number of a job: 8 bytes | number of parts: 4 bytes |
    length of the first part: 8 bytes | of each other part: 8 bytes | the parts

The parent's end never blocks; the worker's end does. The end of the stream is itself a
message: to a worker that there are no more jobs (the parent closed its side, or is
gone), to the parent that the worker is gone.
"""

from __future__ import annotations

import enum
import functools
import socket
import struct
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from .calls import Buffer

_HEAD = struct.Struct("<BQIQ")  # nearly all messages have one part
_READ_SIZE = 1 << 16  # one read takes many small messages
_READ_MOST = 1 << 22  # bytes, before other channels have their turn
_SPARE_MOST = 1 << 23  # bytes of memory that is kept for the next large message
_COPY_LIMIT = 1 << 16  # below it, joining the parts is cheaper than a call for each


class Kind(enum.IntEnum):
    """What a message says."""

    JOB = 1  # parent to worker: one with this number, its pickled call and its options
    JOBS = (
        2  # parent to worker: those from this number on, their calls and their options
    )
    READY = 3  # worker to parent: it has its engine and its initializer has run
    RESULT = 4  # worker to parent: the first job not yet answered was committed
    FAILURE = 5  # worker to parent: the first job not yet answered failed
    RETURNED = 6  # worker to parent: the job with this number was not begun
    NOTE = 7  # worker to parent: a text for the parent's log
    START_FAILURE = 8  # worker to parent: the factory or the initializer raised
    LOG = 9  # worker to parent: a record for the parent's log handlers
    # Worker to parent: the first job not yet answered returned; what it has committed by
    # itself is not known.
    RESULT_UNKNOWN = 10
    SKIPPED = 11  # worker to parent: so many calls were found in the ledger
    STAGE = 12  # worker to parent: its start has come to the stage with this number
    # Worker to parent: as START_FAILURE, with an error of a database that may pass.
    PASSING_START_FAILURE = 13


class Stage(enum.IntEnum):
    """What a worker that starts is at."""

    IMPORT = 0  # of the main module, and of what its setup is made of
    FACTORY = 1  # it calls the engine factory
    INITIALIZER = 2  # it calls the initializer


_KINDS = {int(kind): kind for kind in Kind}


class Message(NamedTuple):
    """One message: its kind, its parts as bytes, and a number.

    The number says which job of the worker it means, counted from 1 in the worker's life.
    In an answer, which means the first job that has none, it is the nanoseconds that the
    job has taken.
    """

    kind: Kind
    parts: Sequence[Buffer] = ()
    number: int = 0


_new = tuple.__new__


class Channel:
    """One end of a stream of messages.

    Args:
        end: A connected stream socket, owned by the channel from now on. Whether it
            blocks is for the caller to choose.

    Attributes:
        bytes_received: In its life.
        is_final: Whether nothing more will come than what is there, though the stream
            has not ended: the peer is gone, and a process that it forked holds its end.
    """

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._received = b""  # the beginning of a message
        self._large: _LargeMessage | None = None  # its parts are still arriving
        self._spare = bytearray(1)  # memory for the first part of the next large one
        self._unsent: deque[Buffer] = deque()
        self._ending = False
        self.bytes_received = 0
        self.is_final = False

    def fileno(self) -> int:
        """Give the descriptor, for a selector."""
        return self._end.fileno()

    def receive(self) -> list[Message]:
        """Read once, and give the messages that are complete by now.

        Returns:
            The messages in the order sent; empty if none is complete yet.

        Raises:
            EOFError: The stream has ended; a message that is incomplete by then is
                lost.
        """
        try:
            if self._large is not None:
                return self._receive_large(self._large)
            data = self._end.recv(_READ_SIZE)
        except (BlockingIOError, InterruptedError) as exc:
            if self.is_final:
                raise EOFError from exc
            return []
        except OSError as exc:
            # A peer that died with unread data of ours resets the stream. The system
            # reports that only after all it had sent was read.
            raise EOFError from exc
        if not data:
            raise EOFError
        return self.take_in(data)

    def receive_into(self, inbox: list[bytes]) -> None:
        """Read once, for somebody who may be interrupted by a signal.

        Args:
            inbox: Gets the bytes; what was read is there, whatever happens. Nothing if
                there was nothing, and no bytes if the stream has ended.
        """
        with suppress(OSError):
            inbox.extend(map(self._end.recv, (_READ_SIZE,)))

    def take_in(self, data: bytes) -> list[Message]:
        """Give the messages that are complete with the bytes that were read."""
        self.bytes_received += len(data)
        if self._received:
            data, self._received = self._received + data, b""
        return self._parse(data)

    @property
    def is_between_messages(self) -> bool:
        """Whether what was read ended with a message."""
        return not self._received and self._large is None

    def send(self, *messages: Message) -> bool:
        """Send messages, or as much of them as the socket takes now.

        Returns:
            As for :meth:`flush`.
        """
        small: list[Buffer] = []  # in one call to the system
        for message in messages:
            for buffer in frame(message):
                if len(buffer) <= _COPY_LIMIT:
                    small.append(buffer)
                else:
                    self._unsent += b"".join(small), buffer
                    small = []
        if small:
            self._unsent.append(b"".join(small))
        return self.flush()

    def send_one(self, kind: Kind, parts: Sequence[Buffer], number: int) -> bool:
        """Send one message, in few steps if it is short.

        Returns:
            As for :meth:`flush`.
        """
        if len(parts) != 1 or self._unsent or len(parts[0]) > _COPY_LIMIT:
            return self.send(Message(kind, parts, number))
        (part,) = parts
        unsent = self.send_at_once(_HEAD.pack(kind, number, 1, len(part)) + part)
        return not unsent or self.send_rest(unsent)

    def send_at_once(self, data: bytes) -> bytes:
        """Send bytes, from any thread, where nothing is unsent and nobody else sends.

        Returns:
            What the socket has not taken.
        """
        try:
            return data[self._end.send(data) :]
        except (BlockingIOError, InterruptedError):
            return data
        except OSError:
            return b""  # the peer is gone: reading will tell

    def send_rest(self, data: bytes) -> bool:
        """Send what :meth:`send_at_once` may not have sent.

        Returns:
            As for :meth:`flush`.
        """
        if data:
            self._unsent.append(data)
        return self.flush()

    def flush(self) -> bool:
        """Send what is still unsent.

        Returns:
            Whether nothing is left; False only for a socket that does not block. A
            peer that is gone counts as nothing left: reading will tell.
        """
        unsent = self._unsent
        while unsent:
            data = unsent[0]
            try:
                sent = self._end.send(data)
            except (BlockingIOError, InterruptedError):
                return False
            except OSError:
                unsent.clear()
                break
            if sent == len(data):
                unsent.popleft()
            else:
                unsent[0] = memoryview(data)[sent:]
        if self._ending:
            with suppress(OSError):  # the peer is gone, and knows
                self._end.shutdown(socket.SHUT_WR)
        return True

    def drain(self) -> None:
        """Wait until all is sent, which it always is at an end that blocks."""

    def end_sending(self) -> bool:
        """Tell the peer, once all is sent, that nothing more will come.

        Returns:
            As for :meth:`flush`.
        """
        self._ending = True
        return self.flush()

    def close(self) -> None:
        """Close this end."""
        self._unsent.clear()
        self._end.close()

    def _parse(self, data: bytes) -> list[Message]:
        messages: list[Message] = []
        parts: list[Buffer]
        start, size, unpack = 0, _HEAD.size, _HEAD.unpack_from
        while len(data) - start >= size:
            code, number, count, length = unpack(data, start)
            body = start + size
            if count == 1 and len(data) - body >= length:
                start = body + length
                parts = [data[body:start]]
                # Not Message(), whose __new__ is no C function.
                messages.append(_new(Message, (_KINDS[code], parts, number)))
                continue
            lengths = [length] if count else []
            if count > 1:
                more = _lengths(count - 1)
                if len(data) - body < more.size:
                    break
                lengths += more.unpack_from(data, body)
                body += more.size
            kind = _KINDS[code]
            end = body + sum(lengths)
            if len(data) < end:
                if end - start > _COPY_LIMIT:
                    # Received straight into its parts from here on, not copied twice.
                    memory = self._memory_for(length)
                    self._large = _LargeMessage(kind, number, lengths, memory)
                    self._large.take(data[body:])
                    return messages
                break
            parts = []
            for length in lengths:
                parts.append(data[body : body + length])
                body += length
            messages.append(Message(kind, parts, number))
            start = end
        self._received = data[start:]
        return messages

    def _memory_for(self, length: int) -> memoryview | bytearray:
        """Give memory for a part, that of an earlier one if nobody looks into it.

        To have the system make as many new pages costs more than to copy them.
        """
        if length > _SPARE_MOST:
            return bytearray(length)
        try:
            # Refused as long as there is a view of it. In this order, and it stays where
            # it is.
            self._spare.pop()
            self._spare.append(0)
        except BufferError:
            self._spare = bytearray(1)
        if len(self._spare) < length:
            self._spare = bytearray(length)
        return memoryview(self._spare)[:length]

    def _receive_large(self, large: _LargeMessage) -> list[Message]:
        # A peer that writes as fast as this reads would keep it in the call.
        count = self._end.recv_into(large.missing[0][:_READ_MOST])
        if not count:
            raise EOFError
        self.bytes_received += count
        large.advance(count)
        if large.missing:
            return []
        self._large = None
        return [Message(large.kind, large.parts, large.number)]


def frame(message: Message) -> list[Buffer]:
    """Give what is sent for a message: its head, then its parts."""
    kind, parts, number = message
    first, *others = map(len, parts) if parts else (0,)
    head = _HEAD.pack(kind, number, len(parts), first)
    return [head + _lengths(len(others)).pack(*others), *parts]


def unframe(data: bytes) -> Message | None:
    """Give the one message that some bytes are; None if they are not just one part."""
    if len(data) < _HEAD.size:
        return None
    code, number, count, length = _HEAD.unpack_from(data)
    if count != 1 or len(data) != _HEAD.size + length:
        return None
    return Message(_KINDS[code], [data[_HEAD.size :]], number)


@functools.lru_cache(maxsize=64)
def _lengths(count: int) -> struct.Struct:
    return struct.Struct(f"<{count}Q")


class _LargeMessage:
    """A message whose parts are allocated and arrive in place."""

    def __init__(
        self, kind: Kind, number: int, lengths: Sequence[int], memory: Buffer
    ) -> None:
        self.kind = kind
        self.number = number
        # A pickle comes first, and is copied when it is read. Of the buffers behind it
        # values are made without a copy.
        others = (bytearray(length) for length in lengths[1:])
        self.parts: list[Buffer] = [memory, *others]
        self.missing = deque(memoryview(part) for part in self.parts if part)

    def take(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            count = min(len(rest), len(self.missing[0]))
            self.missing[0][:count] = rest[:count]
            self.advance(count)
            rest = rest[count:]

    def advance(self, count: int) -> None:
        view = self.missing[0][count:]
        if view:
            self.missing[0] = view
        else:
            self.missing.popleft()
