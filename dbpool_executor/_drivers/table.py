"""The drivers that are known, and what each does in a way of its own.

Runs in every process that imports the package, so it imports nothing of SQLAlchemy or of
the drivers. A new driver is added to this table and nowhere else.
"""

from __future__ import annotations

import enum
import functools
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from operator import attrgetter, methodcaller
from typing import Any, NamedTuple

Ask = Callable[[Any], Any]


class Status(enum.Enum):
    """How a driver sees the transaction of its connection."""

    IDLE = "idle"
    """None is open."""

    OPEN = "open"

    ABORTED = "aborted"
    """The server will answer COMMIT with success and store nothing."""


class Family(enum.Enum):
    """Whose error codes a driver passes on."""

    POSTGRESQL = "PostgreSQL"  # SQLSTATE
    MYSQL = "MySQL and MariaDB"  # error numbers
    SQLITE = "SQLite"  # extended result codes


class Driver(NamedTuple):
    """What one driver does in a way of its own.

    Each callable takes an error or a connection of the driver. What it raises means that
    there is nothing to tell.

    Attributes:
        name: As pip knows it.
        family: Whose error codes it passes on.
        code: Gives the code of an error.
        status: Gives the Status of a connection; None where only the server knows.
        autocommits: Says whether a connection commits each statement by itself.
        descriptor: Gives the file descriptor of a connection's socket.
        session: Gives the number by which ``KILL QUERY`` knows a connection.
        cancel: Has the server end what a connection runs, from another thread.
        is_replica: Says whether a connection is to a server that takes no writes.
        cut: Closes a connection's socket without a goodbye, from any thread; None where
            closing the connection does.
    """

    name: str
    family: Family
    code: Ask
    status: Ask | None = None
    autocommits: Ask | None = None
    descriptor: Ask | None = None
    session: Ask | None = None
    cancel: Ask | None = None
    is_replica: Ask | None = None
    cut: Ask | None = None


# PGTransactionStatusType of libpq (PostgreSQL documentation, "PQtransactionStatus"), with
# what the protocol's ReadyForQuery says.
_STATUSES = {
    0: Status.IDLE, 1: Status.OPEN, 2: Status.OPEN, 3: Status.ABORTED,
    b"I": Status.IDLE, b"T": Status.OPEN, b"E": Status.ABORTED,
}  # fmt: skip

_REPLICA = "in_hot_standby"  # told unasked, from PostgreSQL 14 on

_IN_TRANSACTION = 1  # SERVER_STATUS_IN_TRANS of MySQL's protocol


def _by(ask: Ask) -> Ask:
    return lambda connection: _STATUSES[ask(connection)]


def _open_if(ask: Ask) -> Ask:
    return lambda connection: Status.OPEN if ask(connection) else Status.IDLE


_autocommit = attrgetter("autocommit")
_get_autocommit = methodcaller("get_autocommit")
_fileno = methodcaller("fileno")
_server_status = _open_if(lambda mysql: mysql.server_status & _IN_TRANSACTION)

_CANCEL_REQUEST = 80877102  # PostgreSQL documentation, "Message Formats"
_CANCEL_SECONDS = 5.0


def _cancel_pg8000(connection: Any) -> None:
    """Send a CancelRequest, as libpq does for the other drivers.

    Over a connection of its own (PostgreSQL documentation, "Canceling Requests in
    Progress"), without a session: so it works when no more are allowed, and through a
    pooler, where the number of the server's process is another one.
    """
    used, key = connection._usock, connection._backend_key_data
    with socket.socket(used.family, socket.SOCK_STREAM) as sent:
        sent.settimeout(_CANCEL_SECONDS)
        sent.connect(used.getpeername())
        sent.sendall(struct.pack("!ii", 8 + len(key), _CANCEL_REQUEST) + key)
        sent.recv(1)  # it answers by closing, once it has passed it on


