"""Jobs that show what differs between drivers, and a driver that nobody knows.

Imported by tests and by their workers.
"""

from __future__ import annotations

import contextlib
import sqlite3
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.exc import DBAPIError

import jobs
from dbpool_executor import current_engine, session

LINK = "INSERT INTO link (id, item_id) VALUES (1, 1)"


def swallow_number(name: str, number: int) -> None:
    """Insert, and go on after an error that the server gives a number."""
    jobs.insert_item(name)
    with contextlib.suppress(DBAPIError):
        session.connection().exec_driver_sql(
            f"SIGNAL SQLSTATE 'HY000' SET MYSQL_ERRNO = {number}, MESSAGE_TEXT = 'x'"
        )


def swallow_lock_wait(name: str) -> None:
    """Insert, and go on after having waited for a lock in vain."""
    session.execute(text("SET SESSION innodb_lock_wait_timeout = 1"))
    jobs.insert_item(name)
    with contextlib.suppress(DBAPIError):
        session.execute(text(LINK))


def swallow_error(name: str) -> None:
    """Insert, and go on after an error."""
    jobs.insert_item(name)
    session.flush()
    with contextlib.suppress(DBAPIError):
        session.connection().exec_driver_sql("SELECT 1 / 0")


def insert_and_be_terminated(name: str, marker: str) -> None:
    """Insert, and have the server end this session, unless the marker is there."""
    jobs.insert_item(name)
    session.flush()
    if not Path(marker).exists():
        Path(marker).touch()
        _terminate()
        session.execute(text("SELECT 1"))


def _terminate() -> None:
    is_postgresql = current_engine().dialect.name == "postgresql"
    own = "SELECT pg_backend_pid()" if is_postgresql else "SELECT connection_id()"
    number = session.execute(text(own)).scalar_one()
    end = f"SELECT pg_terminate_backend({number}, 5000)"
    if not is_postgresql:
        end = f"KILL {number}"
    with current_engine().connect() as connection:
        connection.exec_driver_sql(end)
        connection.rollback()


def raise_once(name: str, code: str | int, marker: str) -> None:
    """Insert, and have the server raise an error with a code, unless the marker is there."""
    jobs.insert_item(name)
    session.flush()
    if marker and Path(marker).exists():
        return
    if marker:
        Path(marker).touch()
    if isinstance(code, str):
        sql = (
            "DO $$ BEGIN RAISE EXCEPTION 'raised on purpose' "
            f"USING ERRCODE = '{code}'; END $$"
        )
    else:
        sql = (
            f"SIGNAL SQLSTATE '45000' SET MYSQL_ERRNO = {code}, "
            "MESSAGE_TEXT = 'raised on purpose'"
        )
    session.connection().exec_driver_sql(sql)


ROW = {
    "postgresql": (
        "SELECT '\\x00ff'::bytea, 1.50::numeric(10, 2), DATE '2026-12-01', "
        "TIMESTAMP '2026-12-01 02:03:04', 'é', NULL, 1.5::float8, true, ARRAY[1, 2]"
    ),
    "mysql": (
        "SELECT x'00ff', CAST(1.50 AS DECIMAL(10, 2)), DATE '2026-12-01', "
        "TIMESTAMP '2026-12-01 02:03:04', 'é', NULL, CAST(1.5 AS DOUBLE), 1"
    ),
    "sqlite": "SELECT x'00ff', 1.5, 'é', NULL, 1",
}
"""One row with a value of each type, by dialect."""


def row_of_every_type() -> Any:
    """Read one row, as the driver gives it."""
    sql = ROW[current_engine().dialect.name]
    return session.connection().exec_driver_sql(sql).one()


def leave_open() -> None:
    """Leave a connection open."""
    current_engine().connect().execute(text("SELECT 1"))


# -- A driver that nobody knows: sqlite3 under other names ---------------------------


class Error(Exception):
    """Its errors have no codes."""


class OperationalError(Error):
    """PEP 249."""


class IntegrityError(Error):
    """PEP 249."""


class Connection:
    """Passes everything on to one of sqlite3.

    Args:
        inner: It, or a cursor of it.
    """

    def __init__(self, inner: Any = None) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        return partial(_passed_on, found) if callable(found) else found


def _passed_on(method: Any, *args: Any, **options: Any) -> Any:
    try:
        result = method(*args, **options)
    except sqlite3.IntegrityError as exc:
        raise IntegrityError(*exc.args) from None
    except sqlite3.Error as exc:
        raise OperationalError(*exc.args) from None
    return Connection(result) if isinstance(result, sqlite3.Cursor) else result


def connect(*args: Any, **options: Any) -> Connection:
    """Connect, as PEP 249 has it."""
    return Connection(sqlite3.connect(*args, **options))


def strange_engine(url: str, **options: Any) -> Engine:
    """Make an engine with it."""
    module = SimpleNamespace(**{**vars(sqlite3), "connect": connect, "Error": Error})
    module.OperationalError, module.IntegrityError = OperationalError, IntegrityError
    return create_engine(url, module=module, **options)


def wrapped(error: Error) -> DBAPIError:
    """Give an error as SQLAlchemy raises it in COMMIT."""
    return DBAPIError("COMMIT", None, error)


def engine_by_file(url: str, path: str) -> Engine:
    """Make an engine that looks in a file for the port, at each connection."""
    engine = create_engine(url)

    @event.listens_for(engine, "do_connect")
    def look(_dialect: Any, _record: Any, _args: Any, params: dict[str, Any]) -> None:
        params["port"] = int(Path(path).read_text())

    return engine
