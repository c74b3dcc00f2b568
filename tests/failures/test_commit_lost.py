"""Contact is lost while COMMIT is under way, and the server may be asked about it."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from sqlalchemy import create_engine
from sqlalchemy.exc import DBAPIError, OperationalError

import failures
import faults
import jobs
import servers
from dbpool_executor import (
    Outcome,
    OutcomeUnknownError,
    ResolveNotSupportedError,
    ResultLostError,
    WorkerDiedError,
)
from processes import MakeExecutor
from proxy import Proxy, between
from servers import Database
from waiting import LONGEST, Gate, wait_until

only_servers = pytest.mark.parametrize(
    "database", [*servers.SERVERS, *servers.OTHERS], indirect=True
)
only_postgresql = pytest.mark.parametrize(
    "database", [*servers.POSTGRESQLS, "postgresql-pg8000"], indirect=True
)
# Whose COMMIT is one message that a proxy can see.
in_one_message = pytest.mark.parametrize("database", servers.POSTGRESQLS, indirect=True)
both_cuts = pytest.mark.parametrize(
    ("cut", "is_stored"),
    [(Proxy.cut_before, False), (Proxy.cut_after, True)],
    ids=["before", "after"],
)
Cut = Callable[[Proxy, bytes], None]


def state_of(error: BaseException | None) -> object:
    """Give the SQLSTATE of an error of PostgreSQL."""
    assert isinstance(error, DBAPIError)
    orig = error.orig
    state = getattr(orig, "sqlstate", None) or getattr(orig, "pgcode", None)
    return state or (orig is not None and orig.args[0]["C"])


def backend_in_commit(database: Database) -> int:
    """Wait until the server works on a COMMIT, and give the process that does."""
    sql = (
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() "
        "AND query ILIKE 'COMMIT%' AND wait_event = 'PgSleep'"
    )
    rows = wait_until(lambda: database.rows(sql), "a COMMIT that takes long")
    return int(rows[0][0])


def terminate(database: Database, backend: int) -> None:
    """Have the server end a session, as its administrator may."""
    database.rows("SELECT pg_terminate_backend(:pid, 5000)", pid=backend)


# -- Cut by the network -------------------------------------------------------------


@only_servers
@both_cuts
def test_commit_that_is_cut_is_unknown_and_never_repeated(
    database: Database,
    make_executor: MakeExecutor,
    cut: Cut,
    is_stored: bool,
) -> None:
    """The same error whether the server had it or not; the executor goes on at once."""
    with between(database) as (proxy, make_engine):
        executor = make_executor(make_engine, 1, retries=3)
        worker = executor.submit(jobs.insert_and_tell_pid, "before").result(LONGEST)
        cut(proxy, b"COMMIT")
        with pytest.raises(OutcomeUnknownError) as raised:
            executor.submit(jobs.insert_item, "a").result(LONGEST)
        assert raised.value.outcome is Outcome.UNKNOWN
        cause = raised.value.__cause__
        if database.name != "mariadb-mysqlconnector" or isinstance(cause, DBAPIError):
            # Of that driver's C extension SQLAlchemy does not know the errors.
            assert isinstance(cause, DBAPIError)
            assert cause.connection_invalidated
        assert executor.stats().retried == 0
        assert (
            executor.submit(jobs.insert_and_tell_pid, "next").result(LONGEST) == worker
        )
    if database.name == "postgresql-pg8000":
        is_stored = False  # what was answered is that it is parsed, not executed
    assert database.names() == {"before", "next", *(["a"] if is_stored else [])}


@only_servers
def test_connection_that_is_cut_before_commit_is_rolled_back(
    database: Database, make_executor: MakeExecutor, gate: Gate
) -> None:
    """SQLAlchemy's own exception; nothing is there, and the next job connects anew."""
    with between(database) as (proxy, make_engine):
        executor = make_executor(make_engine, 1)
        future = executor.submit(faults.select_after_gate, "a", gate.address)
        gate.arrival()
        proxy.cut()
        gate.open()
        with pytest.raises(DBAPIError) as raised:
            future.result(LONGEST)
        assert raised.value.connection_invalidated
        executor.submit(jobs.insert_item, "next").result(LONGEST)
    assert database.names() == {"next"}


# -- Refused by the server -----------------------------------------------------------


