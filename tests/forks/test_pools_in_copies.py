"""Engines that a forked copy of the program's own inherits, and goes on to use.

To have imported the package is all that the program has done.
"""

from __future__ import annotations

import pytest

import defence
import servers
from servers import Database
from warm import Interpreter

pytestmark = pytest.mark.skipif(
    defence.is_taken_away(), reason="without the package nothing is promised"
)

one_server = pytest.mark.parametrize("database", ["postgresql-psycopg"], indirect=True)

DRIVERS = [
    *(("postgresql-psycopg", name) for name in ("psycopg", "psycopg2", "pg8000")),
    *(("mariadb-pymysql", name) for name in ("pymysql", "mysqldb", "mysqlconnector")),
    ("mariadb-pymysql", "mariadbconnector"),
]
each_driver = pytest.mark.parametrize(
    ("database", "driver"),
    DRIVERS,
    indirect=["database"],
    ids=[driver for _, driver in DRIVERS],
)


def address(database: Database, driver: str | None = None) -> str:
    """Give the URL of a database as a program takes it, with one driver."""
    url = database.url
    if driver is not None:
        # What one driver takes in a URL another does not, but where a socket is.
        where = {
            name: url.query[name] for name in ("host", "port") if name in url.query
        }
        url = url.set(drivername=f"{url.get_backend_name()}+{driver}", query=where)
        if driver == "pg8000":
            url = servers.on_server("postgresql-pg8000", url).url
        try:
            url.get_dialect().import_dbapi()
        except ImportError as exc:
            pytest.skip(f"{driver} is not installed: {exc}")
    return url.render_as_string(hide_password=False)


@each_driver
def test_copy_opens_its_own_connections(
    database: Database, driver: str, interpreter: Interpreter
) -> None:
    """From pools of every kind, as many as they may have; the parent keeps its own."""
    report = interpreter.run("idle_pools", url=address(database, driver))
    assert report == {"said": ["", ""], "lost": []}


@each_driver
def test_pool_that_no_engine_has_opens_its_own_connections(
    database: Database, driver: str, interpreter: Interpreter
) -> None:
    """Also if its class cannot make another like it."""
    report = interpreter.run("own_pool", url=address(database, driver))
    assert report == {"said": [""], "lost": []}


@each_driver
def test_session_in_use_is_refused_in_the_copy_until_it_is_rolled_back(
    database: Database, driver: str, interpreter: Interpreter
) -> None:
    """And the parent's transaction is committed whole."""
    report = interpreter.run("held", url=address(database, driver))
    assert set(report["said"]) == {""}
    assert database.names() == set(report["committed"])


@pytest.mark.parametrize("database", servers.SERVERS, indirect=True)
def test_copy_needs_no_lock_and_no_place_of_another_threads(
    database: Database, interpreter: Interpreter
) -> None:
    """A pool of one whose connection is in use, and whose locks are held."""
    report = interpreter.run("held_by_others", url=address(database))
    assert report == {"said": [""], "is_same": True}


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
@one_server
def test_copy_of_an_asynchronous_program_opens_its_own_connections(
    database: Database, driver: str, interpreter: Interpreter
) -> None:
    """What was in use is refused there as well."""
    report = interpreter.run("async_pools", url=address(database, driver))
    assert report == {"said": [""], "is_same": True}


def test_database_without_a_server_stays_as_it_is_and_its_use_is_warned_of_once(
    sqlite_database: Database, interpreter: Interpreter
) -> None:
    """A copy of a database in memory has its rows, and a file is read."""
    report = interpreter.run("embedded", url=address(sqlite_database))
    assert report == {"said": ["", ""]}
