"""Has a database end what it does for a connection.

Runs in both processes, in another thread than the one that waits for the database.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Engine
from sqlalchemy.pool import ConnectionPoolEntry

from .errors import was_cancelled
from .table import driver_of, told

_SESSION = "dbpool_executor.session"


def note_session(connection: Any, entry: ConnectionPoolEntry) -> None:
    """Note by which number the server knows a new connection, for :func:`cancel`.

    mysqlclient does not tell while a statement runs.
    """
    driver = driver_of(entry.driver_connection or connection)
    if driver is not None and driver.session is not None:
        entry.info[_SESSION] = told(driver.session, connection)


def cancel(engine: Engine, entry: ConnectionPoolEntry) -> bool:
    """Have the database end the statement that a connection runs, if it runs one.

    Args:
        engine: Whose connection it is.
        entry: The connection's entry in the engine's pool.

    Returns:
        Whether the database was told so. If not, it may go on with the statement also
        when this process ends.

    Raises:
        Exception: Whatever the driver raises.
    """
    connection: Any = entry.driver_connection
    if connection is None:
        return True
    driver = driver_of(connection)
    session = entry.info.get(_SESSION)
    if session is not None:
        # A pool of its own: the engine's may have none left to give.
        pool = engine.pool.recreate()
        own = pool.connect()
        try:
            own.cursor().execute(f"KILL QUERY {int(session)}")
        finally:
            own.invalidate()
            pool.dispose()
        return True
    if driver is not None:
        if driver.cancel is None:
            return False
        driver.cancel(connection)
        return True
    # Of a driver that is not known, nobody knows what it does.
    if callable(send := getattr(connection, "cancel", None)):
        send()
    return False


def what_was_done(exc: BaseException | None, *, has_cancelled: bool) -> str:
    """Say what was done to a job that took too long.

    Args:
        exc: What it raised then.
        has_cancelled: Whether there is no statement that could not be cancelled.
    """
    if was_cancelled(exc):
        return "its statement was cancelled"
    if has_cancelled:
        return "it was interrupted"
    return (
        "it was interrupted; what it had asked of the database may go on there, since "
        "its driver could not cancel that"
    )
