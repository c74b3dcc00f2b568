"""What the check asks of the engine and of the server.

Runs in the workers: there the engine factory is called and the database is reached
exactly as in production. A module of its own, because what ``__main__`` defines has
another name in a worker.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import Connection, Engine, Select, literal_column, select, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool, Pool, QueuePool

from .. import current_engine, session
from .._drivers.connections import is_in_memory
from .._worker.engine_warnings import ASK_FOR_LIMIT, notes_on
from .check_rules import Bound, PoolSize
from .redact import place_of, told_of

_NAMES = {
    "mariadb": "MariaDB",
    "mysql": "MySQL",
    "postgresql": "PostgreSQL",
    "sqlite": "SQLite",
}

# Connections that are open, and those that the server keeps for its administrators.
_ASK_FOR_TAKEN = {
    "postgresql": "SELECT sum(numbackends) + CASE WHEN "
    "current_setting('is_superuser') = 'on' THEN 0 ELSE "
    "current_setting('superuser_reserved_connections')::int "
    "+ coalesce(current_setting('reserved_connections', true), '0')::int END "
    "FROM pg_stat_database",
    "mysql": "SHOW GLOBAL STATUS LIKE 'Threads_connected'",
}
_ASK_FOR_TAKEN["mariadb"] = _ASK_FOR_TAKEN["mysql"]

# What a server may allow less of than in all: a name, how many, how many are open.
_ASK_FOR_NARROWER = {
    "postgresql": "SELECT 'CONNECTION LIMIT of role ' || rolname, rolconnlimit, "
    "(SELECT count(*) FROM pg_stat_activity WHERE usesysid = pg_roles.oid) "
    "FROM pg_roles WHERE rolname = current_user AND rolconnlimit >= 0 "
    "AND NOT rolsuper UNION ALL "
    "SELECT 'CONNECTION LIMIT of database ' || d.datname, datconnlimit, numbackends "
    "FROM pg_database d JOIN pg_stat_database s ON s.datid = d.oid "
    "WHERE d.datname = current_database() AND datconnlimit >= 0 "
    "AND current_setting('is_superuser') = 'off'",
    "mysql": "SELECT 'max_user_connections', @@max_user_connections, count(*) "
    "FROM information_schema.processlist "
    "WHERE user = substring_index(current_user(), '@', 1) "
    "HAVING @@max_user_connections > 0",
}
_ASK_FOR_NARROWER["mariadb"] = _ASK_FOR_NARROWER["mysql"]

# How often the server looks whether the client of a running statement is still there.
_ASK_FOR_CLIENT_CHECK = {
    "postgresql": "SELECT current_setting('client_connection_check_interval', true)",
}

_SLOW = {
    "mariadb": "SELECT SLEEP(3)",
    "mysql": "SELECT SLEEP(3)",
    "postgresql": "SELECT pg_sleep(3)",
    "sqlite": "WITH RECURSIVE numbers(n) AS "
    "(SELECT 1 UNION ALL SELECT n + 1 FROM numbers LIMIT 1000000000) "
    "SELECT count(*) FROM numbers",
}

# SQLite runs in the worker itself: there a job that has ended runs nothing.
_ASK_FOR_RUNNING = {
    "mysql": "SELECT count(*) FROM information_schema.processlist "
    "WHERE info = :statement AND id <> connection_id()",
    "postgresql": "SELECT count(*) FROM pg_stat_activity WHERE query = :statement "
    "AND state = 'active' AND pid <> pg_backend_pid()",
    "sqlite": "SELECT :statement IS NULL",
}
_ASK_FOR_RUNNING["mariadb"] = _ASK_FOR_RUNNING["mysql"]

_MOMENT = 0.5  # seconds; far less than the slow statement takes

_ONE: Select[int] = select(literal_column("1"))


class Facts(NamedTuple):
    """What a worker sees.

    Attributes:
        place: The URL of its engine, without password and options.
        dialect: SQLAlchemy's name of the database.
        driver: SQLAlchemy's name of the driver.
        pool: How many connections its engine may open.
        notes: What may surprise the engine's user.
        failure: Why there is no connection; None if there is one.
        server: Name and version of the database, if there is a connection.
        connect_seconds: How long it took to get it.
        bounds: What the server tells of how many there may be.
        goes_on: Whether it ends a statement of a client that is gone only with the
            statement itself, and could be told otherwise.
    """

    place: str
    dialect: str
    driver: str
    pool: PoolSize
    notes: list[str]
    failure: str | None
    server: str = ""
    connect_seconds: float = 0.0
    bounds: tuple[Bound, ...] = ()
    goes_on: bool = False


def look() -> Facts:
    """Connect, and say what there is."""
    engine = current_engine()
    dialect = engine.dialect.name
    notes = notes_on(engine)
    if (path := _missing_file(engine)) is not None:
        notes.append(
            f"there was no SQLite file {path}, and an empty one is created now: if you "
            "expected tables in it, mend the path"
        )
    facts = Facts(
        place=place_of(engine.url),
        dialect=dialect,
        driver=engine.dialect.driver,
        pool=_size_of(engine.pool),
        notes=notes,
        failure=None,
    )
    started = time.monotonic()
    try:
        with engine.connect() as connection:
            seconds = time.monotonic() - started
            connection.execute(_ONE)
            bounds = tuple(_bounds_of(connection))
            goes_on = _goes_on(connection)
    except Exception as exc:
        # Told here, where the password that must not be told is known.
        return facts._replace(failure=told_of(exc, engine.url))
    return facts._replace(
        server=_server_of(engine),
        connect_seconds=seconds,
        bounds=bounds,
        goes_on=goes_on,
    )


def read_one() -> None:
    """Do as little as a job with a database can do."""
    session.execute(_ONE).scalar_one()


def read_one_of(_number: int) -> None:
    """Do the same, for ``map()``."""
    read_one()


def read_one_slowly(seconds: float) -> int:
    """Do the same and stay busy for a while, so that another worker is started.

    Returns:
        Which process this worker is.
    """
    read_one()
    time.sleep(seconds)
    return os.getpid()


def slow_statement(dialect: str) -> str | None:
    """Give a statement that takes longer than anyone waits here, and is like no other.

    Args:
        dialect: SQLAlchemy's name of the database.

    Returns:
        None if no such statement is known.
    """
    statement = _SLOW.get(dialect)
    return None if statement is None else f"{statement} /* check by {os.getpid()} */"


def run_slow(statement: str) -> None:
    """Run a statement that takes longer than the job may."""
    session.execute(text(statement)).all()


def runs_on(statement: str) -> tuple[int, bool]:
    """Ask whether the server still runs a statement, and wait a moment for its end.

    Returns:
        Which process this worker is, and the answer.
    """
    ask = text(_ASK_FOR_RUNNING[current_engine().dialect.name])
    deadline = time.monotonic() + _MOMENT
    runs = True
    while runs and time.monotonic() < deadline:
        runs = session.execute(ask, {"statement": statement}).scalar_one() > 0
        session.rollback()  # PostgreSQL shows one transaction one picture of it
    return os.getpid(), runs


def _size_of(pool: Pool) -> PoolSize:
    kind = type(pool).__name__
    if isinstance(pool, QueuePool):
        # The public overflow() is how many there are now.
        size, overflow = pool.size(), pool._max_overflow
        unbounded = size == 0 or overflow < 0
        return PoolSize(kind, size, None if unbounded else overflow)
    if isinstance(pool, NullPool):
        return PoolSize(kind, 0, None)
    return PoolSize(kind, 1, 0)  # StaticPool and the like


def _missing_file(engine: Engine) -> str | None:
    """Give the file that connecting would create."""
    path = engine.url.database
    if engine.dialect.name != "sqlite" or is_in_memory(engine.url) or not path:
        return None
    return None if path.startswith("file:") or Path(path).exists() else path


def _server_of(engine: Engine) -> str:
    dialect = engine.dialect
    is_mariadb = getattr(dialect, "is_mariadb", False)
    name = _NAMES.get("mariadb" if is_mariadb else dialect.name, dialect.name)
    version: tuple[object, ...] = getattr(dialect, "server_version_info", None) or ()
    return f"{name} {'.'.join(map(str, version))}".strip()


def _goes_on(connection: Connection) -> bool:
    ask = _ASK_FOR_CLIENT_CHECK.get(connection.dialect.name)
    # NULL before PostgreSQL 14, which has no such setting.
    return ask is not None and connection.exec_driver_sql(ask).scalar_one() == "0"


def _bounds_of(connection: Connection) -> list[Bound]:
    dialect = connection.dialect.name
    bounds: list[Bound] = []
    if dialect not in ASK_FOR_LIMIT:
        return bounds
    # A user may not be allowed to know it all.
    with suppress(SQLAlchemyError):
        allowed = connection.exec_driver_sql(ASK_FOR_LIMIT[dialect]).scalar_one()
        taken = connection.exec_driver_sql(_ASK_FOR_TAKEN[dialect]).one()[-1]
        bounds.append(Bound("max_connections", int(allowed), max(0, int(taken) - 1)))
        for row in connection.exec_driver_sql(_ASK_FOR_NARROWER[dialect]):
            name, allowed, taken = row
            bounds.append(Bound(str(name), int(allowed), max(0, int(taken) - 1)))
    return bounds
