"""What a driver tells of its connection, and what can be done to it.

Runs in every process that imports the package, so it imports nothing of SQLAlchemy. In
come the connections of drivers, as ``PoolProxiedConnection.driver_connection``.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Protocol

from .table import Family, Status, driver_of, told


class _URL(Protocol):
    """What is needed of ``sqlalchemy.URL``."""

    @property
    def database(self) -> str | None: ...
    def get_backend_name(self) -> str: ...


def status_of(connection: object) -> Status | None:
    """Give the status of a connection's transaction, without asking the server.

    Returns:
        It; None if the driver does not know, or is not known.
    """
    driver = driver_of(connection)
    status: Status | None = driver and told(driver.status, connection)
    return status


def autocommits(connection: object) -> bool:
    """Say whether each statement of a connection is committed by itself.

    Args:
        connection: Not of the sqlite3 module, whose attribute says only who begins
            transactions, the module or the program.
    """
    driver = driver_of(connection)
    if driver is not None:
        return bool(told(driver.autocommits, connection))
    return getattr(connection, "autocommit", None) is True


def is_sqlite(connection: object) -> bool:
    """Say whether a connection is of the sqlite3 module."""
    driver = driver_of(connection)
    return driver is not None and driver.family is Family.SQLITE


def is_in_memory(url: _URL) -> bool:
    """Say whether a database is nowhere but in the connections to it."""
    # sqlite.org/inmemorydb.html
    if url.get_backend_name() != "sqlite":
        return False
    return not url.database or ":memory:" in url.database or "mode=memory" in str(url)


def is_embedded(backend_name: str) -> bool:
    """Say whether a database is a library in this process, without a server.

    Args:
        backend_name: As SQLAlchemy names it, ``Dialect.name``.
    """
    return backend_name in ("sqlite", "duckdb")


def descriptor_of(connection: object) -> int | None:
    """Give the file descriptor of a connection's socket; None if it does not tell."""
    driver = driver_of(connection)
    if driver is not None:
        descriptor = told(driver.descriptor, connection)
    else:
        descriptor = None
        with suppress(Exception):  # closed, or without such a method
            whatever: Any = connection
            descriptor = whatever.fileno()
    return descriptor if type(descriptor) is int and descriptor >= 0 else None


def cut(connection: object) -> bool:
    """Close a connection's socket without a goodbye, where closing it is not possible.

    Returns:
        Whether that was needed; if not, the connection is to be closed as usual.
    """
    driver = driver_of(connection)
    if driver is None or driver.cut is None:
        return False
    driver.cut(connection)
    return True
