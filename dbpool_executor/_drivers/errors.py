"""What an error of a driver says of the transaction, and whether to try again.

Runs in both processes. Judged by the codes of the database and never by SQLAlchemy's class:
one and the same serialization failure arrives as four of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType

from sqlalchemy import Engine
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

from .connections import status_of
from .table import Driver, Family, Status, driver_of, driver_of_class, is_package, told

LOCK_WAIT_TIMEOUT = 1205
DEADLOCK = 1213

# PostgreSQL documentation, appendix A: serialization failure, deadlock, lock not
# available; connection exceptions, too many of them; the server is ending or not up yet,
# or has ended a session that was idle for too long. MariaDB documentation, "Error Codes":
# record changed, too many connections, shutdown, killed, no wait, rolled back by a
# plugin; and those of the client that it could not connect, or has lost contact.
# sqlite.org/rescode.html: SQLITE_BUSY, SQLITE_LOCKED.
_TRANSIENT: dict[Family, set[object]] = {
    Family.POSTGRESQL: {
        "40001", "40P01", "55P03",
        "08000", "08001", "08003", "08004", "08006", "53300",
        "57P01", "57P02", "57P03", "57P05", "25P03",
    },
    Family.MYSQL: {
        LOCK_WAIT_TIMEOUT, DEADLOCK, 1020, 1040, 1053, 1927, 3101, 3572,
        -1, 2002, 2003, 2006, 2013, 2055,
    },
    Family.SQLITE: {5, 6},
}  # fmt: skip

# Those by which the connection is no more, also where SQLAlchemy does not know it.
_LOST: dict[Family, set[object]] = {
    Family.POSTGRESQL: {"57P01", "57P02", "57P05", "25P03"},
    Family.MYSQL: {-1, 1053, 1927, 2006, 2013, 2055},
    Family.SQLITE: set(),
}

# Of an error of COMMIT, what leaves open what became of it: the servers' own words for
# it, an interrupted or failed COMMIT of MariaDB, which may have reached its binary log, a
# disk that failed SQLite while it wrote. All errors of the client do, too.
_UNKNOWN: dict[Family, set[object]] = {
    Family.POSTGRESQL: {"40003", "08007", "57P01", "57P02"},
    Family.MYSQL: {1053, 1180, 1317, 1927},
    Family.SQLITE: {10},
}
_OF_THE_CLIENT = {-1, 0, *range(2000, 3000)}  # MariaDB documentation, "Error Codes"

# By which a statement says that it was cancelled: SQLITE_INTERRUPT is the last.
_CANCELLED: dict[Family, set[object]] = {
    Family.POSTGRESQL: {"57014"},
    Family.MYSQL: {1317},
    Family.SQLITE: {9},
}

_READ_ONLY_TRANSACTION = "25006"
_OF_CONNECTING = {"OperationalError", "InterfaceError"}  # PEP 249, "Exceptions"


def is_transient(exc: BaseException) -> bool:
    """Say whether the same job may succeed when it is run again.

    Args:
        exc: What it raised. What stands behind it counts as well: a deadlock under a
            savepoint shows as a savepoint that does not exist.
    """
    return any(
        _is_transient(error)
        if isinstance(error, DBAPIError)
        else _is_lost_socket(error)
        for error in _chain(exc)
    )


def may_pass(exc: BaseException) -> bool:
    """Say whether a worker that could not start for this may start later.

    Args:
        exc: What the engine factory or the initializer raised, by SQLAlchemy or by the
            driver itself: such as that the database cannot be reached. A driver that
            could not connect may not tell why.
    """
    return is_transient(exc) or any(map(_may_driver_pass, _chain(exc)))


def _may_driver_pass(error: BaseException) -> bool:
    driver = None if isinstance(error, DBAPIError) else driver_of(error)
    if driver is None:
        return False
    code = _code_of(driver, error)
    is_of_connecting = type(error).__name__ in _OF_CONNECTING
    return code in _TRANSIENT[driver.family] or (is_of_connecting and not code)


def _is_transient(error: DBAPIError) -> bool:
    driver, code = _known(error)
    if driver is not None:
        if code in _UNKNOWN[driver.family] and code not in _TRANSIENT[driver.family]:
            return False
        if code in _TRANSIENT[driver.family]:
            return True
    if error.connection_invalidated:
        return True
    # libpq has no SQLSTATE for a connection that it could not make.
    is_of_connecting = isinstance(error, (OperationalError, InterfaceError))
    return is_of_connecting and not (code or error.statement)


def leaves_commit_unknown(error: BaseException) -> bool:
    """Say whether an error of COMMIT leaves open what became of it.

    The same error comes whether the connection broke before or after the server had
    the COMMIT. Only what the server itself has said against it is an answer, so it is
    also left open by what is no error of a database, and by a driver that is not known.
    """
    if not isinstance(error, DBAPIError) or error.connection_invalidated:
        return True
    driver, code = _known(error)
    if driver is None or code is None or code in _UNKNOWN[driver.family]:
        return True
    return driver.family is Family.MYSQL and code in _OF_THE_CLIENT


def was_cancelled(exc: BaseException | None) -> bool:
    """Say whether a database has cancelled a statement, by what a job raised."""
    for error in _chain(exc):
        if isinstance(error, DBAPIError):
            driver, code = _known(error)
            if driver is not None and code in _CANCELLED[driver.family]:
                return True
    return False


def mysql_number(error: DBAPIError) -> int | None:
    """Give the error number of MySQL or MariaDB, where the error is theirs."""
    driver, code = _known(error)
    if driver is not None and driver.family is Family.MYSQL and isinstance(code, int):
        return code
    return None


def is_aborted(connection: object) -> bool:
    """Say whether the server will answer COMMIT with success and store nothing."""
    return status_of(connection) is Status.ABORTED


def is_known(engine: Engine) -> bool:
    """Say whether an engine's driver is one that is known."""
    dbapi = engine.dialect.dbapi
    error = getattr(dbapi, "Error", None)
    return isinstance(error, type) and driver_of_class(error) is not None


