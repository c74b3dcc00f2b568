"""The channel: messages over a real pair of sockets.

No worker; the fork tests run in an interpreter of their own.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import select
import selectors
import socket
import subprocess
import sys
import threading
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pickle import PickleBuffer
from typing import TypeAlias, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dbpool_executor._forks.ends import make_ends
from dbpool_executor._wire.channel import Channel, Kind, Message
from dbpool_executor._worker.shared_channel import SharedChannel
from waiting import LONGEST

Ends: TypeAlias = tuple[socket.socket, socket.socket]
Channels: TypeAlias = tuple[Channel, Channel]

SECONDS = 30  # after it a wait has failed; nothing here takes that long
MIB = 1 << 20


@pytest.fixture
def ends() -> Iterator[Ends]:
    """Two connected sockets, closed at the end."""
    left, right = make_ends()
    yield left, right
    left.close()
    right.close()


@pytest.fixture
def channels(ends: Ends) -> Channels:
    """Two ends of a channel, neither of which blocks, as the parent's does not."""
    for end in ends:
        end.setblocking(False)
    return Channel(ends[0]), Channel(ends[1])


def is_readable(channel: Channel, timeout: float = 0.0) -> bool:
    """Say whether there is something to receive, be it the end."""
    return bool(select.select([channel], [], [], timeout)[0])


def received(channel: Channel, count: int) -> list[Message]:
    """Receive until there are `count` messages."""
    messages: list[Message] = []
    while len(messages) < count:
        assert is_readable(channel, SECONDS), f"{len(messages)} of {count} came"
        messages += channel.receive()
    return as_bytes(messages)


def received_until_end(channel: Channel) -> list[Message]:
    """Receive until the stream ends."""
    messages: list[Message] = []
    while True:
        assert is_readable(channel, SECONDS), "the end did not come"
        try:
            messages += channel.receive()
        except EOFError:
            return as_bytes(messages)


def as_bytes(messages: Iterable[Message]) -> list[Message]:
    """Give messages that compare as what they say."""
    return [
        Message(m.kind, [bytes(part) for part in m.parts], m.number) for m in messages
    ]


def encoded(messages: Sequence[Message]) -> bytes:
    """Give the bytes that a channel sends for some messages."""
    left, right = socket.socketpair()
    with left, right:
        left.setblocking(False)
        right.setblocking(False)
        channel, data = Channel(left), b""
        channel.send(*messages)
        channel.end_sending()
        while chunk := right.recv(1 << 16):
            data += chunk
            channel.flush()
    return data


SMALL = [
    Message(Kind.JOB, [b"call"], 1),
    Message(Kind.RETURNED, [], (1 << 64) - 1),
    Message(Kind.READY, []),
    Message(Kind.RESULT, [b""]),
    Message(Kind.FAILURE, [b"", b"text", b"", b""]),
    Message(Kind.START_FAILURE, [bytes(range(256)), b"\0"]),
]


@pytest.mark.parametrize("message", SMALL, ids=[sample.kind.name for sample in SMALL])
def test_message_arrives_as_it_was_sent(channels: Channels, message: Message) -> None:
    """Kind and parts come over, empty parts and no parts too."""
    mine, theirs = channels
    assert mine.send(message)
    assert received(theirs, 1) == [message]
    assert not is_readable(theirs)


def test_parts_may_be_any_buffer(channels: Channels) -> None:
    """What crosses are its bytes."""
    mine, theirs = channels
    numbers = PickleBuffer(array("I", range(4))).raw()
    mine.send(Message(Kind.RESULT, [bytearray(b"a"), memoryview(b"bc"), numbers]))
    assert received(theirs, 1) == [
        Message(Kind.RESULT, [b"a", b"bc", array("I", range(4)).tobytes()])
    ]


def test_one_read_gives_all_messages_that_are_there(channels: Channels) -> None:
    """Many small messages cost one call."""
    mine, theirs = channels
    for message in SMALL * 10:
        mine.send(message)
    mine.send(*SMALL * 10)
    assert as_bytes(theirs.receive()) == SMALL * 20
    assert theirs.receive() == []


def test_nothing_to_read_gives_no_message(channels: Channels) -> None:
    """An end that does not block says so by an empty list."""
    assert channels[0].receive() == []


def test_messages_may_be_cut_anywhere() -> None:
    """Wherever the bytes are cut in two, the same messages come, none too early."""
    data = encoded(SMALL)
    ends_of_messages = [len(encoded(SMALL[: n + 1])) for n in range(len(SMALL))]
    for offset in range(len(data) + 1):
        complete = sum(end <= offset for end in ends_of_messages)
        raw, end = socket.socketpair()
        with raw, end:
            end.setblocking(False)
            channel = Channel(end)
            raw.sendall(data[:offset])
            first = as_bytes(channel.receive())
            assert first == SMALL[:complete]
            raw.sendall(data[offset:])
            assert first + as_bytes(channel.receive()) == SMALL


