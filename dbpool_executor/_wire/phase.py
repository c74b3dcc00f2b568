"""How far the jobs sent to a worker have come, readable after the worker's death.

Runs in both processes. The record is memory that both share: the worker writes which
job it has begun, and how far that one is; the parent writes which jobs it takes back. A
job is meant by its number in the worker's life, counted from 1.
"""

from __future__ import annotations

import enum
import time
from collections.abc import MutableSequence
from typing import NamedTuple


class Phase(enum.IntEnum):
    """How far a job has come."""

    RUNNING = 1
    COMMITTING = 2  # a COMMIT has been sent, or is about to be
    COMMITTED = 3


_RUNNING = Phase.RUNNING.value
_COMMITTING = Phase.COMMITTING
_ALL = (1 << 64) - 1  # all jobs


class Progress(NamedTuple):
    """What a record says.

    Attributes:
        begun: Number of the last job that was begun; 0 before the first.
        phase: Phase of that job.
        has_own_commit: Whether that job may have committed something by itself, before
            the COMMIT at its end.
    """

    begun: int
    phase: Phase
    has_own_commit: bool = False


class Transaction(NamedTuple):
    """A transaction of PostgreSQL, by what no other has.

    Attributes:
        xid: Its id; 0 if none was noted.
        server: Identifier of the server's data, which its standbys have too.
        timeline: Of the server; 0 if it does not tell.
    """

    xid: int = 0
    server: int = 0
    timeline: int = 0


class PhaseRecord:
    """The shared memory of one worker and its parent.

    Args:
        words: An array of :data:`WORDS` unsigned 64-bit numbers. Each has one writer,
            and is written whole: an aligned word is never seen half-written.
    """

    def __init__(self, words: MutableSequence[int]) -> None:
        self._words = words
        self._begun = 0

    def begin(self, number: int) -> bool:
        """Note that a job begins, unless it was taken back.

        Returns:
            Whether it was not; otherwise it must not be run.
        """
        # First written, then read, against recall(), which writes first and has
        # begun() read a while later: at least one of the two sees the other.
        self._begun = number
        words = self._words
        words[0] = number << 2 | _RUNNING
        return number > words[1]

    def advance(self, phase: Phase) -> None:
        """Note the phase of the job that was begun last."""
        words = self._words
        before, words[0] = words[0], self._begun << 2 | phase
        # First written, then read, against stop(), which writes first and then reads how
        # far the job is: so no COMMIT begins that stop() has not seen.
        if words[3] and phase is _COMMITTING:
            words[0] = before
            self.hold_if_stopped()

    def stop(self, number: int) -> None:
        """Have the worker begin no more jobs and no COMMIT, in either process.

        Args:
            number: The signal by which it is about to be ended.
        """
        self._words[3] = number
        self._words[1] = _ALL

    def stop_signal(self) -> int:
        """Read by which signal the worker is about to be ended; 0 if it goes on."""
        return self._words[3]

    def hold_if_stopped(self) -> None:
        """Wait for the end of the process, if the worker is about to be ended.

        What its job does from there on is the fault of who ends it, and told by nobody.
        """
        while self._words[3]:
            time.sleep(1.0)

    def read(self) -> Progress:
        """Read the record, in either process."""
        word = self._words[0]
        begun, phase = word >> 2, Phase(word & 3 or Phase.RUNNING)
        return Progress(begun, phase, 0 < begun == self._words[6])

    def note_own_commit(self, *, happened: bool = True) -> None:
        """Note that the job may commit by itself; or take back that it may have."""
        self._words[6] = self._begun if happened else 0

    def note_xid(self, xid: int, server: int = 0, timeline: int = 0) -> None:
        """Note the transaction that is about to be committed, as Transaction has it."""
        words = self._words
        words[4], words[5] = server, timeline
        words[2] = xid

    def read_transaction(self) -> Transaction:
        """Read what the last job has noted, in either process."""
        return Transaction(self._words[2], self._words[4], self._words[5])

    def recall(self, number: int) -> None:
        """Take back all jobs up to a number that have not begun.

        Which ones those are can be read after RECALL_DELAY, not at once: what one
        processor writes reaches the others a little later.
        """
        if not self._words[3]:
            self._words[1] = number


WORDS = 7
"""Length of the array of a PhaseRecord."""

RECALL_DELAY = 0.001
"""Seconds after which every processor has seen a write; in truth it takes far less."""
