"""An idle worker to which a caller may send a job by itself.

Runs in the parent, in callers' threads and in the dispatcher's. It saves a job that
comes alone one of its two ways through the dispatcher's thread.
"""

from __future__ import annotations

from ._channel import Channel, Kind, Message, frame
from ._job import Job

_MOST = 1 << 14  # bytes; a socket with room takes so few whole, or not at all


class Offer:
    """One worker, for one job: the first that comes.

    A caller may be interrupted by Ctrl-C anywhere in here. So a job takes the worker in
    one step, the append to a list; and what is not known to be sent, the dispatcher
    sends again: a worker passes over a job whose number it has seen.

    Args:
        channel: The worker's; nothing is unsent on it.
        number: The worker's next job has it.
    """

    def __init__(self, channel: Channel, number: int) -> None:
        self._channel = channel
        self._number = number
        # The first has it, with its message; None is the dispatcher.
        self._takers: list[tuple[Job, bytes] | None] = []
        self._unsent: bytes | None = None  # of that message; None if it is not known

    @property
    def is_taken(self) -> bool:
        """Whether somebody has it."""
        return bool(self._takers)

    @property
    def is_sent(self) -> bool:
        """Whether all of the job's message is known to be sent."""
        return self._unsent == b""

    def take(self, job: Job) -> bool:
        """Send a job to the worker.

        Args:
            job: Nobody else knows it yet.

        Returns:
            Whether it is the worker's now.
        """
        if self._takers:
            return False
        data = b"".join(frame(Message(Kind.JOB, job.parts, self._number)))
        if len(data) > _MOST:
            return False
        mine = job, data
        self._takers.append(mine)
        if self._takers[0] is not mine:
            return False
        job.take()
        self._unsent = self._channel.send_at_once(data)
        return True

    def withdraw(self) -> tuple[Job, bytes] | None:
        """Take the worker back.

        Returns:
            The job that has it by now, and what may be unsent of its message; None if
            there is none.
        """
        self._takers.append(None)
        taker = self._takers[0]
        if taker is None:
            return None
        job, data = taker
        job.number = self._number
        return job, data if self._unsent is None else self._unsent
