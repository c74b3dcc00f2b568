"""Jobs that failed and are to be repeated, each at its time.

Runs in the parent, in the dispatcher's thread.
"""

from __future__ import annotations

import heapq
import itertools
import random
import time

from .._wire.channel import Message
from .._wire.exceptions import text_of_failure
from . import pace
from .guarded_log import log
from .job import Job, Told


class Repeats:
    """The jobs that wait for their next attempt."""

    def __init__(self) -> None:
        # A heap by the time on time.monotonic(); no two have the same number.
        self._entries: list[tuple[float, int, Job, Told]] = []
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, job: Job, told: Told) -> None:
        """Have a job wait, longer each time.

        Args:
            job: It has failed at least once.
            told: What it failed with last.
        """
        delay = pace.delay_before_repeat(job.attempts, random.random())  # noqa: S311
        entry = (time.monotonic() + delay, next(self._numbers), job, told)
        heapq.heappush(self._entries, entry)
        log.info(
            "job %s in worker %s failed at attempt %d of %d, again in %.2f s: %s",
            job.label,
            job.worker,
            job.attempts,
            job.options.retries + 1,
            delay,
            text_of_failure(told.parts) if isinstance(told, Message) else told,
        )

    def due(self) -> list[Job]:
        """Give the jobs whose time has come; they wait here no more."""
        now = time.monotonic()
        jobs = []
        while self._entries and self._entries[0][0] <= now:
            jobs.append(heapq.heappop(self._entries)[2])
        return jobs

    def seconds_until_due(self) -> float | None:
        """Say when the first one is; None if there is none."""
        if not self._entries:
            return None
        return max(0.0, self._entries[0][0] - time.monotonic())

    def give_up(self) -> list[tuple[Job, Told]]:
        """Give all jobs with what they failed with, which is the last word now."""
        entries, self._entries = self._entries, []
        return [(job, told) for *_, job, told in entries]
