"""An idle worker that callers use by themselves, while the dispatcher sleeps.

Runs in the parent, in callers' threads and in the dispatcher's. A job that comes alone
would wake the dispatcher twice, to be sent and to be answered. Instead its caller sends
it, and reads the answer if it waits for that in ``Future.result()``.

Ctrl-C may strike a caller anywhere in here. So each change of hands is one step that no
signal divides, and what a caller has left undone the dispatcher finds, when it wakes, in
the offer that stands.
"""

from __future__ import annotations

import math
import os
import select
import selectors
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import TYPE_CHECKING

from .._forks.ends import make_ends
from .._wire.calls import loads_result
from .._wire.channel import Channel, Kind, Message, frame, unframe
from .batches import messages_for
from .flag import seconds_to_sleep
from .job import Job

if TYPE_CHECKING:
    from selectors import EpollSelector
    from typing import TypeGuard

_MOST = 1 << 14  # bytes; a socket with room takes so few whole, or not at all
_SOON = 100_000  # nanoseconds of a job, whose answer is looked for again and again
_SPIN_SECONDS = 0.0002  # for so long, before its caller sleeps
_LONGEST_POLL = 1 << 30  # milliseconds; what poll() takes, a C int, is twice as long


class Offer:
    """One worker, for one job: the first that comes.

    Args:
        channel: The worker's; nothing is unsent on it, and no message incomplete.
        number: The worker's next job has it.
        answered: How many jobs callers have had answered since the dispatcher slept.
        nanoseconds: How long those have taken.
        told: The last of them and its answer, until its future has it.

    Attributes:
        taken: The job that has it, with its message.
        unsent: What the socket has not taken of that; None if it is not known.
        is_open: Whether a job may have it, or the next one after its answer.
        is_read: Whether a caller waits for the answer in place of the dispatcher.
        inbox: What that caller has received.
    """

    def __init__(
        self,
        channel: Channel,
        number: int,
        answered: int = 0,
        nanoseconds: int = 0,
        told: tuple[Job, Message] | None = None,
    ) -> None:
        self.channel = channel
        self.number = number
        self.answered = answered
        self.nanoseconds = nanoseconds
        self.told = told
        self.taken: tuple[Job, bytes] | None = None
        self.unsent: bytes | None = None
        self.is_open = True
        self.is_read = False
        self.inbox: list[bytes] = []

    @property
    def is_soon(self) -> bool:
        """Whether the answer is expected before a thread could fall asleep and wake."""
        return 0 < self.nanoseconds < self.answered * _SOON

    def take(self, job: Job) -> bool:
        """Send a job to the worker.

        Args:
            job: Nobody else knows it yet.

        Returns:
            Whether it is the worker's now.
        """
        if not self.is_open or self.taken is not None:
            return False
        (message,) = messages_for([job], self.number)
        data = b"".join(frame(message))
        if len(data) > _MOST:
            return False
        mine = job, data
        # Once more: a signal's handler, or a finalizer, may have submitted a job
        # meanwhile, for which the lock is no obstacle.
        if not self.is_open or self.taken is not None:
            return False
        # From here on it is the worker's. If it may not be sent, the dispatcher sends it
        # again: a worker passes over a job whose number it has seen.
        self.taken = mine
        job.take()
        self.unsent = self.channel.send_at_once(data)
        return True

    def followed(self) -> Offer | None:
        """Read the answer, and offer the worker anew.

        Returns:
            The offer that is to take the place of this one; None if something else has
            come than the result, and is for the dispatcher.
        """
        assert self.taken is not None  # noqa: S101 - or nobody would wait
        self.channel.receive_into(self.inbox)
        # The answer before may still be on its way to its future.
        if not self.is_open or len(self.inbox) != 1 or self.told is not None:
            return None
        message = unframe(self.inbox[0])
        if message is None or message.kind is not Kind.RESULT:
            return None
        self.channel.bytes_received += len(self.inbox[0])
        return Offer(
            self.channel,
            self.number + 1,
            self.answered + 1,
            self.nanoseconds + message.number,
            (self.taken[0], message),
        )


