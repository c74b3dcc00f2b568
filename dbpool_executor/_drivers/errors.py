"""What the drivers tell, each in its own way.

Runs in both processes. Judged by the codes of the database and never by SQLAlchemy's class:
one and the same serialization failure arrives as four of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.pool import ConnectionPoolEntry

from .._forks.connections import is_sqlite

_IN_ERROR = 3  # PQTRANS_INERROR of libpq, the same in psycopg and psycopg2

# PostgreSQL documentation, appendix A: serialization failure, deadlock, lock not
# available; connection exceptions; the server is ending or not up yet.
_TRANSIENT_STATES = {
    "40001", "40P01", "55P03",
    "08000", "08001", "08003", "08004", "08006",
    "57P01", "57P02", "57P03",
}  # fmt: skip
# The server's own words for "whether it was committed is not known".
_UNKNOWN_STATES = {"40003", "08007", "57P01", "57P02"}

LOCK_WAIT_TIMEOUT = 1205
DEADLOCK = 1213
# MariaDB documentation, "Error Codes": too many connections, shutdown, killed, gone,
# lost; record changed; and no wait.
_TRANSIENT_NUMBERS = {
    LOCK_WAIT_TIMEOUT, DEADLOCK, 1020, 1040, 1053, 1927, 2002, 2003, 2006, 2013, 3572,
}  # fmt: skip
_TRANSIENT_SQLITE = {5, 6}  # SQLITE_BUSY, SQLITE_LOCKED (sqlite.org/rescode.html)


def is_transient(exc: BaseException) -> bool:
    """Say whether the same job may succeed when it is run again.

    Args:
        exc: What it raised. What stands behind it counts as well: a deadlock under a
            savepoint shows as a savepoint that does not exist.
    """
    return any(_is_transient(error) for error in _database_errors(exc))


def _is_transient(error: DBAPIError) -> bool:
    state = sqlstate(error)
    if state in _UNKNOWN_STATES and state not in _TRANSIENT_STATES:
        return False
    if error.connection_invalidated or state in _TRANSIENT_STATES:
        return True
    code = getattr(error.orig, "sqlite_errorcode", None)
    if isinstance(code, int):
        return code & 0xFF in _TRANSIENT_SQLITE
    number = mysql_number(error)
    if number is not None:
        return number in _TRANSIENT_NUMBERS
    # libpq has no SQLSTATE for a connection that it could not make.
    return isinstance(error, OperationalError) and not (state or error.statement)


def leaves_commit_unknown(error: DBAPIError) -> bool:
    """Say whether an error of COMMIT leaves open what became of it.

    The same error comes whether the connection broke before or after the server had
    the COMMIT.
    """
    return error.connection_invalidated or sqlstate(error) in _UNKNOWN_STATES


def _database_errors(exc: BaseException) -> Iterator[DBAPIError]:
    seen: set[int] = set()
    stack: list[BaseException | None] = [exc]
    while stack:
        error = stack.pop()
        if error is None or id(error) in seen:
            continue
        seen.add(id(error))
        if isinstance(error, DBAPIError):
            yield error
        stack += [error.__cause__, error.__context__]


def sqlstate(error: DBAPIError) -> str | None:
    """Give the SQLSTATE of an error, where the driver tells it."""
    # psycopg and asyncpg; psycopg2.
    for name in ("sqlstate", "pgcode"):
        state = getattr(error.orig, name, None)
        if isinstance(state, str):
            return state
    return None


def mysql_number(error: DBAPIError) -> int | None:
    """Give the error number of MySQL or MariaDB, where the error is theirs."""
    if type(error.orig).__module__.partition(".")[0] in ("pymysql", "MySQLdb"):
        args = error.orig.args if error.orig is not None else ()
        return args[0] if args and isinstance(args[0], int) else None
    return None


def is_aborted(connection: Any) -> bool:
    """Say whether the server will answer COMMIT with success and store nothing."""
    # psycopg, whose ``info`` says the same in more steps; psycopg2.
    libpq = getattr(connection, "pgconn", None) or getattr(connection, "info", None)
    return getattr(libpq, "transaction_status", None) == _IN_ERROR


def autocommits(connection: Any) -> bool:
    """Say whether each statement of a connection is committed by itself.

    Args:
        connection: Not of the sqlite3 module, whose attribute says only who begins
            transactions, the module or the program.
    """
    autocommit = getattr(connection, "autocommit", None)
    if isinstance(autocommit, bool):
        return autocommit
    with suppress(Exception):  # PyMySQL and mysqlclient
        return bool(connection.get_autocommit())
    return False


_THREAD_ID = "dbpool_executor.thread_id"


def note_thread_id(connection: Any, entry: ConnectionPoolEntry) -> None:
    """Note how MySQL and MariaDB call a connection, for :func:`cancel`.

    mysqlclient does not tell while a statement runs.
    """
    if callable(thread_id := getattr(connection, "thread_id", None)):
        entry.info[_THREAD_ID] = int(thread_id())


def cancel(engine: Engine, entry: ConnectionPoolEntry) -> None:
    """Have the server end the statement that a connection runs, if it runs one.

    Args:
        engine: Whose connection it is.
        entry: The connection's entry in the engine's pool.

    Raises:
        Exception: Whatever the driver raises.
    """
    driver_connection: Any = entry.driver_connection
    if driver_connection is None:
        return
    if is_sqlite(driver_connection):
        driver_connection.interrupt()
    elif (thread_id := entry.info.get(_THREAD_ID)) is not None:
        # A pool of its own: the engine's may have none left to give.
        pool = engine.pool.recreate()
        connection = pool.connect()
        try:
            connection.cursor().execute(f"KILL QUERY {thread_id}")
        finally:
            connection.invalidate()
            pool.dispose()
    elif callable(send_cancel := getattr(driver_connection, "cancel", None)):
        send_cancel()
