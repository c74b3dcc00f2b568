"""Tells from a record of what ran when whether jobs waited for the wrong worker."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple


class Run(NamedTuple):
    """A job that ran; all times are of one clock, in seconds."""

    submitted: float
    worker: int
    begin: float
    end: float
    is_short: bool


def longest_unfair_wait(runs: list[Run], workers: Iterable[int]) -> float:
    """Give the longest time that a short job waited for a busy worker beside an idle one.

    A job waits from its submission until it begins, for the worker that will run it. A
    worker is busy from the begin of a job to its end. It is idle between the end of one
    of its jobs and the begin of its next; before its first job, from the first submission
    on; after its last job, until the last begin of any job.

    For each short job and each idle time of a worker that is not its own: how long,
    within that idle time, did the job wait while its own worker was busy? The greatest
    of these numbers is given. The short idle times of a worker that goes from job to job
    are not added up: in each of them it was about to take the job that was next.

    Args:
        runs: All jobs.
        workers: All workers, those included that never ran one.
    """
    by_worker: dict[int, list[Run]] = {worker: [] for worker in workers}
    for run in sorted(runs, key=lambda run: run.begin):
        by_worker[run.worker].append(run)
    first = min(run.submitted for run in runs)
    last = max(run.begin for run in runs)
    idle_times = []
    for worker, its in by_worker.items():
        edges = [first, *(edge for run in its for edge in run[2:4]), last]
        idle_times += [
            (stop - start, start, stop, worker)
            for start, stop in list(pairwise(edges))[::2]
        ]
    short = [run for run in runs if run.is_short]
    longest = 0.0
    # The longest first, so that nearly all others need no look.
    for length, start, stop, worker in sorted(idle_times, reverse=True):
        if length <= longest:
            break
        for run in short:
            wait = max(start, run.submitted), min(stop, run.begin)
            if run.worker != worker and wait[1] - wait[0] > longest:
                busy = sum(_overlap(wait, r[2:4]) for r in by_worker[run.worker])
                longest = max(longest, busy)
    return longest


def _overlap(one: tuple[float, float], other: tuple[float, float]) -> float:
    return max(0.0, min(one[1], other[1]) - max(one[0], other[0]))
