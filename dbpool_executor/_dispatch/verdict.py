"""What the parent concludes of jobs that were not answered as they should have been.

Runs in the parent. Every outcome that no worker has told is decided here, by functions
that read and change nothing.
"""

from __future__ import annotations

import signal
from typing import NamedTuple

from .._wire.channel import Message
from .._wire.exceptions import loads_exception, set_cause
from .._wire.options import JobOptions
from .._wire.phase import Phase, Progress
from ..errors import (
    DBPoolError,
    JobTimeoutError,
    Outcome,
    OutcomeUnknownError,
    ResultLostError,
    WorkerDiedError,
    describe_exit,
)

_KILLED = (
    "its worker was killed; a statement that was not cancelled before may go on on the "
    "server"
)
_OUR_SIGNALS = {-signal.SIGTERM, -getattr(signal, "SIGKILL", signal.SIGTERM)}


class Death(NamedTuple):
    """How a worker ended.

    Attributes:
        pid: Its process id, None if it is not known.
        exitcode: As in ``multiprocessing.Process.exitcode``; None if it is not to be had.
        killed_for: Why the executor itself has killed it, as a clause; None if it did
            not.
    """

    pid: int | None
    exitcode: int | None
    killed_for: str | None = None

    def __str__(self) -> str:
        """Say it in words, beginning with the worker."""
        return f"worker {self.pid} {describe_exit(self.exitcode, self.killed_for)}"


def death_of(pid: int | None, exitcode: int | None, killed_for: str | None) -> Death:
    """Say how a worker ended.

    Args:
        pid: As of a Death.
        exitcode: As of a Death.
        killed_for: Why the executor was about to kill it; None if it was not.

    Returns:
        The death. Another signal than those that the executor sends was faster.
    """
    is_another = exitcode is not None and exitcode < 0 and exitcode not in _OUR_SIGNALS
    return Death(pid, exitcode, None if is_another else killed_for)


def outcome_at_end(
    job_number: int, progress: Progress, *, read_only: bool = False
) -> Outcome:
    """Judge the first unanswered job of a worker whose channel has ended.

    Jobs are answered in order, so no later job of that worker has begun.

    Args:
        job_number: Which job in the worker's life it is, counted from 1.
        progress: What the worker's phase record says.
        read_only: Whether the database refuses to let the job write.

    Returns:
        NEVER_STARTED if it can go to another worker; else how it ended.
    """
    if progress.begun < job_number:
        return Outcome.NEVER_STARTED
    if read_only:  # whatever was lost, there is nothing of it in the database
        return Outcome.ROLLED_BACK
    return {
        Phase.RUNNING: Outcome.ROLLED_BACK,
        Phase.COMMITTING: Outcome.UNKNOWN,
        Phase.COMMITTED: Outcome.COMMITTED,
    }[progress.phase]


def error_at_end(
    death: Death, outcome: Outcome, *, timeout: float | None = None
) -> DBPoolError:
    """Give the error of the first unanswered job of a worker that died.

    Args:
        death: Of the worker.
        outcome: Of the job.
        timeout: The job's, if the worker was killed for it.
    """
    died = WorkerDiedError(death.exitcode, death.pid, outcome, death.killed_for)
    error: DBPoolError
    if timeout is not None:
        error = JobTimeoutError(timeout, outcome, _KILLED)
    elif outcome is Outcome.COMMITTED:
        error = ResultLostError(f"{death} before it was sent")
    elif outcome is Outcome.UNKNOWN:
        error = OutcomeUnknownError(str(death))
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
    death = Death(died.pid, died.exitcode, died.killed_for)
    timeout = unknown.timeout if isinstance(unknown, JobTimeoutError) else None
    return error_at_end(death, outcome, timeout=timeout)


def may_repeat(error: DBPoolError) -> bool:
    """Say whether a job that ends with its worker's death may be run again."""
    return isinstance(error, WorkerDiedError) and error.outcome is Outcome.ROLLED_BACK


def rolled_back(unknown: Message | DBPoolError) -> BaseException:
    """Give the error of a job of which it was not known, and is now, that it is undone.

    Args:
        unknown: What it would end with otherwise.
    """
    if isinstance(unknown, DBPoolError):
        return resolved_error(unknown, Outcome.ROLLED_BACK)
    error = loads_exception(unknown.parts)
    # Behind it stands what ended the contact.
    return error.__cause__ or error


def never_sent_error(killed_for: str | None) -> WorkerDiedError:
    """Give the error of a job that came back from a worker to a killed executor.

    Args:
        killed_for: Why the workers were killed.
    """
    return WorkerDiedError(None, None, Outcome.NEVER_STARTED, killed_for)


def lost_result_error(
    exc: BaseException, told: Outcome | None, options: JobOptions
) -> ResultLostError:
    """Give the error of a job whose result does not unpickle.

    Args:
        exc: What the unpickling raised.
        told: What the worker told of the job's own commits, None if nothing.
        options: The job's.
    """
    outcome = Outcome.ROLLED_BACK if options.read_only else told or Outcome.COMMITTED
    error = ResultLostError(f"unpickling it raised {exc!r}", outcome)
    set_cause(error, exc)
    return error
