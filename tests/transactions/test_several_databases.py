"""One session that writes to two databases."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy.orm import Session

import closing
import servers
from dbpool_executor import JobTimeoutError, Outcome, OutcomeUnknownError
from processes import MakeExecutor
from servers import Database
from waiting import LONGEST, wait_until

REFUSE = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF NEW.amount < 0 THEN RAISE EXCEPTION 'no' USING errcode = '40001'; END IF;
    RETURN NULL; END $$;
CREATE CONSTRAINT TRIGGER refuses AFTER INSERT ON item DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION refuse()
"""

only_postgresql = pytest.mark.parametrize(
    "database", ["postgresql-psycopg"], indirect=True
)


@pytest.fixture
def here(tmp_path: Path) -> Database:
    """The database of the links; that of the items is `database`."""
    return servers.sqlite_file(tmp_path / "here.db")


def url_of(database: Database) -> str:
    """Give a URL with its password."""
    return database.url.render_as_string(hide_password=False)


def test_options_of_the_engine_route_to_both(
    here: Database, database: Database, make_executor: MakeExecutor
) -> None:
    """What is bound to another engine goes there, and its sessions end with the worker."""
    executor = make_executor(
        here.make_engine, 1, session_options=closing.Two(url_of(database))
    )
    executor.submit(closing.write_to_both, "a").result(LONGEST)
    assert executor.submit(closing.count_both).result(LONGEST) == (1, 1)
    assert (here.count("link"), database.names()) == (1, {"a"})
    executor.shutdown()
    wait_until(lambda: database.sessions() == 0, "the sessions to end")


@only_postgresql
def test_what_may_be_half_committed_is_not_repeated(
    here: Database, database: Database, make_executor: MakeExecutor
) -> None:
    """The second COMMIT is refused for a passing reason, or the first one is."""
    executor = make_executor(
        here.make_engine, 1, retries=2, session_options=closing.Two(url_of(database))
    )
    database.execute(REFUSE)
    try:
        for number in range(8):
            before = here.count("link")
            name = f"item {number}"
            future = executor.submit(closing.write_to_both, name, amount=-1)
            error = future.exception(LONGEST)
            is_stored = here.count("link") > before
            if isinstance(error, OutcomeUnknownError):
                assert is_stored
                assert future.outcome is Outcome.UNKNOWN
            else:  # refused first, each time
                assert not is_stored
                assert future.outcome is Outcome.ROLLED_BACK
                assert here.count("link") == before
            assert here.count("link") <= before + 1
        assert database.names() == set()
    finally:
        database.execute("DROP FUNCTION refuse CASCADE")


def test_commit_on_the_other_database_is_the_jobs_own(
    here: Database, database: Database, make_executor: MakeExecutor
) -> None:
    """Its engine is watched as the first one is."""
    executor = make_executor(
        here.make_engine, 1, session_options=closing.Two(url_of(database))
    )
    future = executor.submit(closing.commit_there, "a")
    assert isinstance(future.exception(LONGEST), LookupError)
    assert (future.outcome, database.names()) == (Outcome.UNKNOWN, {"a"})


@only_postgresql
def test_statement_on_the_other_database_is_cancelled(
    here: Database, database: Database, make_executor: MakeExecutor
) -> None:
    """The server does not go on."""
    executor = make_executor(
        here.make_engine, 1, session_options=closing.Two(url_of(database))
    )
    future = executor.options(timeout=0.5).submit(closing.sleep_there)
    with pytest.raises(JobTimeoutError):
        future.result(LONGEST)
    running = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
        "AND state = 'active' AND pid <> pg_backend_pid()"
    )
    wait_until(lambda: database.rows(running) == [(0,)], "the statement to end")


def test_options_that_are_no_mapping_are_told(
    here: Database, make_executor: MakeExecutor
) -> None:
    """The worker says what the callable returned."""
    executor = make_executor(here.make_engine, 1, session_options=Session)
    error = executor.submit(closing.count_both).exception(LONGEST)
    assert "it must return the keyword arguments" in str(error) + str(error.__cause__)
