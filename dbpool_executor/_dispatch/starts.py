"""Starts of workers that fail: when the next one is tried, and when none is any more.

Runs in the parent, in the dispatcher's thread.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

from .._wire.calls import Buffer
from .._wire.channel import Stage
from .._wire.exceptions import loads_exception, set_cause
from ..errors import WorkerStartError
from . import pace
from .guarded_log import log

LEAVE_GRACE = 5.0
"""Seconds for a worker that has only to leave to dispose its engine and end; and, once
jobs are cancelled, for one to start."""

_LOG_EVERY = 60.0  # seconds, while failures may pass
_OVERDUE = {
    Stage.IMPORT: "its imports did not end",
    Stage.FACTORY: "the engine factory did not return",
    Stage.INITIALIZER: "the initializer did not return",
}


class StartLimits(NamedTuple):
    """How long starts may take.

    Attributes:
        stage: Seconds for each stage of one; None for no bound.
        patience: Seconds for which an error that may pass is no reason to give up.
    """

    stage: float | None = 60.0
    patience: float = 300.0


DEFAULT_LIMITS = StartLimits()


class Failure(NamedTuple):
    """Why workers cannot start: in words, and as an exception to be rebuilt."""

    text: str
    attempts: int
    parts: Sequence[Buffer] | None

    def error(self) -> WorkerStartError:
        """Make an error object, so that each future has its own."""
        error = WorkerStartError(self.text, self.attempts)
        if self.parts is not None:
            set_cause(error, loads_exception(self.parts))
        return error


class Starts:
    """What is known of the starts of one executor's workers.

    Args:
        limits: How long they may take.

    Attributes:
        failure: Why the executor is broken; set once.
        gave_up: Why nothing waits for a worker any more, once jobs are cancelled.
        is_hurried: Whether jobs are cancelled, so that nothing waits long for a start.
        next_at: No start before it, on time.monotonic().
    """

    def __init__(self, limits: StartLimits) -> None:
        self._limits = limits
        self.failure: Failure | None = None
        self.gave_up: str | None = None
        self.is_hurried = False
        self.next_at = 0.0
        self._lasting = self._passing = 0  # that failed since one has not
        self._since = 0.0  # the first of them, on time.monotonic()
        self._tries = 0  # since then
        self._log_at = 0.0

    @property
    def are_over(self) -> bool:
        """Whether no worker will be started any more."""
        return self.failure is not None or self.gave_up is not None

    @property
    def have_failed(self) -> bool:
        """Whether workers have failed to start since one has not."""
        return bool(self._lasting or self._passing)

    def are_delayed(self) -> bool:
        """Say whether the next start has to wait."""
        return self.have_failed and time.monotonic() < self.next_at

    def seconds_for_stage(self) -> float | None:
        """Say how long a stage may take that begins now; None for no bound."""
        seconds = self._limits.stage
        if self.is_hurried:
            return LEAVE_GRACE if seconds is None else min(LEAVE_GRACE, seconds)
        return seconds

    def overdue_text(self, stage: Stage) -> str:
        """Say of a start what has taken too long."""
        if self.is_hurried:
            return (
                f"{_OVERDUE[stage]} within {LEAVE_GRACE:g} s, and jobs that wait are "
                "cancelled"
            )
        return f"{_OVERDUE[stage]} within {self._limits.stage:g} s (start_timeout)"

    def note_start(self) -> None:
        """Note that one begins: the next waits longer, as long as they fail."""
        if self.have_failed:
            self._put_off_next(time.monotonic())

    def note_ready(self) -> None:
        """Note that one has succeeded."""
        if self._passing:
            seconds = time.monotonic() - self._since
            log.info("workers can start again, after %.0f s", seconds)
        self._lasting = self._passing = self._tries = 0
        self._log_at = 0.0

    def note_failure(
        self, text: str, parts: Sequence[Buffer] | None, *, may_pass: bool, able: int
    ) -> None:
        """Note that one has failed, and decide what follows.

        Args:
            text: What it raised, or how it ended.
            parts: The same as an exception, if there is one.
            may_pass: Whether it is an error of a database that may pass.
            able: Workers that are ready, whether idle or not. Once jobs are cancelled
                also those that may still become it.
        """
        now = time.monotonic()
        is_first = not self.have_failed
        if is_first:
            self._since = now
        self._passing += may_pass
        self._lasting += not may_pass
        if self.are_over:
            return
        if self.is_hurried and not able:
            self.gave_up = f"no worker could start for the jobs that waited ({text})"
            log.warning("%s", self.gave_up)
            return
        patience = self._limits.patience
        if pace.are_starts_given_up(
            lasting=self._lasting,
            passing=self._passing,
            seconds=now - self._since,
            patience=patience,
            able=able,
        ):
            if may_pass and patience:
                text += f", for {patience:g} s (connect_patience)"
            self.failure = Failure(text, self._lasting + self._passing, parts)
            log.error("the executor is broken: %s", self.failure.error())
            return
        if is_first:
            self._put_off_next(now)
        self._log(text, now, may_pass=may_pass)

    def _put_off_next(self, now: float) -> None:
        self._tries += 1
        left = self._limits.patience - (now - self._since)
        self.next_at = now + pace.delay_before_start(self._tries, left)

    def _log(self, text: str, now: float, *, may_pass: bool) -> None:
        if not may_pass:
            delay = max(0.0, self.next_at - now)
            log.warning(
                "a worker failed to start (%s), next try in %.1f s", text, delay
            )
        elif now >= self._log_at:
            self._log_at = now + _LOG_EVERY
            left = self._limits.patience - (now - self._since)
            until = f" for {left:.0f} s" if left > 0 else ""
            log.warning(
                "a worker failed to start (%s), which may pass; jobs wait, and it is "
                "tried again%s",
                text,
                until,
            )
