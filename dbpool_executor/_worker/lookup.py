"""Asks PostgreSQL what became of a transaction.

Runs in a worker: in the one whose COMMIT lost contact, or as a job of another one after
the worker that committed has died.
"""

from __future__ import annotations

import time

from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from ..errors import Outcome

_PATIENCE = 10.0  # seconds for the server to come back and the transaction to end
_PAUSE = 0.1  # seconds between two questions

# PostgreSQL documentation, "Transaction ID and Snapshot Information Functions".
_CURRENT = text("SELECT CAST(pg_current_xact_id_if_assigned() AS text)")
_STATUS = text("SELECT pg_xact_status(CAST(:xid AS xid8))")
_OUTCOMES = {"committed": Outcome.COMMITTED, "aborted": Outcome.ROLLED_BACK}

NOTHING_WRITTEN = 1  # "BootstrapTransactionId", which no transaction of ours has
"""In place of a transaction's id: it has none, so COMMIT has nothing to store."""


def current_xid(session: Session) -> int:
    """Give the id of a session's transaction, or NOTHING_WRITTEN."""
    return int(session.execute(_CURRENT).scalar_one() or NOTHING_WRITTEN)


def outcome_of(engine: Engine, xid: int) -> Outcome:
    """Ask what became of a transaction, over a fresh connection.

    Args:
        engine: Of the same server.
        xid: From :func:`current_xid`.

    Returns:
        COMMITTED or ROLLED_BACK; UNKNOWN if the server does not answer in time, or
        remembers it no more.
    """
    if xid == NOTHING_WRITTEN:
        return Outcome.COMMITTED
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        try:
            with engine.connect() as connection:
                status = connection.execute(_STATUS, {"xid": str(xid)}).scalar()
        except DBAPIError:  # not up again, or a pooled connection that is lost as well
            status = "in progress"
        if status != "in progress":
            return _OUTCOMES.get(str(status), Outcome.UNKNOWN)
        time.sleep(_PAUSE)
    return Outcome.UNKNOWN
