"""A job that returns has stored what it wrote, or says why not."""

from __future__ import annotations

import pytest

import closing
from dbpool_executor import (
    Outcome,
    TransactionAbortedError,
    WorkLostError,
)
from processes import MakeExecutor
from servers import Database
from waiting import LONGEST

few_databases = pytest.mark.parametrize(
    "database",
    ["sqlite", "postgresql-psycopg", "mariadb-pymysql"],
    indirect=True,
)


@few_databases
def test_closing_with_work_fails_the_job(
    database: Database, make_executor: MakeExecutor
) -> None:
    """It is rolled back, and the error says what to write instead."""
    executor = make_executor(database.make_engine, 1, retries=2)
    for name, job in closing.LOSING.items():
        future = executor.submit(job, name)
        error = future.exception(LONGEST)
        assert (name, type(error)) == (name, WorkLostError)
        assert isinstance(error, TransactionAbortedError)
        assert "leave the session open" in str(error)
        assert future.outcome is Outcome.ROLLED_BACK
        assert database.names() == set()


@few_databases
def test_closing_without_work_is_a_success(
    database: Database, make_executor: MakeExecutor
) -> None:
    """What was read, committed or undone on purpose may be closed."""
    executor = make_executor(database.make_engine, 1)
    for name, (job, rows) in closing.KEEPING.items():
        executor.submit(job, name).result(LONGEST)
        assert (name, database.names()) == (name, {name} if rows else set())
        database.empty_tables()


def test_without_commit_all_may_be_closed(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """There what is left is rolled back anyway."""
    executor = make_executor(sqlite_database.make_engine, 1).options(commit=False)
    for name, job in closing.LOSING.items():
        if name not in ("forget", "replace"):  # those close nothing
            executor.submit(job, name).result(LONGEST)
    assert sqlite_database.names() == set()
