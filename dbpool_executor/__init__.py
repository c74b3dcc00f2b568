"""A process executor for jobs that use SQLAlchemy.

Replace ``ProcessPoolExecutor`` by :class:`DBPoolExecutor`, give it a function that
makes an engine, and submit functions that use :data:`session`. Each job is one
transaction, and every future tells the truth about the database.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Its hooks defend what this process has open from now on, whatever else it imports.
from ._forks import hooks as hooks

if TYPE_CHECKING:
    from . import errors as errors
    from ._api.executor import DBPoolExecutor
    from ._dispatch.future import JobFuture
    from ._dispatch.stats import Stats
    from ._ledger.ledger import Ledger
    from ._ledger.results import STORED, Stored
    from ._worker.transaction import current_engine, session
    from .errors import (
        ArgumentsLostError,
        DBPoolError,
        ForkedConnectionError,
        JobExitedError,
        JobFailedError,
        JobTimeoutError,
        KeyReusedError,
        LedgerError,
        NotPlainError,
        NotStorableError,
        OpenConnectionsError,
        Outcome,
        OutcomeUnknownError,
        OutsideJobError,
        ResolveNotSupportedError,
        ResultLostError,
        TransactionAbortedError,
        WorkerDiedError,
        WorkerStartError,
        WorkLostError,
        outcome_of,
    )

__version__ = "0.1.0"

__all__ = [
    "STORED",
    "ArgumentsLostError",
    "DBPoolError",
    "DBPoolExecutor",
    "ForkedConnectionError",
    "JobExitedError",
    "JobFailedError",
    "JobFuture",
    "JobTimeoutError",
    "KeyReusedError",
    "Ledger",
    "LedgerError",
    "NotPlainError",
    "NotStorableError",
    "OpenConnectionsError",
    "Outcome",
    "OutcomeUnknownError",
    "OutsideJobError",
    "ResolveNotSupportedError",
    "ResultLostError",
    "Stats",
    "Stored",
    "TransactionAbortedError",
    "WorkLostError",
    "WorkerDiedError",
    "WorkerStartError",
    "current_engine",
    "outcome_of",
    "session",
]

# Where the names are that are not errors.
_HOMES = {
    "DBPoolExecutor": "._api.executor",
    "JobFuture": "._dispatch.future",
    "Ledger": "._ledger.ledger",
    "STORED": "._ledger.results",
    "Stats": "._dispatch.stats",
    "Stored": "._ledger.results",
    "current_engine": "._worker.transaction",
    "session": "._worker.transaction",
}


def __getattr__(name: str) -> Any:
    # Each name is imported when it is asked for, as in concurrent.futures: a worker
    # whose jobs import `session` has no use for what the parent runs.
    if name == "errors":
        return import_module(".errors", __name__)
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(_HOMES.get(name, ".errors"), __name__)
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "errors"})
