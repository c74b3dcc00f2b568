"""What the end of a worker means for the jobs that it had.

Runs in the parent.
"""

from __future__ import annotations

from typing import NamedTuple

from .._wire.exceptions import set_cause
from .._wire.phase import Phase, Progress, Transaction
from ..errors import (
    DBPoolError,
    JobTimeoutError,
    Outcome,
    OutcomeUnknownError,
    ResultLostError,
    WorkerDiedError,
    describe_exit,
)
from .job import Job

_KILLED = (
    "its worker was killed; a statement that was not cancelled before may go on on the "
    "server"
)


class Ending(NamedTuple):
    """What the end of a worker means for its jobs.

    Attributes:
        again: The jobs to send again.
        job: The one that ended with it, if any.
        error: What that job ended with.
        transaction: The one that it was about to commit, if it has noted it.
    """

    again: list[Job]
    job: Job | None = None
    error: DBPoolError | None = None
    transaction: Transaction = Transaction()


def error_at_end(died: WorkerDiedError, *, timeout: float | None = None) -> DBPoolError:
    """Give the error of the job that a worker had begun when it died.

    Args:
        died: How it died, and the outcome of the job.
        timeout: The job's, if the worker was killed for it.
    """
    how = f"worker {died.pid} {describe_exit(died.exitcode)}"
    error: DBPoolError
    if timeout is not None:
        error = JobTimeoutError(timeout, died.outcome, _KILLED)
    elif died.outcome is Outcome.COMMITTED:
        error = ResultLostError(f"{how} before it was sent")
    elif died.outcome is Outcome.UNKNOWN:
        error = OutcomeUnknownError(how)
    else:
        return died
    set_cause(error, died)
    return error


def resolved_error(unknown: DBPoolError, outcome: Outcome) -> DBPoolError:
    """Give the error of a job whose worker died during COMMIT, now that it is known.

    Args:
        unknown: What it would end with otherwise.
        outcome: What the server says of its transaction.
    """
    died = unknown.__cause__
    if outcome is Outcome.UNKNOWN or not isinstance(died, WorkerDiedError):
        return unknown
    known = WorkerDiedError(died.exitcode, died.pid, outcome)
    timeout = unknown.timeout if isinstance(unknown, JobTimeoutError) else None
    return error_at_end(known, timeout=timeout)


def outcome_at_end(job_number: int, progress: Progress) -> Outcome:
    """Judge the first unanswered job of a worker whose channel has ended.

    Jobs are answered in order, so no later job of that worker has begun.

    Args:
        job_number: Which job in the worker's life it is, counted from 1.
        progress: What the worker's phase record says.

    Returns:
        NEVER_STARTED if it can go to another worker; else how it ended.
    """
    if progress.begun < job_number:
        return Outcome.NEVER_STARTED
    return {
        Phase.RUNNING: Outcome.ROLLED_BACK,
        Phase.COMMITTING: Outcome.UNKNOWN,
        Phase.COMMITTED: Outcome.COMMITTED,
    }[progress.phase]
