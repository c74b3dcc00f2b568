"""What a job leaves on a connection, by default and with ``reset_connections``."""

from __future__ import annotations

from contextlib import suppress

import pytest
from sqlalchemy import create_engine
from sqlalchemy.pool import StaticPool

import reset_jobs
import servers
from dbpool_executor import DBPoolExecutor, WorkerStartError
from processes import MakeExecutor
from servers import Database
from waiting import LONGEST

POSTGRESQLS = [name for name in servers.DRIVERS if name.startswith("postgresql")]
MARIADBS = [name for name in servers.DRIVERS if name not in POSTGRESQLS]
LEAVING = [
    reset_jobs.leave_all_on_postgresql,
    reset_jobs.leave_and_fail,
    reset_jobs.leave_by_the_engine,
]


@pytest.mark.parametrize("leave", LEAVING)
@pytest.mark.parametrize("database", POSTGRESQLS, indirect=True)
def test_nothing_is_left_for_the_next_job(
    database: Database, make_executor: MakeExecutor, leave: object
) -> None:
    """The connection is the same one, and used as before."""
    executor = make_executor(database.make_engine, 1, reset_connections=True)
    number = executor.submit(reset_jobs.session_number).result(LONGEST)
    for _ in range(8):  # the driver has prepared the statements by then
        with suppress(LookupError):
            executor.submit(leave).result(LONGEST)  # type: ignore[arg-type]
        found = executor.submit(reset_jobs.found_on_postgresql).result(LONGEST)
        assert found == [False, 0, False, 0, 0]
    if "psycopg" in database.name:  # the others' are closed
        assert executor.submit(reset_jobs.session_number).result(LONGEST) == number


@pytest.mark.parametrize("database", ["postgresql-psycopg"], indirect=True)
def test_by_default_the_next_job_finds_it(
    database: Database, make_executor: MakeExecutor
) -> None:
    """As with every pool of connections; the documentation says so."""
    executor = make_executor(database.make_engine, 1)
    executor.submit(reset_jobs.leave_all_on_postgresql).result(LONGEST)
    found = executor.submit(reset_jobs.found_on_postgresql).result(LONGEST)
    assert found == [True, 1, True, 1, 1]


@pytest.mark.parametrize("database", MARIADBS, indirect=True)
def test_nothing_is_left_on_mariadb(
    database: Database, make_executor: MakeExecutor
) -> None:
    """The connection is closed."""
    executor = make_executor(database.make_engine, 1, reset_connections=True)
    executor.submit(reset_jobs.leave_on_mysql).result(LONGEST)
    assert executor.submit(reset_jobs.found_on_mysql).result(LONGEST) == [0, 1]


def test_nothing_is_left_on_sqlite(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """The connection is closed."""
    executor = make_executor(sqlite_database.make_engine, 1, reset_connections=True)
    executor.submit(reset_jobs.leave_on_sqlite).result(LONGEST)
    assert executor.submit(reset_jobs.found_on_sqlite).result(LONGEST) == 0


def make_static() -> object:
    """Make an engine whose one connection is the database."""
    return create_engine("sqlite://", poolclass=StaticPool)


def test_database_in_memory_is_refused() -> None:
    """To close its connection would lose it."""
    with (
        DBPoolExecutor(make_static, 1, reset_connections=True) as executor,  # type: ignore[arg-type]
        pytest.raises(WorkerStartError, match="reset_connections=True would lose"),
    ):
        executor.submit(reset_jobs.found_on_sqlite).result(LONGEST)
