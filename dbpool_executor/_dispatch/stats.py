"""Numbers of an executor.

Runs in the parent.
"""

from __future__ import annotations

from typing import NamedTuple


class Stats(NamedTuple):
    """What an executor is at and has done; a snapshot.

    Attributes:
        workers: Worker processes, those that start or leave included.
        idle: Workers without a job.
        queued: Jobs not yet sent to a worker, those to be repeated included.
        running: Workers with a job.
        done: Jobs that returned.
        failed: Jobs that ended with an exception.
        retried: Repetitions of jobs.
        died: Workers that ended without being told to.
        replaced: Workers that were started in place of one that had ended.
        stored: Calls that were not run, since the ledger had their results.
    """

    workers: int
    idle: int
    queued: int
    running: int
    done: int
    failed: int
    retried: int
    died: int
    replaced: int
    stored: int