def test_memory_of_a_large_part_is_used_again_once_nobody_has_it(
    channels: Channels,
) -> None:
    """What is still held keeps its bytes, also when a message is longer or shorter."""
    mine, theirs = channels
    held: list[Message] = []
    for fill, size in enumerate([MIB, 2 * MIB, MIB // 2, 3 * MIB], 1):
        mine.send(Message(Kind.RESULT, [bytes([fill]) * size, bytes([fill]) * MIB]))
        got: list[Message] = []
        while not got:
            assert is_readable(theirs, SECONDS), "the message did not come"
            got = theirs.receive()
            mine.flush()
        held += got
    for fill, (message, size) in enumerate(
        zip(held, [MIB, 2 * MIB, MIB // 2, 3 * MIB], strict=True), 1
    ):
        assert as_bytes([message])[0].parts == [
            bytes([fill]) * size,
            bytes([fill]) * MIB,
        ]


def test_large_messages_that_nobody_holds_share_memory(channels: Channels) -> None:
    """The second arrives where the first was."""
    mine, theirs = channels
    places = []
    for fill in (1, 2):
        mine.send(Message(Kind.RESULT, [bytes([fill]) * MIB]))
        got: list[Message] = []
        while not got:
            assert is_readable(theirs, SECONDS), "the message did not come"
            got = theirs.receive()
            mine.flush()
        (part,) = got[0].parts
        assert part == bytes([fill]) * MIB
        places.append(ctypes.addressof(ctypes.c_char.from_buffer(part)))
        del part, got
    assert places[0] == places[1]


@pytest.mark.parametrize(
    "sizes",
    [
        (1 << 16,),
        ((1 << 16) + 1,),
        (0, (1 << 16) + 1, 0),
        (MIB, 0, 1, MIB),
        (3, 1 << 16, 5, 1 << 17, 7),
        (1 << 15, 1 << 15, 1),
    ],
)
def test_large_parts_arrive_between_small_messages(
    channels: Channels, sizes: tuple[int, ...]
) -> None:
    """A part that needs many reads keeps its place and its neighbours."""
    mine, theirs = channels
    parts = [bytes([n + 1]) * size for n, size in enumerate(sizes)]
    large = Message(Kind.RESULT, parts, 7)
    sent = [Message(Kind.READY), large, Message(Kind.JOB, [b"next"]), large]
    mine.send(*sent[:3])
    mine.send(sent[3])
    got: list[Message] = []
    while len(got) < len(sent):
        assert is_readable(theirs, SECONDS), f"{len(got)} of {len(sent)} came"
        got += as_bytes(theirs.receive())
        mine.flush()
    assert got == as_bytes(sent)


def test_megabytes_cross_both_ways_at_once_without_deadlock(channels: Channels) -> None:
    """Neither end waits for the other to read before it reads itself."""
    payload = {c: bytes([n]) * (6 * MIB) for n, c in enumerate(channels)}
    got: dict[Channel, list[Message]] = {channel: [] for channel in channels}
    with selectors.DefaultSelector() as selector:
        for channel in channels:
            assert not channel.send(Message(Kind.RESULT, [b"head", payload[channel]]))
            events = selectors.EVENT_READ | selectors.EVENT_WRITE
            selector.register(channel, events, channel)
        while not all(got.values()):
            ready = selector.select(SECONDS)
            assert ready, "neither end can go on"
            for key, mask in ready:
                channel = key.data
                if mask & selectors.EVENT_WRITE and channel.flush():
                    selector.modify(channel, selectors.EVENT_READ, channel)
                if mask & selectors.EVENT_READ:
                    got[channel] += as_bytes(channel.receive())
    left, right = channels
    assert got[left] == [Message(Kind.RESULT, [b"head", payload[right]])]
    assert got[right] == [Message(Kind.RESULT, [b"head", payload[left]])]


def test_end_comes_after_all_messages(channels: Channels) -> None:
    """What was sent before the end is received before it."""
    mine, theirs = channels
    mine.send(*SMALL)
    assert mine.end_sending()
    assert received_until_end(theirs) == SMALL
    with pytest.raises(EOFError):
        theirs.receive()


@pytest.mark.parametrize("size", [100, 1 << 15, MIB])
def test_message_that_the_end_cuts_off_is_lost(ends: Ends, size: int) -> None:
    """A peer that dies while it sends leaves the messages before, and then the end."""
    raw, end = ends
    end.setblocking(False)
    data = encoded([Message(Kind.READY), Message(Kind.RESULT, [b"x" * size])])
    raw.sendall(data[: min(len(data) - 1, 1 << 17)])
    raw.close()
    assert received_until_end(Channel(end)) == [Message(Kind.READY, [])]


@pytest.mark.parametrize("size", [10, MIB])
def test_answer_of_a_peer_that_died_with_unread_data_is_read(
    channels: Channels, size: int
) -> None:
    """The system resets such a stream; what the peer had said still counts."""
    mine, theirs = channels
    mine.send(Message(Kind.JOB, [b"x" * size]))
    theirs.send(Message(Kind.RESULT, [b"answer"]))
    theirs.close()
    assert received_until_end(mine) == [Message(Kind.RESULT, [b"answer"])]


def test_peer_that_is_gone_counts_as_nothing_left_to_send(channels: Channels) -> None:
    """Sending never raises: that the peer is gone is told by reading."""
    mine, theirs = channels
    assert not mine.send(Message(Kind.JOB, [b"x" * 8 * MIB]))
    theirs.close()
    assert mine.flush()
    assert mine.send(Message(Kind.JOB, [b"x" * MIB]))
    assert mine.end_sending()
    with pytest.raises(EOFError):
        mine.receive()


def test_end_waits_for_what_is_unsent(channels: Channels) -> None:
    """Told to end with megabytes unsent, an end sends them first."""
    mine, theirs = channels
    parts = [b"x" * (8 * MIB)]
    assert not mine.send(Message(Kind.JOB, parts))
    assert not mine.end_sending()
    got: list[Message] = []
    while not mine.flush():
        got += theirs.receive()
    assert as_bytes(got) + received_until_end(theirs) == [Message(Kind.JOB, parts)]


def test_end_of_sending_leaves_the_other_direction_open(channels: Channels) -> None:
    """A worker that was told of no more jobs still answers those it has."""
    mine, theirs = channels
    mine.end_sending()
    theirs.send(Message(Kind.RESULT, [b"late"]))
    assert received(mine, 1) == [Message(Kind.RESULT, [b"late"])]


def test_ends_block_whatever_default_timeout_the_program_has_set() -> None:
    """A program's ``socket.setdefaulttimeout()`` means its own sockets."""
    socket.setdefaulttimeout(5)
    try:
        ends = make_ends()
    finally:
        socket.setdefaulttimeout(None)
    with ends[0], ends[1]:
        assert [end.gettimeout() for end in ends] == [None, None]


KINDS = st.sampled_from(Kind)
PART = st.binary(max_size=300) | st.builds(
    lambda fill, size: bytes([fill]) * size,
    st.integers(0, 255),
    st.sampled_from([1 << 12, 1 << 16, (1 << 16) + 1, 3 << 16]),
)
NUMBERS = st.integers(0, (1 << 64) - 1)
MESSAGES = st.lists(
    st.builds(Message, KINDS, st.lists(PART, max_size=4), NUMBERS), max_size=6
)


@settings(max_examples=60, deadline=None)
@given(messages=MESSAGES, cuts=st.lists(st.integers(0, 1 << 20), max_size=12))
def test_messages_survive_any_division_into_reads(
    messages: list[Message], cuts: list[int]
) -> None:
    """Random messages arrive the same in random pieces."""
    data = encoded(messages)
    whole = range(0, len(data), 1 << 15)  # a socket takes no more at once
    places = sorted({*whole, *(cut % (len(data) + 1) for cut in cuts), len(data)})
    raw, end = socket.socketpair()
    with raw, end:
        end.setblocking(False)
        channel = Channel(end)
        got: list[Message] = []
        for start, stop in itertools.pairwise(places):
            raw.sendall(data[start:stop])
            while is_readable(channel):
                got += channel.receive()
    assert as_bytes(got) == messages


@settings(max_examples=30, deadline=None)
@given(messages=MESSAGES)
def test_messages_survive_a_slow_reader(messages: list[Message]) -> None:
    """Random messages arrive the same when the sender has to wait for room."""
    left, right = socket.socketpair()
    with left, right:
        left.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 12)
        left.setblocking(False)
        right.setblocking(False)
        mine, theirs, got = Channel(left), Channel(right), []
        mine.send(*messages)
        mine.end_sending()
        while not mine.flush():
            got += theirs.receive()
        assert as_bytes(got) + received_until_end(theirs) == messages


# -- Forked copies --------------------------------------------------------------

PRELUDE = """
import os, select
from dbpool_executor._wire.channel import Channel, Kind, Message
from dbpool_executor._forks.ends import kept_by_child, make_ends

mine, theirs = make_ends()
other, others = make_ends()
asleep, alarm = os.pipe()  # the child lives until the parent closes the alarm
told, tell = os.pipe()

def forked(kept=None):
    if kept is None:
        pid = os.fork()
    else:
        with kept_by_child(kept):
            pid = os.fork()
    if pid:
        os.close(tell)
        return True
    os.close(alarm)
    return False

def ends_within(channel, seconds):
    readable, _, _ = select.select([channel], [], [], seconds)
    if not readable:
        return False
    try:
        return channel.receive() == "never"
    except EOFError:
        return True
"""

FINALE = """
for end in (mine, theirs, other, others):
    end.close()
"""

SIBLING = """
if forked():
    assert os.read(told, 1) == b"."
    theirs.close()
    others.close()
    print(ends_within(Channel(mine), 20), ends_within(Channel(other), 20))
    os.close(alarm)
    os.wait()
else:
    os.write(tell, b".")
    os.read(asleep, 1)
    os._exit(0)
"""

KEPT = """
if forked(theirs):
    theirs.close()
    others.close()
    channel = Channel(mine)
    print(ends_within(Channel(other), 20), ends_within(channel, 0))
    channel.send(Message(Kind.JOB, [b"call"]))
    while not (messages := channel.receive()):
        pass
    print(messages[0].parts)
    mine.close()
    print(os.read(told, 8))
    os.wait()
else:
    worker = Channel(theirs)
    while not (messages := worker.receive()):
        pass
    worker.send(Message(Kind.RESULT, messages[0].parts))
    print_end = ends_within(worker, 20)
    os.write(tell, b"ended" if print_end else b"hangs")
    os._exit(0)
"""

GRANDCHILD = """
if forked(theirs):
    theirs.close()
    print(os.read(told, 8))
    print(ends_within(Channel(mine), 20))
    os.close(alarm)
    os.wait()
else:
    if os.fork() == 0:  # a job that forks
        os.write(tell, b"forked")
        os.read(asleep, 1)
    os._exit(0)
"""


def output_of(script: str) -> list[str]:
    """Run a program in an interpreter of its own and give what it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PRELUDE + script + FINALE],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stderr, done.returncode) == ("", 0)
    return done.stdout.split("\n")[:-1]


def test_forked_copy_of_the_parent_holds_no_end_open() -> None:
    """The end of a worker is seen while a stranger that was forked lives on."""
    assert output_of(SIBLING) == ["True True"]


def test_forked_worker_holds_its_own_end_only() -> None:
    """It keeps the end that is its own, works with it, and sees it end."""
    assert output_of(KEPT) == ["True False", "[b'call']", "b'ended'"]


def test_child_that_a_job_forked_does_not_hide_the_end_of_its_worker() -> None:
    """A worker's death is seen although a process that its job forked lives on."""
    assert output_of(GRANDCHILD) == ["b'forked'", "True"]


def test_message_that_is_sent_in_the_middle_of_another_comes_after_it() -> None:
    """As when garbage collection logs, in the very thread that sends an answer."""
    mine, theirs = socket.socketpair()
    logged = Message(Kind.LOG, [b"logged"])
    answer = Message(Kind.RESULT, [b"pickle", bytes(100_000)])

    class Interrupted:
        """Sends little at once, and is interrupted after each bit."""

        def send(self, data: memoryview) -> int:
            sent = mine.send(data[:20_000])
            if sum(calls) < 3:
                calls.append(1)
                channel.send(logged)
            return sent

    calls: list[int] = []
    channel = SharedChannel(cast(socket.socket, Interrupted()))
    with mine, theirs:
        reader = Channel(theirs)
        channel.send(answer)
        channel.drain()
        received: list[Message] = []
        while len(received) < 4:
            received += reader.receive()
    kinds = [message.kind for message in received]
    assert kinds == [Kind.RESULT, Kind.LOG, Kind.LOG, Kind.LOG]
    assert [bytes(part) for part in received[0].parts] == answer.parts
    assert all(bytes(message.parts[0]) == b"logged" for message in received[1:])


def test_drain_waits_for_what_another_thread_is_sending() -> None:
    """A worker must not end while a record of another thread is half sent."""
    mine, theirs = socket.socketpair()
    channel, reader = SharedChannel(mine), Channel(theirs)
    with mine, theirs:
        large = Message(Kind.LOG, [bytes(10 * MIB)])
        sender = threading.Thread(target=channel.send, args=(large,))
        sender.start()
        assert select.select([theirs], [], [], LONGEST)[0]  # its first bytes
        channel.send(Message(Kind.RESULT))
        leaver = threading.Thread(target=lambda: (channel.drain(), mine.close()))
        leaver.start()
        kinds: list[Kind] = []
        with contextlib.suppress(EOFError):
            while True:
                kinds += [message.kind for message in reader.receive()]
        sender.join(LONGEST)
        leaver.join(LONGEST)
    assert kinds == [Kind.LOG, Kind.RESULT]
