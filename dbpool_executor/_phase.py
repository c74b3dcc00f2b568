"""How far the job that a worker runs has come, readable after the worker's death.

Runs in both processes. The record is one word of memory that both share, written by
the worker and read by the parent.
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


class Progress(NamedTuple):
    """What a record says: the last job that was begun, and how far it came.

    Attributes:
        begun: How many jobs the worker has begun in its life.
        phase: Phase of the last of them.
    """

    begun: int
    phase: Phase


class PhaseRecord:
    """The shared word.

    Args:
        word: An array of one unsigned 64-bit number, shared by both processes. It is
            written whole: an aligned word is never seen half-written.
    """

    def __init__(self, word: MutableSequence[int]) -> None:
        self._word = word
        self._begun = 0

    def begin(self) -> None:
        """Note that the next job begins."""
        self._begun += 1
        self.advance(Phase.RUNNING)

    def advance(self, phase: Phase) -> None:
        """Note the phase of the job that was begun last."""
        self._word[0] = self._begun << 2 | phase

    def read(self) -> Progress:
        """Read the record, in either process."""
        word = self._word[0]
        return Progress(word >> 2, Phase(word & 3 or Phase.RUNNING))
