"""A process executor for jobs that use SQLAlchemy.

Replace ``ProcessPoolExecutor`` by :class:`DBPoolExecutor`, give it a function that
makes an engine, and submit functions that use :data:`session`. Each job is one
transaction, and every future tells the truth about the database.
"""

from ._database import current_engine, session
from ._executor import DBPoolExecutor
from ._stats import Stats
from .errors import (
    ArgumentsLostError,
    DBPoolError,
    JobExitedError,
    JobFailedError,
    JobTimeoutError,
    NotPlainError,
    OpenConnectionsError,
    Outcome,
    OutcomeUnknownError,
    OutsideJobError,
    ResolveNotSupportedError,
    ResultLostError,
    TransactionAbortedError,
    WorkerDiedError,
    WorkerStartError,
)

__all__ = [
    "ArgumentsLostError",
    "DBPoolError",
    "DBPoolExecutor",
    "JobExitedError",
    "JobFailedError",
    "JobTimeoutError",
    "NotPlainError",
    "OpenConnectionsError",
    "Outcome",
    "OutcomeUnknownError",
    "OutsideJobError",
    "ResolveNotSupportedError",
    "ResultLostError",
    "Stats",
    "TransactionAbortedError",
    "WorkerDiedError",
    "WorkerStartError",
    "current_engine",
    "session",
]
