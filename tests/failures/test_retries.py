"""What is tried again, and above all what is not."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError

import failures
import faults
import jobs
import servers
from dbpool_executor import (
    DBPoolExecutor,
    JobTimeoutError,
    NotPlainError,
    Outcome,
    OutcomeUnknownError,
    WorkerDiedError,
)
from processes import MakeExecutor
from proxy import between
from servers import Database
from waiting import LONGEST, Gate, wait_until

only_servers = pytest.mark.parametrize("database", servers.SERVERS, indirect=True)
only_postgresql = pytest.mark.parametrize(
    "database", servers.POSTGRESQLS, indirect=True
)


def runs(record: Path) -> int:
    """Count how often the jobs of a test ran."""
    return len(record.read_text().split()) if record.exists() else 0


def amounts(database: Database) -> dict[str, int]:
    """Give the items and their amounts."""
    return {
        row.name: row.amount for row in database.rows("SELECT name, amount FROM item")
    }


# -- What is tried again -------------------------------------------------------------


@only_servers
@pytest.mark.parametrize("by_savepoint", [False, True], ids=["plain", "savepoint"])
def test_deadlock_is_tried_again(
    database: Database,
    make_executor: MakeExecutor,
    gate: Gate,
    tmp_path: Path,
    by_savepoint: bool,
) -> None:
    """Two jobs that wait for each other are both done in the end, each once."""
    executor = make_executor(database.make_engine, 2)
    for name in ("a", "b"):
        executor.submit(jobs.insert_item, name).result(LONGEST)
    job = partial(failures.add_to_both, address=gate.address, by_savepoint=by_savepoint)
    view = executor.options(retries=3)
    futures = [
        view.submit(job, "a", "b", record=tmp_path / "first"),
        view.submit(job, "b", "a", record=tmp_path / "second"),
    ]
    gate.arrival()
    gate.arrival()
    gate.open()
    for future in futures:
        future.result(LONGEST)
    assert amounts(database) == {"a": 2, "b": 2}
    assert executor.stats().retried >= 1


@only_postgresql
@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_serialization_failure_is_tried_again(
    database: Database,
    make_executor: MakeExecutor,
    gate: Gate,
    tmp_path: Path,
    level: str,
) -> None:
    """A job that read what another has changed meanwhile reads it again."""
    executor = make_executor(database.make_engine, 1)
    executor.submit(jobs.insert_item, "a").result(LONGEST)
    view = executor.options(retries=3, isolation_level=level)
    record = tmp_path / "record"
    future = view.submit(failures.read_and_add, "a", gate.address, record)
    gate.arrival()
    database.execute("UPDATE item SET amount = 5")
    gate.open()
    future.result(LONGEST)
    assert amounts(database) == {"a": 6}
    assert (executor.stats().retried, runs(record)) == (1, 2)


def test_lock_that_is_not_given_is_tried_again(
    database: Database, make_executor: MakeExecutor
) -> None:
    """55P03, 1205 and SQLITE_BUSY: the job is done when the lock is free."""
    factory: Any = database.make_engine
    if database.is_sqlite:
        factory = partial(failures.hasty_engine, str(database.url.set(query={})))
    executor = make_executor(factory, 1)
    executor.submit(jobs.insert_item, "a").result(LONGEST)
    view = executor.options(retries=50)
    with database.outside() as connection:
        connection.exec_driver_sql("UPDATE item SET amount = 5 WHERE name = 'a'")
        future = view.submit(failures.add_without_patience, "a")
        wait_until(lambda: executor.stats().retried, "another try")
    future.result(LONGEST)
    assert amounts(database) == {"a": 6}


@only_servers
def test_server_that_is_down_is_tried_again(
    database: Database, make_executor: MakeExecutor
) -> None:
    """A connection that cannot be made is as good as one that is lost."""
    with between(database) as (proxy, make_engine):
        proxy.go_down()
        executor = make_executor(make_engine, 1, retries=50)
        future = executor.submit(jobs.insert_item, "a")
        wait_until(lambda: executor.stats().retried, "another try")
        proxy.come_back()
        future.result(LONGEST)
        executor.shutdown()
    assert database.names() == {"a"}


def test_lost_connection_is_tried_again(
    database: Database, make_executor: MakeExecutor, tmp_path: Path
) -> None:
    """What SQLAlchemy calls a disconnect, before COMMIT."""
    executor = make_executor(database.make_engine, 1, retries=1)
    record = tmp_path / "record"
    lost = failures.lost_connection()
    executor.submit(failures.raise_at_first, record, "a", lost).result(LONGEST)
    assert (database.names(), runs(record)) == ({"a"}, 2)


@only_servers
def test_connection_that_the_server_ends_is_tried_again(
    database: Database, make_executor: MakeExecutor, gate: Gate, tmp_path: Path
) -> None:
    """The real thing: 57P01, or 2006 and 2013."""
    executor = make_executor(database.make_engine, 1, retries=3)
    record = tmp_path / "record"
    executor.submit(jobs.insert_item, "a").result(LONGEST)
    future = executor.submit(failures.read_and_add, "a", gate.address, record)
    gate.arrival()
    if database.is_postgresql:
        database.rows(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    else:
        sql = "SELECT id FROM information_schema.processlist WHERE db = database()"
        (number,) = [n for (n,) in database.rows(f"{sql} AND id <> connection_id()")]
        database.execute(f"KILL CONNECTION {number}")
        wait_until(lambda: database.sessions() == 0, "the server to end the session")
    gate.open()
    future.result(LONGEST)
    assert amounts(database) == {"a": 1}


def test_dead_worker_is_tried_again_in_another(
    database: Database,
    context: BaseContext,
    make_executor: MakeExecutor,
    tmp_path: Path,
) -> None:
    """The row is there once, and was written by the worker that lives."""
    if not database.is_sqlite and context.get_start_method() == "spawn":
        pytest.skip("shown with SQLite")
    executor = make_executor(database.make_engine, 1, context, retries=1)
    record = tmp_path / "record"
    last = executor.submit(failures.die_at_first, record, "a").result(LONGEST)
    first, second = map(int, record.read_text().split())
    assert (second, database.names()) == (last, {"a"})
    assert first != second
    stats = executor.stats()
    assert (stats.retried, stats.died, stats.done, stats.failed) == (1, 1, 1, 0)


def test_job_that_always_kills_its_worker_ends_after_all_attempts(
    sqlite_database: Database, make_executor: MakeExecutor, tmp_path: Path
) -> None:
    """WorkerDiedError after n + 1 of them; the others are not harmed."""
    executor = make_executor(sqlite_database.make_engine, 2)
    record = tmp_path / "record"
    dying = executor.options(retries=3).submit(failures.note_and_die, record, "dying")
    others = [executor.submit(jobs.insert_item, f"item {i}") for i in range(20)]
    with pytest.raises(WorkerDiedError) as raised:
        dying.result(LONGEST)
    assert raised.value.outcome is Outcome.ROLLED_BACK
    assert (attempts_of(raised.value), runs(record)) == (4, 4)
    for future in others:
        future.result(LONGEST)
    assert sqlite_database.names() == {f"item {i}" for i in range(20)}
    assert executor.stats().died == 4


def test_error_that_stays_tells_how_often_it_was_tried(
    database: Database, make_executor: MakeExecutor, tmp_path: Path
) -> None:
    """The last one is raised as itself."""
    executor = make_executor(database.make_engine, 1, retries=2)
    record = tmp_path / "record"
    lost = failures.lost_connection()
    with pytest.raises(DBAPIError) as raised:
        executor.submit(failures.note_and_raise, record, "a", lost).result(LONGEST)
    assert (attempts_of(raised.value), runs(record)) == (3, 3)
    assert (database.count(), executor.stats().retried) == (0, 2)


def attempts_of(error: BaseException) -> object:
    """Give what the last error of a job says of the others."""
    return getattr(error, "attempts", None)


# -- What is not ---------------------------------------------------------------------


def failing(
    executor: DBPoolExecutor, job: Callable[..., object], *args: object
) -> BaseException:
    """Run a job that fails, with three retries allowed."""
    future: Future[object] = executor.options(retries=3).submit(job, *args)
    error = future.exception(LONGEST)
    assert error is not None
    return error


@pytest.mark.parametrize(
    ("exc", "kind"),
    [
        (ValueError("no"), ValueError),
        (IntegrityError("INSERT", {}, Exception("no")), IntegrityError),
        (OperationalError("SELECT", {}, Exception("no")), OperationalError),
        (SystemExit(3), Exception),
        (OutcomeUnknownError("no"), OutcomeUnknownError),
        (ConnectionError("no"), ConnectionError),
    ],
)
def test_error_that_would_come_again_is_not_tried_again(
    sqlite_database: Database,
    make_executor: MakeExecutor,
    tmp_path: Path,
    exc: BaseException,
    kind: type[Exception],
) -> None:
    """An exception of the job's own, and an error of the database that stays."""
    executor = make_executor(sqlite_database.make_engine, 1)
    record = tmp_path / "record"
    error = failing(executor, failures.note_and_raise, record, "a", exc)
    assert isinstance(error, kind)
    assert (runs(record), executor.stats().retried) == (1, 0)
    assert sqlite_database.count() == 0


