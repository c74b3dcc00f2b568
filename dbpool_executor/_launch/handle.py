"""What the dispatcher needs of a worker, wherever that runs.

Runs in the parent. A worker is known by a number of ours: process ids are used again, and
those of two machines collide.
"""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator
from typing import Protocol

from .._wire.channel import Channel
from .._wire.phase import Progress, Transaction
from .._wire.short_answers import AnswerReader

KILL = getattr(signal, "SIGKILL", signal.SIGTERM)
"""The signal that no process survives."""

worker_numbers: Iterator[int] = itertools.count(1)
"""Numbers the workers of this process, in the order of their start."""


class HasFileno(Protocol):
    """What a selector takes."""

    def fileno(self) -> int:
        """Give the descriptor."""


class WorkerHandle(Protocol):
    """One worker, as the dispatcher holds it.

    To make one may be no more than to ask for a worker. That it is there the channel
    tells, by :attr:`Kind.READY`, or that it will never be, by its end.

    Attributes:
        number: Names the worker in this process; no other one has or had it.
        channel: Jobs go out here, and answers come in.
        answers: Short answers come in here.
    """

    number: int
    channel: Channel
    answers: AnswerReader

    @property
    def pid(self) -> int | None:
        """The process id, for logs and errors alone; None as long as it is not known."""

    @property
    def end(self) -> HasFileno | None:
        """What becomes readable when the process has ended.

        None if nothing does, and the end of the channel alone tells.
        """

    @property
    def bytes_received(self) -> int:
        """Of all its answers."""

    def progress(self) -> Progress:
        """Read the phase record, also after the worker's death."""

    def transaction(self) -> Transaction:
        """Read which transaction the worker was about to commit, also when it died."""

    def recall(self, number: int) -> None:
        """Take back the jobs up to a number, see :meth:`PhaseRecord.recall`."""

    def stop(self, number: int = KILL) -> float:
        """End the worker, each call by a stronger means.

        The first asks it to cancel its statements on the server and to end; the next
        sends it the signal, and the children of its jobs too; those after, SIGKILL.
        From the first on it begins no job and no COMMIT.

        Args:
            number: The signal by which it is to end.

        Returns:
            Seconds to wait before the next call, unless it has ended by then.
        """

    def kill(self) -> None:
        """End the worker at once, by SIGKILL."""

    def bury(self) -> int | None:
        """Free what is left of a worker that has ended, or whose channel has.

        Returns:
            The exit code, as in ``multiprocessing.Process.exitcode``; None if it is not
            to be had.
        """
