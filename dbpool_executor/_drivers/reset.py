"""Makes a connection as good as new, where a driver and its server can.

Runs in every process that imports the package; what it gives is called in a worker. Where
a driver cannot, or not all of it comes back, the connection is closed and another is
opened when it is needed. So it is with MySQL and MariaDB: after COM_RESET_CONNECTION
(MySQL documentation, "mysql_reset_connection()") a session has the server's
``autocommit``, character set and isolation level again, and not those that the driver and
SQLAlchemy have set when they connected.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_COMMAND_OK = 1  # PGRES_COMMAND_OK of libpq


def reset_of(connection: object) -> Callable[[Any], None] | None:
    """Give what resets a connection of a driver; None if it is to be closed instead."""
    return _RESETS.get(type(connection).__module__.partition(".")[0])


# Do as PostgreSQL's poolers do between two clients (its documentation, "DISCARD").


def _reset_psycopg(connection: Any) -> None:
    connection.rollback()  # it is refused in a transaction
    # Past the driver, which would prepare it.
    result = connection.pgconn.exec_(b"DISCARD ALL")
    if result.status != _COMMAND_OK:
        raise RuntimeError(result.error_message.decode(errors="replace"))
    # It would go on with statements that the server has forgotten; nothing of them is
    # left to be deallocated.
    prepared = connection._prepared
    prepared.clear()
    prepared._to_flush.clear()


def _reset_psycopg2(connection: Any) -> None:
    connection.rollback()
    autocommits = connection.autocommit
    connection.autocommit = True
    try:
        with connection.cursor() as cursor:
            cursor.execute("DISCARD ALL")
    finally:
        connection.autocommit = autocommits


# By the package of their classes. Not pg8000: SQLAlchemy sets its isolation level by a
# parameter of the session, which would be reset as well.
_RESETS: dict[str, Callable[[Any], None]] = {
    "psycopg": _reset_psycopg,
    "psycopg2": _reset_psycopg2,
}