@pytest.mark.parametrize(
    ("job", "kind"),
    [
        (faults.give_item, NotPlainError),
        (faults.commit_oneself_and_die, OutcomeUnknownError),
    ],
)
def test_what_the_executor_itself_refuses_is_not_tried_again(
    sqlite_database: Database,
    make_executor: MakeExecutor,
    job: Callable[..., object],
    kind: type[Exception],
) -> None:
    """A result that is not plain, and an outcome that is not known."""
    executor = make_executor(sqlite_database.make_engine, 1)
    assert isinstance(failing(executor, job, "a"), kind)
    assert executor.stats().retried == 0


def test_job_that_took_too_long_is_not_tried_again(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """It would take as long again."""
    executor = make_executor(sqlite_database.make_engine, 1, timeout=0.1)
    error = failing(executor, failures.insert_and_sleep, "a")
    assert isinstance(error, JobTimeoutError)
    assert executor.stats().retried == 0


OWN_COMMITS = [
    failures.commit_and_raise,
    failures.commit_by_core_and_raise,
    failures.autocommit_and_raise,
    failures.switch_to_autocommit_and_raise,
]


@pytest.mark.parametrize("job", OWN_COMMITS)
def test_job_that_committed_anything_is_not_tried_again(
    database: Database,
    make_executor: MakeExecutor,
    tmp_path: Path,
    job: Callable[..., object],
) -> None:
    """However it did, and though its error is one that may pass: the row is there."""
    executor = make_executor(database.make_engine, 1)
    record = tmp_path / "record"
    error = failing(executor, job, record, "a", failures.lost_connection())
    assert isinstance(error, DBAPIError)
    assert (runs(record), executor.stats().retried) == (1, 0)
    assert database.names() == {"a"}


@pytest.mark.parametrize("job", OWN_COMMITS)
def test_death_of_a_job_that_committed_anything_is_unknown(
    database: Database,
    make_executor: MakeExecutor,
    tmp_path: Path,
    job: Callable[..., object],
) -> None:
    """The same, when it is killed instead of raising."""
    executor = make_executor(database.make_engine, 1)
    record = tmp_path / "record"
    error = failing(executor, job, record, "a", None)
    assert isinstance(error, OutcomeUnknownError)
    assert (runs(record), database.names()) == (1, {"a"})


@pytest.mark.parametrize("database", ["mariadb-pymysql"], indirect=True)
@pytest.mark.parametrize(
    "exc", [failures.lost_connection(), None], ids=["raise", "die"]
)
@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE made (id INTEGER)",
        "  drop table if exists made",
        "/* a note */ CREATE TABLE made (id INTEGER)",
        "-- a note\nALTER TABLE item COMMENT 'noted'",
        "# a note\nCREATE OR REPLACE VIEW seen AS SELECT 1",
        "BEGIN",
        "START TRANSACTION",
        "SET autocommit = 1",
        "COMMIT",
        "FLUSH TABLES",
        "CHECK TABLE item",
    ],
)
def test_statement_that_commits_on_mariadb_is_seen(
    database: Database,
    make_executor: MakeExecutor,
    tmp_path: Path,
    statement: str,
    exc: BaseException | None,
) -> None:
    """What was written before it is there; nothing else is said, nothing repeated."""
    database.execute("DROP TABLE IF EXISTS made")
    executor = make_executor(database.make_engine, 1)
    record = tmp_path / "record"
    job = failures.execute_and_raise
    error = failing(executor, job, record, "a", statement, exc)
    assert isinstance(error, OutcomeUnknownError if exc is None else DBAPIError)
    assert (runs(record), database.names()) == (1, {"a"})


