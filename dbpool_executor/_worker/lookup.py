"""Asks PostgreSQL what became of a transaction.

Runs in a worker: in the one whose COMMIT lost contact, or as a job of another one after
the worker that committed has died.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Dialect, Engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from .._wire.phase import Transaction
from ..errors import Outcome

_PATIENCE = 10.0  # seconds for the server to come back and the transaction to end
_PAUSE = 0.1  # seconds between two questions

# After a failover the same id may be another transaction's: a standby that has lost the
# last ones gives their ids anew, on a timeline of its own (PostgreSQL documentation,
# "Timelines"; "Transaction ID and Snapshot Information Functions"). Not by
# pg_control_checkpoint(): after a promotion it names the old one until the first
# checkpoint is over, minutes later. A name of a WAL file begins with the present one.
_SERVER = """
    (SELECT system_identifier FROM pg_control_system()),
    CASE WHEN pg_is_in_recovery() THEN NULL
    ELSE substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8) END
"""
_XID = "CAST(pg_current_xact_id_if_assigned() AS text)"
_CURRENT = text(f"SELECT {_XID}, {_SERVER}")
_CURRENT_ALONE = text(f"SELECT {_XID}, NULL, NULL")
_WHERE = text(f"SELECT {_SERVER}")
_STATUS = text("SELECT pg_xact_status(CAST(:xid AS xid8))")
_OUTCOMES = {"committed": Outcome.COMMITTED, "aborted": Outcome.ROLLED_BACK}

NOTHING_WRITTEN = 1  # "BootstrapTransactionId", which no transaction of ours has
"""In place of a transaction's id: it has none, so COMMIT has nothing to store."""

# Whether a database tells, which not every service allows; by its engine's dialect.
_tells: weakref.WeakKeyDictionary[Dialect, bool] = weakref.WeakKeyDictionary()


def current_transaction(session: Session) -> Transaction:
    """Name the transaction of a session, in one round trip.

    Returns:
        It, with the id NOTHING_WRITTEN if it has none, and without a timeline if the
        database does not tell it.
    """
    connection = session.connection()
    if connection.dialect not in _tells:
        _tells[connection.dialect] = _does_tell(connection)
    ask = _CURRENT if _tells[connection.dialect] else _CURRENT_ALONE
    xid, *where = connection.execute(ask).one()
    return Transaction(int(xid or NOTHING_WRITTEN), *_as_words(where))


def outcome_of(engine: Engine, transaction: Transaction) -> Outcome:
    """Ask what became of a transaction, over a fresh connection.

    Args:
        engine: Of the same database.
        transaction: From :func:`current_transaction`.

    Returns:
        COMMITTED or ROLLED_BACK; UNKNOWN if the server does not answer in time,
        remembers it no more, or is no longer the one that it was sent to.
    """
    if transaction.xid == NOTHING_WRITTEN:
        return Outcome.COMMITTED
    end = time.monotonic() + _PATIENCE
    while transaction.timeline and time.monotonic() < end:
        try:
            with engine.connect() as connection:
                status = _status(connection, transaction)
        except DBAPIError:  # not up again, or a pooled connection that is lost as well
            status = "in progress"
        if status != "in progress":
            return _OUTCOMES.get(str(status), Outcome.UNKNOWN)
        time.sleep(_PAUSE)
    return Outcome.UNKNOWN


def _status(connection: Connection, transaction: Transaction) -> object:
    server, timeline = _as_words(connection.execute(_WHERE).one())
    if not timeline:
        return "in progress"  # on a standby, which may be about to be promoted
    if (server, timeline) != (transaction.server, transaction.timeline):
        return "elsewhere"
    return connection.execute(_STATUS, {"xid": str(transaction.xid)}).scalar()


def _does_tell(connection: Connection) -> bool:
    try:
        with connection.begin_nested():
            connection.execute(_CURRENT)
    except DBAPIError as exc:
        if exc.connection_invalidated:
            raise
        return False
    return True


def _as_words(where: Sequence[Any]) -> tuple[int, int]:
    server, timeline = where
    return (server or 0) % 2**64, int(timeline or "0", 16)
