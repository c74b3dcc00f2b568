"""A job's session is as good as new, also where it is not new."""

from __future__ import annotations

import enum

import pytest
from sqlalchemy import create_engine
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.util import immutabledict

import jobs
from dbpool_executor import DBPoolExecutor
from processes import MakeExecutor
from servers import Database
from waiting import LONGEST


class Own(Session):
    """A session of which nobody knows what it holds."""


@pytest.fixture
def executor(sqlite_database: Database, make_executor: MakeExecutor) -> DBPoolExecutor:
    """One worker; there is a row."""
    executor = make_executor(sqlite_database.make_engine, 1)
    executor.submit(jobs.insert_item, "first").result(LONGEST)
    return executor


def test_session_that_is_as_it_was_made_is_used_again(executor: DBPoolExecutor) -> None:
    """Whether a job has read or written; not by other options."""
    first = executor.submit(jobs.use_session).result(LONGEST)
    executor.submit(jobs.insert_item, "second").result(LONGEST)
    assert executor.submit(jobs.use_session).result(LONGEST) == first
    view = executor.options(isolation_level="SERIALIZABLE")
    assert view.submit(jobs.use_session).result(LONGEST) != first
    assert executor.submit(jobs.use_session).result(LONGEST) != first


@pytest.mark.parametrize("trace", jobs.TRACES)
def test_session_with_a_trace_of_its_job_is_not(
    executor: DBPoolExecutor, trace: str
) -> None:
    """Whatever it is: an object, a setting, or only that somebody still has it."""
    last = executor.submit(jobs.use_session, trace).result(LONGEST)
    assert executor.submit(jobs.use_session).result(LONGEST) != last


def test_session_of_a_job_that_failed_is_not(executor: DBPoolExecutor) -> None:
    """It has a transaction, which is rolled back."""
    last = executor.submit(jobs.use_session).result(LONGEST)
    with pytest.raises(KeyError):
        executor.submit(jobs.use_session, "no such trace").result(LONGEST)
    assert executor.submit(jobs.use_session).result(LONGEST) != last


def test_listeners_to_a_session_do_not_outlive_the_job(
    executor: DBPoolExecutor,
) -> None:
    """Though the session may: nothing is heard of what the next job does."""
    last = executor.submit(jobs.listen_to_session).result(LONGEST)
    found, heard = executor.submit(jobs.what_was_heard).result(LONGEST)
    assert found == last
    assert executor.submit(jobs.what_was_heard).result(LONGEST) == (found, heard)


@pytest.mark.parametrize("trace", [None, "what refuses to be compared"])
def test_listeners_hear_of_the_end_of_the_transaction(
    executor: DBPoolExecutor, trace: str | None
) -> None:
    """Also of one that the worker rolls back, whatever the job has done to the session."""
    with pytest.raises(LookupError, match="given up"):
        executor.submit(jobs.listen_to_end_and_raise, trace).result(LONGEST)
    _, heard = executor.submit(jobs.what_was_heard).result(LONGEST)
    assert heard == 1


def test_session_of_an_own_class_is_not(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """It may hold what no copy and no comparison knows of."""
    executor = make_executor(
        sqlite_database.make_engine, 1, session_options={"class_": Own}
    )
    first = executor.submit(jobs.use_session).result(LONGEST)
    assert executor.submit(jobs.use_session).result(LONGEST) != first


def test_all_that_a_session_is_made_of_can_be_compared() -> None:
    """Values that nobody can change, or dicts, which are copied: no list, no set."""
    engine = create_engine("sqlite://")
    made = vars(sessionmaker(engine, info={"of": "the user"})())
    known = (dict, immutabledict, str, int, enum.Enum, type, type(engine), type(None))
    strange = {name for name, value in made.items() if not isinstance(value, known)}
    assert strange == {"identity_map"}
    assert len(made["identity_map"]) == 0