@pytest.mark.parametrize(
    "exc", [failures.lost_connection(), None], ids=["raise", "die"]
)
@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE made (id INTEGER)",
        "WITH b(name) AS (SELECT 'a') SELECT name FROM b",
        "INSERT INTO item (name, amount) VALUES ('a', 0)",
        "WITH b(name) AS (SELECT 'a') INSERT INTO item (name, amount) SELECT name, 0 FROM b",
        "REPLACE INTO item (name, amount) VALUES ('a', 0)",
        "/* a note */ INSERT INTO item (name, amount) VALUES ('a', 0)",
        "SAVEPOINT a",
    ],
)
def test_statement_outside_a_transaction_of_sqlite_is_seen(
    sqlite_database: Database,
    make_executor: MakeExecutor,
    tmp_path: Path,
    statement: str,
    exc: BaseException | None,
) -> None:
    """The sqlite3 module begins a transaction before some statements, and not others."""
    executor = make_executor(sqlite_database.make_engine, 1)
    record = tmp_path / "record"
    job = failures.execute_first_and_raise
    error = failing(executor, job, record, statement, exc)
    made = sqlite_database.rows("SELECT name FROM sqlite_schema WHERE name = 'made'")
    if made or sqlite_database.count():
        assert isinstance(error, OutcomeUnknownError if exc is None else DBAPIError)
        assert runs(record) == 1
    elif exc is None:
        assert isinstance(error, (WorkerDiedError, OutcomeUnknownError))
