"""How far the jobs sent to a worker have come, readable after the worker's death.

Runs in both processes. The record is memory that both share: the worker writes which
job it has begun, and how far that one is; the parent writes which jobs it takes back. A
job is meant by its number in the worker's life, counted from 1.
"""

from __future__ import annotations

import enum
from collections.abc import MutableSequence
from typing import NamedTuple


class Phase(enum.IntEnum):
    """How far a job has come."""

    RUNNING = 1
    COMMITTING = 2  # a COMMIT has been sent, or is about to be
    COMMITTED = 3


_RUNNING = Phase.RUNNING.value


class Progress(NamedTuple):
    """What a record says.

    Attributes:
        begun: Number of the last job that was begun; 0 before the first.
        phase: Phase of that job.
    """

    begun: int
    phase: Phase


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
        self._words[0] = self._begun << 2 | phase

    def read(self) -> Progress:
        """Read the record, in either process."""
        word = self._words[0]
        return Progress(word >> 2, Phase(word & 3 or Phase.RUNNING))

    def note_xid(self, xid: int) -> None:
        """Note the id of the transaction that is about to be committed."""
        self._words[2] = xid

    def read_xid(self) -> int:
        """Read what the last job has noted, in either process; 0 if nothing."""
        return self._words[2]

    def recall(self, number: int) -> None:
        """Take back all jobs up to a number that have not begun.

        Which ones those are can be read after RECALL_DELAY, not at once: what one
        processor writes reaches the others a little later.
        """
        self._words[1] = number


WORDS = 3
"""Length of the array of a PhaseRecord."""

RECALL_DELAY = 0.001
"""Seconds after which every processor has seen a write; in truth it takes far less."""