def give_up_lost(context: ExceptionContext) -> None:
    """Have SQLAlchemy give up a connection that is of no more use.

    A listener to ``handle_error``. By their codes it does not know all that are lost;
    and one to a server that has become, or was always, a replica is not the one to write
    through: a new one may lead to the primary.
    """
    error, connection = context.sqlalchemy_exception, context.connection
    if not isinstance(error, DBAPIError):
        if _is_lost_socket(context.original_exception):
            context.is_disconnect = True
        return
    driver, code = _known(error)
    if driver is None:
        return
    is_lost = code in _LOST[driver.family]
    if code == _READ_ONLY_TRANSACTION and connection is not None:
        # Else the transaction is read-only because somebody wanted it to be.
        where = connection.connection.driver_connection
        is_lost = bool(told(driver.is_replica, where))
    if is_lost:
        context.is_disconnect = True


def _known(error: DBAPIError) -> tuple[Driver | None, object]:
    """Give the driver of an error, and the code of the database."""
    driver = driver_of(error.orig)
    return driver, None if driver is None else _code_of(driver, error.orig)


def _code_of(driver: Driver, error: object) -> object:
    code = told(driver.code, error)
    if driver.family is Family.SQLITE and isinstance(code, int):
        code &= 0xFF  # the primary one (sqlite.org/rescode.html)
    return code


def _chain(exc: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    stack = [exc]
    while stack:
        error = stack.pop()
        if error is None or id(error) in seen:
            continue
        seen.add(id(error))
        yield error
        stack += [error.__cause__, error.__context__]


def _is_lost_socket(error: BaseException) -> bool:
    """Say whether an error is a socket's, and came out of a driver: pg8000 lets it."""
    trace: TracebackType | None = error.__traceback__
    while isinstance(error, ConnectionError) and trace is not None:
        if is_package(str(trace.tb_frame.f_globals.get("__name__"))):
            return True
        trace = trace.tb_next
    return False
