"""Sessions with ``twophase=True``: what is prepared and not committed is unknown."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest
from sqlalchemy.exc import DBAPIError

import jobs
import two_phases
from dbpool_executor import Outcome, OutcomeUnknownError, WorkerDiedError
from processes import MakeExecutor
from servers import Database
from two_phases import TwoPhases
from waiting import LONGEST

MARK = f"dbpool_{secrets.token_hex(4)}_"

only_postgresql = pytest.mark.parametrize(
    "database", ["postgresql-psycopg"], indirect=True
)


@pytest.fixture
def server(database: Database) -> Iterator[Database]:
    """A database that may prepare transactions, and that has none left in the end."""
    if database.is_postgresql:
        allowed = int(database.rows("SHOW max_prepared_transactions")[0][0])
        if not allowed:
            pytest.skip("max_prepared_transactions is 0 on this server, as by default")
    yield database
    two_phases.forget(database, MARK)


either = pytest.mark.parametrize(
    "database", ["postgresql-psycopg", "mariadb-pymysql"], indirect=True
)


@either
def test_job_is_committed_or_rolled_back(
    server: Database, make_executor: MakeExecutor
) -> None:
    """By its return, its exception, or the death of its worker before the first phase."""
    executor = make_executor(server.make_engine, 1, session_options=TwoPhases(MARK))
    done = executor.submit(jobs.insert_item, "done")
    done.result(LONGEST)
    raised = executor.submit(two_phases.insert_and_raise, "raised")
    assert isinstance(raised.exception(LONGEST), LookupError)
    died = executor.submit(two_phases.insert_and_die, "died")
    assert isinstance(died.exception(LONGEST), WorkerDiedError)
    assert [f.outcome for f in (done, raised, died)] == [
        Outcome.COMMITTED, Outcome.ROLLED_BACK, Outcome.ROLLED_BACK,
    ]  # fmt: skip
    assert server.names() == {"done"}
    assert two_phases.prepared(server, MARK) == []


@either
def test_worker_that_dies_between_the_phases_leaves_it_unknown(
    server: Database, make_executor: MakeExecutor
) -> None:
    """The server keeps what is prepared: anybody may still commit it. It runs once."""
    executor = make_executor(
        server.make_engine, 1, session_options=TwoPhases(MARK), retries=2
    )
    future = executor.submit(two_phases.insert_and_die_between, "a")
    assert isinstance(future.exception(LONGEST), OutcomeUnknownError)
    assert future.outcome is Outcome.UNKNOWN
    assert len(two_phases.prepared(server, MARK)) == 1
    executor.submit(jobs.insert_item, "next").result(LONGEST)
    assert server.names() == {"next"}


@either
def test_what_is_left_prepared_is_unknown(
    server: Database, make_executor: MakeExecutor
) -> None:
    """Whatever has kept the second phase from being sent."""
    executor = make_executor(
        server.make_engine, 1, session_options=TwoPhases(MARK), retries=2
    )
    future = executor.submit(two_phases.insert_and_raise_between, "a")
    error = future.exception(LONGEST)
    assert len(two_phases.prepared(server, MARK)) == 1
    assert future.outcome is Outcome.UNKNOWN
    assert isinstance(error, OutcomeUnknownError)
    assert isinstance(error.__cause__, DBAPIError)
    two_phases.forget(server, MARK)
    executor.submit(jobs.insert_item, "next").result(LONGEST)
    assert server.names() == {"next"}


@only_postgresql
def test_job_that_is_refused_in_the_first_phase_is_rolled_back(
    server: Database, make_executor: MakeExecutor
) -> None:
    """By a constraint that is looked at then; nothing is left prepared."""
    executor = make_executor(server.make_engine, 1, session_options=TwoPhases(MARK))
    future = executor.submit(two_phases.refused, "a")
    # SQLAlchemy may have replaced it by what its ROLLBACK PREPARED was told.
    assert isinstance(future.exception(LONGEST), DBAPIError)
    assert future.outcome is Outcome.ROLLED_BACK
    assert (server.names(), two_phases.prepared(server, MARK)) == (set(), [])


@only_postgresql
@pytest.mark.parametrize("name", two_phases.JOBS)
def test_what_is_refused_on_one_of_two_is_rolled_back_on_both(
    server: Database, make_executor: MakeExecutor, name: str
) -> None:
    """Which is what two phases are for: without them it would be unknown."""
    options = TwoPhases(MARK, _url_of(server))
    executor = make_executor(server.make_engine, 1, session_options=options)
    future = executor.submit(two_phases.JOBS[name], "a")
    # SQLAlchemy may have replaced it by what its ROLLBACK PREPARED was told.
    assert isinstance(future.exception(LONGEST), DBAPIError)
    assert (server.names(), two_phases.prepared(server, MARK)) == (set(), [])
    assert future.outcome is Outcome.ROLLED_BACK


@either
def test_worker_that_dies_between_two_commits_leaves_it_unknown(
    server: Database, make_executor: MakeExecutor
) -> None:
    """One of the two may be committed, and the other is prepared."""
    options = TwoPhases(MARK, _url_of(server))
    executor = make_executor(server.make_engine, 1, session_options=options, retries=2)
    both = executor.submit(two_phases.write_to_both, "a")
    both.result(LONGEST)
    assert server.names() == {"a", "a here"}
    future = executor.submit(two_phases.write_to_both_and_die_between, "b")
    assert isinstance(future.exception(LONGEST), OutcomeUnknownError)
    assert (both.outcome, future.outcome) == (Outcome.COMMITTED, Outcome.UNKNOWN)
    assert len(two_phases.prepared(server, MARK)) == 2 - ("b here" in server.names())


def _url_of(database: Database) -> str:
    return database.url.render_as_string(hide_password=False)