_DRIVERS = {
    # By the package of their classes.
    "psycopg": Driver(
        "psycopg", Family.POSTGRESQL, attrgetter("sqlstate"),
        # What its ``info`` says in more steps.
        status=_by(attrgetter("pgconn.transaction_status")),
        autocommits=_autocommit,
        descriptor=_fileno,
        cancel=methodcaller("cancel"),
        is_replica=lambda c: c.info.parameter_status(_REPLICA) == "on",
        # An asynchronous connection is closed by its event loop alone.
        cut=lambda connection: connection.pgconn.finish(),
    ),
    "psycopg2": Driver(
        "psycopg2", Family.POSTGRESQL, attrgetter("pgcode"),
        status=_by(attrgetter("info.transaction_status")),
        autocommits=_autocommit,
        descriptor=_fileno,
        cancel=methodcaller("cancel"),
        is_replica=lambda c: c.get_parameter_status(_REPLICA) == "on",
    ),
    "pg8000": Driver(
        "pg8000", Family.POSTGRESQL, lambda error: error.args[0]["C"],
        status=_by(attrgetter("_transaction_status")),
        autocommits=_autocommit,
        descriptor=lambda connection: connection._usock.fileno(),
        cancel=_cancel_pg8000,
        is_replica=lambda c: c.parameter_statuses[_REPLICA] == "on",
    ),
    "pymysql": Driver(
        "PyMySQL", Family.MYSQL, lambda error: error.args[0],
        status=_server_status,
        autocommits=_get_autocommit,
        descriptor=lambda connection: connection._sock.fileno(),
        session=methodcaller("thread_id"),
    ),
    "MySQLdb": Driver(
        "mysqlclient", Family.MYSQL, lambda error: error.args[0],
        autocommits=_get_autocommit,
        descriptor=_fileno,
        session=methodcaller("thread_id"),
    ),
    "mysql": Driver(
        "mysql-connector-python", Family.MYSQL, attrgetter("errno"),
        status=_open_if(attrgetter("in_transaction")),
        autocommits=attrgetter("_autocommit"),  # without the underscore, a query
        descriptor=lambda connection: connection._socket.sock.fileno(),
        session=attrgetter("connection_id"),
    ),
    "mariadb": Driver(
        "mariadb", Family.MYSQL, attrgetter("errno"),
        status=_server_status,
        autocommits=_autocommit,
        descriptor=lambda connection: connection._get_socket(),
        session=attrgetter("connection_id"),
    ),
    "sqlite3": Driver(
        "sqlite3", Family.SQLITE, attrgetter("sqlite_errorcode"),
        status=_open_if(attrgetter("in_transaction")),
        cancel=methodcaller("interrupt"),
    ),
}  # fmt: skip

KNOWN = sorted(driver.name for driver in _DRIVERS.values())
"""The names of the drivers that jobs may use, with all that is promised."""

# A job has no event loop, but the parent may use these and fork.
_DRIVERS |= {
    "asyncpg": Driver(
        "asyncpg", Family.POSTGRESQL, attrgetter("sqlstate"),
        descriptor=lambda c: c._transport.get_extra_info("socket").fileno(),
    ),
    "aiomysql": Driver(
        "aiomysql", Family.MYSQL, lambda error: error.args[0],
        descriptor=lambda c: c._writer.get_extra_info("socket").fileno(),
    ),
    "asyncmy": Driver(
        "asyncmy", Family.MYSQL, lambda error: error.args[0],
        descriptor=lambda c: c._writer.get_extra_info("socket").fileno(),
    ),
}  # fmt: skip


def driver_of(value: object) -> Driver | None:
    """Give the driver that a connection or an error is of; None if it is not known."""
    cls: Any = type(value)
    return driver_of_class(cls)


@functools.lru_cache(maxsize=256)
def driver_of_class(cls: type[Any]) -> Driver | None:
    """Give the driver that a class of connections or errors is of, also a derived one."""
    for base in cls.__mro__:
        package, _, rest = base.__module__.partition(".")
        if package == "sqlalchemy":  # its stand-ins for the errors of asynchronous ones
            package = rest.rpartition(".")[2]
        if driver := _DRIVERS.get(package):
            return driver
    return None


def is_package(module: str) -> bool:
    """Say whether a module is of a driver that is known."""
    return module.partition(".")[0] in _DRIVERS


def told(ask: Ask | None, value: Any) -> Any:
    """Ask, and give None where there is no answer."""
    if ask is not None:
        with suppress(Exception):
            return ask(value)
    return None