@only_postgresql
def test_commit_that_would_not_be_serializable_is_rolled_back(
    database: Database, make_executor: MakeExecutor, gate: Gate
) -> None:
    """Found at COMMIT: SQLAlchemy's exception with 40001, and the row is not there."""
    executor = make_executor(database.make_engine, 2)
    view = executor.options(isolation_level="SERIALIZABLE")
    first = view.submit(failures.insert_if_still_empty, "first", gate.address)
    worker = gate.arrival()
    second = view.submit(failures.insert_if_still_empty, "second", gate.address)
    gate.arrival()
    gate.open(worker)
    first.result(LONGEST)
    gate.open()
    assert state_of(second.exception(LONGEST)) == "40001"
    assert database.names() == {"first"}


def test_commit_that_sqlite_refuses_is_rolled_back(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """Somebody reads: COMMIT finds the file locked, and keeps the transaction open."""
    sqlite_database.rows("PRAGMA journal_mode = DELETE")
    factory = partial(failures.hasty_engine, str(sqlite_database.url.set(query={})))
    executor = make_executor(factory, 1)
    with sqlite_database.outside() as connection:
        connection.exec_driver_sql("BEGIN")
        connection.exec_driver_sql("SELECT count(*) FROM item").all()
        with pytest.raises(OperationalError, match="locked"):
            executor.submit(jobs.insert_item, "refused").result(LONGEST)
    executor.submit(jobs.insert_item, "next").result(LONGEST)
    assert sqlite_database.names() == {"next"}


@only_postgresql
@pytest.mark.parametrize("state", ["40003", "08007"])
def test_commit_whose_outcome_the_server_does_not_know_is_unknown(
    database: Database, make_executor: MakeExecutor, state: str
) -> None:
    """The server's own words for it are taken at their word, and nothing is repeated."""
    failures.create_delayed(database)
    executor = make_executor(database.make_engine, 1, retries=3)
    with pytest.raises(OutcomeUnknownError) as raised:
        executor.submit(failures.insert_delayed, "a", 0.0, state).result(LONGEST)
    assert state_of(raised.value.__cause__) == state
    assert executor.stats().retried == 0
    executor.submit(jobs.insert_item, "next").result(LONGEST)
    assert database.names() == {"next"}


@only_postgresql
@pytest.mark.parametrize("state", ["23514", "40001", "P0001"])
def test_commit_that_a_trigger_refuses_is_rolled_back(
    database: Database, make_executor: MakeExecutor, state: str
) -> None:
    """Any other state is SQLAlchemy's exception."""
    failures.create_delayed(database)
    executor = make_executor(database.make_engine, 1)
    future = executor.submit(failures.insert_delayed, "a", 0.0, state)
    assert state_of(future.exception(LONGEST)) == state
    assert database.count() == 0


@only_postgresql
def test_shutdown_by_the_administrator_during_commit_is_unknown(
    database: Database, make_executor: MakeExecutor
) -> None:
    """The session is terminated while COMMIT is under way."""
    failures.create_delayed(database)
    executor = make_executor(database.make_engine, 1, retries=3)
    future = executor.submit(failures.insert_delayed, "a", 60.0)
    terminate(database, backend_in_commit(database))
    with pytest.raises(OutcomeUnknownError) as raised:
        future.result(LONGEST)
    assert isinstance(raised.value.__cause__, DBAPIError)
    assert executor.stats().retried == 0
    executor.submit(jobs.insert_item, "next").result(LONGEST)
    assert database.names() == {"next"}


# -- The server is asked -------------------------------------------------------------

small_pools = pytest.mark.parametrize(
    "pool",
    [{}, {"pool_size": 1, "max_overflow": 0, "pool_timeout": 1}],
    ids=["usual", "one"],
)


@in_one_message
@small_pools
def test_commit_that_never_came_is_known_to_be_rolled_back(
    database: Database, make_executor: MakeExecutor, pool: dict[str, Any]
) -> None:
    """``resolve=True`` gives the original error, with nothing in doubt."""
    with between(database) as (proxy, make_engine):
        executor = make_executor(partial(make_engine, **pool), 1)
        executor.submit(jobs.insert_item, "before").result(LONGEST)
        proxy.cut_before(b"COMMIT")
        view = executor.options(resolve=True)
        with pytest.raises(OperationalError) as raised:
            view.submit(jobs.insert_item, "a").result(LONGEST)
        assert raised.value.connection_invalidated
        executor.submit(jobs.insert_item, "next").result(LONGEST)
    assert database.names() == {"before", "next"}


@in_one_message
@small_pools
def test_result_of_a_commit_that_came_is_given(
    database: Database, make_executor: MakeExecutor, pool: dict[str, Any]
) -> None:
    """The server says that it was committed: the job has returned what it returned."""
    with between(database) as (proxy, make_engine):
        executor = make_executor(partial(make_engine, **pool), 1)
        proxy.cut_after(b"COMMIT")
        view = executor.options(resolve=True)
        future = view.submit(jobs.insert_and_give, "a", "the result")
        assert future.result(LONGEST) == "the result"
    assert database.names() == {"a"}


@in_one_message
def test_what_is_known_to_be_rolled_back_is_repeated(
    database: Database, make_executor: MakeExecutor
) -> None:
    """With ``retries``, a COMMIT that was cut becomes a non-event, and stored once."""
    with between(database) as (proxy, make_engine):
        executor = make_executor(make_engine, 1)
        view = executor.options(resolve=True, retries=1)
        for i, cut in enumerate((proxy.cut_before, proxy.cut_after)):
            cut(b"COMMIT")
            view.submit(jobs.insert_item, f"item {i}").result(LONGEST)
        assert executor.stats().retried == 1
    assert database.names() == {"item 0", "item 1"}


@only_postgresql
def test_reading_job_has_nothing_to_lose(
    database: Database, make_executor: MakeExecutor
) -> None:
    """It wrote nothing, so its result is good whatever became of its COMMIT."""
    with between(database) as (proxy, make_engine):
        executor = make_executor(make_engine, 1)
        proxy.cut_before(b"COMMIT")
        view = executor.options(resolve=True)
        assert view.submit(jobs.count_items).result(LONGEST) == 0


@only_postgresql
def test_terminated_commit_is_resolved(
    database: Database, make_executor: MakeExecutor
) -> None:
    """The administrator was faster than COMMIT: rolled back, and the error says why."""
    failures.create_delayed(database)
    executor = make_executor(database.make_engine, 1)
    view = executor.options(resolve=True)
    future = view.submit(failures.insert_delayed, "a", 60.0)
    terminate(database, backend_in_commit(database))
    assert isinstance(future.exception(LONGEST), DBAPIError)
    assert database.count() == 0


@only_postgresql
def test_transaction_of_a_job_is_not_asked_for_after_the_next_one(
    database: Database, make_executor: MakeExecutor
) -> None:
    """What has become of it would be told as the other one's outcome."""
    executor = make_executor(database.make_engine, 1)
    view = executor.options(resolve=True)
    view.submit(jobs.insert_item, "a").result(LONGEST)
    (worker,) = executor._dispatcher._workers.all.values()
    assert worker.body.transaction().xid > 0
    executor.submit(jobs.insert_item, "b").result(LONGEST)
    assert worker.body.transaction().xid == 0


@only_postgresql
def test_commit_of_a_killed_worker_is_resolved_when_it_ends(
    database: Database, make_executor: MakeExecutor
) -> None:
    """The server goes on with it for a while, and then says that it was committed."""
    failures.create_delayed(database)
    executor = make_executor(database.make_engine, 1)
    worker = executor.submit(jobs.pid).result(LONGEST)
    view = executor.options(resolve=True)
    future = view.submit(failures.insert_delayed, "a", 1.5)
    backend_in_commit(database)
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(ResultLostError) as raised:
        future.result(LONGEST)
    assert raised.value.outcome is Outcome.COMMITTED
    assert isinstance(raised.value.__cause__, WorkerDiedError)
    assert database.names() == {"a"}
    assert executor.stats().failed == 1


@only_postgresql
def test_commit_of_a_killed_worker_that_fails_is_resolved(
    database: Database, make_executor: MakeExecutor
) -> None:
    """Worker and session are both gone: the worker's death is all that happened."""
    failures.create_delayed(database)
    executor = make_executor(database.make_engine, 1)
    worker = executor.submit(jobs.pid).result(LONGEST)
    view = executor.options(resolve=True)
    future = view.submit(failures.insert_delayed, "a", 60.0)
    backend = backend_in_commit(database)
    os.kill(worker, signal.SIGKILL)
    terminate(database, backend)
    with pytest.raises(WorkerDiedError) as raised:
        future.result(LONGEST)
    assert raised.value.outcome is Outcome.ROLLED_BACK
    assert database.count() == 0


@only_postgresql
def test_commit_of_a_killed_worker_that_fails_is_repeated(
    database: Database, make_executor: MakeExecutor
) -> None:
    """With ``retries``, as for a worker that dies before COMMIT."""
    failures.create_delayed(database)
    executor = make_executor(database.make_engine, 1)
    worker = executor.submit(jobs.pid).result(LONGEST)
    view = executor.options(resolve=True, retries=1)
    future = view.submit(failures.insert_delayed, "a", 3.0)
    backend = backend_in_commit(database)
    os.kill(worker, signal.SIGKILL)
    terminate(database, backend)
    assert future.result(LONGEST) == "a"
    assert executor.stats().retried == 1
    assert database.names() == {"a"}


@only_postgresql
@pytest.mark.parametrize("state", ["40003", "08007"])
def test_commit_that_the_server_did_not_know_is_repeated_once_it_does(
    database: Database, make_executor: MakeExecutor, state: str
) -> None:
    """Asked, it says that it was rolled back; as it is the second time."""
    failures.create_delayed(database)
    executor = make_executor(database.make_engine, 1)
    view = executor.options(resolve=True, retries=1)
    future = view.submit(failures.insert_delayed, "a", 0.0, state)
    assert state_of(future.exception(LONGEST)) == state
    assert executor.stats().retried == 1
    assert database.count() == 0


@only_postgresql
def test_server_that_does_not_tell_its_timeline_is_not_believed(
    database: Database, make_executor: MakeExecutor
) -> None:
    """Some services do not let everybody ask; the job itself is none the worse."""
    failures.create_delayed(database)
    forbid = "REVOKE EXECUTE ON FUNCTION pg_walfile_name FROM PUBLIC"
    role = f"{database.url.database}_role"
    database.execute(f"CREATE ROLE {role} LOGIN")
    try:
        database.execute(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}")
        database.execute(f"GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO {role}")
        database.execute(forbid)
        url = database.url.set(username=role)
        executor = make_executor(partial(create_engine, url), 1, retries=1)
        view = executor.options(resolve=True)
        for name in ("before", "again"):
            view.submit(jobs.insert_item, name).result(LONGEST)
        with pytest.raises(OutcomeUnknownError):
            view.submit(failures.insert_delayed, "a", 0.0, "40003").result(LONGEST)
        executor.shutdown()
    finally:
        database.execute(forbid.replace("REVOKE", "GRANT").replace("FROM", "TO"))
        database.execute(f"DROP OWNED BY {role}")
        database.execute(f"DROP ROLE {role}")
    assert database.names() == {"before", "again"}


@only_postgresql
def test_server_that_does_not_come_back_leaves_it_unknown(
    database: Database,
    make_executor: MakeExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The question is given up after a while."""
    monkeypatch.setattr("dbpool_executor._worker.lookup._PATIENCE", 0.5)
    forked = multiprocessing.get_context("fork")  # a worker that inherits the above
    with between(database) as (proxy, make_engine):
        executor = make_executor(make_engine, 1, forked)
        failures.create_delayed(database)
        view = executor.options(resolve=True)
        future = view.submit(failures.insert_delayed, "a", 60.0)
        backend = backend_in_commit(database)
        proxy.go_down()
        with pytest.raises(OutcomeUnknownError):
            future.result(LONGEST)
        terminate(database, backend)
        proxy.come_back()
        executor.submit(jobs.insert_item, "next").result(LONGEST)


@only_postgresql
@pytest.mark.parametrize("has_settled_another", [False, True])
def test_job_that_committed_by_itself_cannot_be_resolved(
    database: Database,
    make_executor: MakeExecutor,
    has_settled_another: bool,
) -> None:
    """There was more than one transaction, so no answer is the whole truth."""
    failures.create_delayed(database)
    executor = make_executor(database.make_engine, 1)
    view = executor.options(resolve=True)
    if has_settled_another:  # whose transaction must not be taken for this job's
        view.submit(jobs.insert_item, "another").result(LONGEST)
    with pytest.raises(OutcomeUnknownError):
        view.submit(faults.commit_oneself_and_die, "a").result(LONGEST)
    worker = executor.submit(jobs.pid).result(LONGEST)
    future = view.submit(failures.commit_and_insert_delayed, "b", 60.0)
    backend = backend_in_commit(database)
    os.kill(worker, signal.SIGKILL)
    terminate(database, backend)
    with pytest.raises(OutcomeUnknownError):
        future.result(LONGEST)
    assert database.names() - {"another"} == {"a", "b"}


@pytest.mark.parametrize(
    "database", ["sqlite", "mariadb-pymysql", "mariadb-mysqldb"], indirect=True
)
def test_database_that_cannot_tell_is_not_asked(
    database: Database, make_executor: MakeExecutor
) -> None:
    """``resolve=True`` is refused before the job starts, by the name of the database."""
    executor = make_executor(database.make_engine, 1)
    view = executor.options(resolve=True)
    with pytest.raises(ResolveNotSupportedError, match="only PostgreSQL") as raised:
        view.submit(jobs.insert_item, "a").result(LONGEST)
    assert raised.value.outcome is Outcome.NEVER_STARTED
    assert database.count() == 0
    executor.submit(jobs.insert_item, "next").result(LONGEST)