class Offers:
    """The offer that stands, if there is one.

    Args:
        lock: Held by whoever changes something in the offer that stands.
        selector: The dispatcher's.
        wake: Wakes the dispatcher.

    Attributes:
        standing: It.
    """

    def __init__(
        self,
        lock: AbstractContextManager[bool],
        selector: selectors.BaseSelector,
        wake: Callable[[], None],
    ) -> None:
        self._lock = lock
        self._wake = wake
        self._pid = os.getpid()
        self._handover = (
            _Handover(selector) if _Handover.is_possible(selector) else None
        )
        self.standing: Offer | None = None
        # Stands for the one caller that may wait: each ring wakes but one.
        self._reader: object | None = None

    def withdraw(self) -> Offer | None:
        """Take back what was offered: from now on it is the dispatcher's alone."""
        with self._lock:
            offer, self.standing = self.standing, None
        if offer is not None and offer.is_read and self._handover is not None:
            self._handover.take_back(offer.channel.fileno())
            self._handover.ring()
        return offer

    def read_answer(self, job: Job, timeout: float | None) -> float | None:
        """Read the answer of a job in the thread that waits for it, if that may be.

        Args:
            job: It.
            timeout: Seconds to wait at most; None for no bound.

        Returns:
            The seconds that are left.
        """
        offer, handover = self.standing, self._handover
        if offer is None or handover is None or offer.taken is None:
            return timeout
        if offer.taken[0] is not job or os.getpid() != self._pid:
            return timeout
        start = time.monotonic()
        try:
            if not self._read(job, offer, handover, timeout):
                self._wake()
        except BaseException:
            self._wake()
            raise
        return None if timeout is None else timeout - (time.monotonic() - start)

    def call_dispatcher(self) -> None:
        """Have the dispatcher see to a job that somebody has just asked for."""
        offer = self.standing
        # Read by another thread, which may be about to find the job asked for; or by one
        # that a signal has interrupted, as often as it may have been.
        if offer is not None and (offer.is_read or offer.told is not None):
            self._wake()

    def _read(
        self, job: Job, offer: Offer, handover: _Handover, timeout: float | None
    ) -> bool:
        """Read the answer, and say whether nothing is left to do for the dispatcher."""
        me = object()
        try:
            with self._lock:
                if self.standing is not offer or not offer.is_open or self._reader:
                    return True
                if offer.is_read:
                    return False  # by somebody who was interrupted
                self._reader = me
                offer.is_read = True
                # Looked at after that, against call_dispatcher().
                if job.is_asked_for():
                    return False
                wait = handover.give(offer.channel.fileno())
            wait(timeout, soon=offer.is_soon)
        finally:
            if self._reader is me:
                self._reader = None
        with self._lock:
            if self.standing is not offer:
                return True
            following = offer.followed()
            if following is None:
                return False
            handover.take_back(offer.channel.fileno())
            self.standing = following
        return self._settle(following)

    def _settle(self, offer: Offer) -> bool:
        assert offer.told is not None  # noqa: S101 - it was just read
        job, answer = offer.told
        if job.is_asked_for():
            return False  # callbacks are called in the dispatcher's thread
        try:
            result = loads_result(answer.parts)
        except BaseException:
            # Raised by the value or by a handler of a signal? The dispatcher, which no
            # signal reaches, tries it as well.
            self._wake()
            if job.exception() is None:
                raise
            return True
        if not job.end_unasked(result):
            return False
        offer.told = None
        return True

    def close(self) -> None:
        """Free what is kept for it: a future may be kept for long, and keeps this."""
        self._handover = None
        self._wake = _nothing


def _nothing() -> None: ...


class _Handover:
    """Switches who is woken by a channel: the dispatcher, asleep in epoll, or a caller.

    Linux alone tells a thread that sleeps of such a change. The end of the channel the
    dispatcher hears of in any case (epoll_ctl(2): EPOLLHUP).
    """

    def __init__(self, selector: selectors.EpollSelector) -> None:
        # Its own descriptor of the selector's epoll instance, which it will close.
        self._epoll = select.epoll.fromfd(os.dup(selector.fileno()))
        # Wakes the caller that waits, when the dispatcher has taken its place.
        self._bell, self._ear = make_ends()
        self._bell.setblocking(False)
        self._ear.setblocking(False)

    @staticmethod
    def is_possible(selector: selectors.BaseSelector) -> TypeGuard[EpollSelector]:
        """Say whether the selector is one that can be switched."""
        return isinstance(selector, getattr(selectors, "EpollSelector", ()))

    def give(self, descriptor: int) -> Callable[..., None]:
        """Let no message wake the dispatcher.

        Returns:
            Waits for a message, or for :meth:`ring`. It takes a timeout in seconds, None
            for no bound, and whether to expect the message at once.
        """
        self._epoll.modify(descriptor, 0)
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        poll.register(self._ear, select.POLLIN)

        def wait(timeout: float | None, *, soon: bool) -> None:
            ready: list[tuple[int, int]] = []
            if soon:
                end = time.monotonic() + _SPIN_SECONDS
                while not (ready := poll.poll(0)) and time.monotonic() < end:
                    os.sched_yield()  # the worker may have no other processor
            over = math.inf if timeout is None else time.monotonic() + timeout
            while not ready:
                seconds = seconds_to_sleep(over)
                ready = poll.poll(
                    None if seconds is None else min(seconds * 1e3, _LONGEST_POLL)
                )
                if time.monotonic() >= over:
                    break
            if any(found != descriptor for found, _ in ready):
                with suppress(OSError):
                    self._ear.recv(4096)

        return wait

    def take_back(self, descriptor: int) -> None:
        """Let messages wake the dispatcher again."""
        self._epoll.modify(descriptor, select.EPOLLIN)

    def ring(self) -> None:
        """Wake the caller that waits."""
        with suppress(OSError):  # it need not be told twice
            self._bell.send(b"\0")

    def __del__(self) -> None:
        # Not when the dispatcher ends: a caller may be about to wait, and the numbers of
        # the descriptors would soon be others'.
        for end in vars(self).values():  # fewer if there was no room for all
            end.close()
