"""What differs between drivers: codes, cancelling, rows, forks, leaks; on real servers."""

from __future__ import annotations

import os
from concurrent.futures import wait
from functools import partial
from pathlib import Path

import pg8000.core
import pytest
from sqlalchemy import text

import driver_jobs
import failures
import jobs
import servers
from dbpool_executor import (
    JobTimeoutError,
    Outcome,
    OutcomeUnknownError,
    TransactionAbortedError,
)
from dbpool_executor._drivers import errors
from dbpool_executor._drivers.connections import (
    autocommits,
    descriptor_of,
    is_sqlite,
    status_of,
)
from dbpool_executor._drivers.table import KNOWN, Status, driver_of
from processes import MakeExecutor
from programs import running
from servers import Database
from waiting import LONGEST, wait_until

ALL_SERVERS = [*servers.SERVERS, *servers.OTHERS]
every_driver = pytest.mark.parametrize(
    "database", ["sqlite", *ALL_SERVERS], indirect=True
)
every_server = pytest.mark.parametrize("database", ALL_SERVERS, indirect=True)
every_mariadb = pytest.mark.parametrize(
    "database", [n for n in ALL_SERVERS if n.startswith("mariadb")], indirect=True
)
every_postgresql = pytest.mark.parametrize(
    "database", [n for n in ALL_SERVERS if n.startswith("postgresql")], indirect=True
)


# -- The table -----------------------------------------------------------------------


@every_driver
def test_table_knows_the_driver_and_its_connections(database: Database) -> None:
    """Status, autocommit and descriptor, as the operating system confirms it."""
    engine = database.make_engine()
    with engine.connect() as connection:
        raw = connection.connection.driver_connection
        assert errors.is_known(engine)
        driver = driver_of(raw)
        assert driver is not None
        assert driver.name in KNOWN
        assert is_sqlite(raw) == database.is_sqlite
        if driver.status is not None:
            assert status_of(raw) is Status.IDLE
            connection.execute(text("DELETE FROM item WHERE name = 'nobody'"))
            assert status_of(raw) is Status.OPEN
            connection.rollback()
            assert status_of(raw) is Status.IDLE
        if not database.is_sqlite:
            assert not autocommits(raw)
            descriptor = descriptor_of(raw)
            assert descriptor is not None
            assert os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:")
    if not database.is_sqlite:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as each:
            assert autocommits(each.connection.driver_connection)
    engine.dispose()


def test_driver_that_is_not_known_is_judged_by_nothing() -> None:
    """Neither a status nor a code; an error of COMMIT leaves all open."""
    stranger = driver_jobs.Connection()
    assert status_of(stranger) is None
    assert descriptor_of(stranger) is None
    assert not is_sqlite(stranger)
    error = driver_jobs.wrapped(driver_jobs.Error(1205, "looks like MariaDB's"))
    assert errors.leaves_commit_unknown(error)
    assert not errors.is_transient(error)
    assert errors.mysql_number(error) is None


def test_error_of_a_socket_counts_as_a_lost_connection_only_out_of_a_driver() -> None:
    """pg8000 lets it through; a job's own request to some other server may raise it too."""

    class Reset:
        def read(self, _size: int) -> bytes:
            raise ConnectionResetError

    with pytest.raises(ConnectionResetError) as of_the_driver:
        pg8000.core._read(Reset(), 5)
    with pytest.raises(ConnectionResetError) as of_the_job:
        Reset().read(5)
    assert errors.is_transient(of_the_driver.value)
    assert not errors.is_transient(of_the_job.value)
    assert errors.leaves_commit_unknown(of_the_driver.value)


# -- Codes ---------------------------------------------------------------------------


@every_mariadb
@pytest.mark.parametrize("number", [1205, 1213])
def test_undone_statement_that_was_swallowed_is_no_success(
    database: Database, make_executor: MakeExecutor, number: int
) -> None:
    """The server's own lock wait timeout and deadlock numbers, whatever the driver."""
    executor = make_executor(database.make_engine, 1)
    future = executor.submit(driver_jobs.swallow_number, "a", number)
    with pytest.raises(TransactionAbortedError, match=str(number)):
        future.result(LONGEST)
    assert database.count() == 0
    executor.submit(jobs.insert_item, "next").result(LONGEST)


@every_mariadb
def test_lock_wait_timeout_that_was_swallowed_is_no_success(
    database: Database, make_executor: MakeExecutor
) -> None:
    """A real one: half of the job would be committed."""
    executor = make_executor(database.make_engine, 1)
    with database.outside() as connection:
        connection.exec_driver_sql(driver_jobs.LINK)
        future = executor.submit(driver_jobs.swallow_lock_wait, "a")
        with pytest.raises(TransactionAbortedError, match="1205"):
            future.result(LONGEST)
    assert database.count() == 0


@every_postgresql
def test_error_that_was_swallowed_is_no_success(
    database: Database, make_executor: MakeExecutor
) -> None:
    """COMMIT would be answered with success, and store nothing."""
    executor = make_executor(database.make_engine, 1)
    with pytest.raises(TransactionAbortedError):
        executor.submit(driver_jobs.swallow_error, "a").result(LONGEST)
    assert database.count() == 0


@every_server
def test_session_that_was_terminated_is_transient(
    database: Database, make_executor: MakeExecutor, tmp_path: Path
) -> None:
    """In the middle of the job, by the administrator: the job is run again."""
    executor = make_executor(database.make_engine, 1, retries=3)
    marker = tmp_path / "was-here"
    future = executor.submit(driver_jobs.insert_and_be_terminated, "a", str(marker))
    future.result(LONGEST)
    assert database.names() == {"a"}
    assert executor.stats().retried >= 1


@every_server
def test_serialization_failure_and_deadlock_are_transient(
    database: Database, make_executor: MakeExecutor, tmp_path: Path
) -> None:
    """By the code that the server gives, and no other is."""
    executor = make_executor(database.make_engine, 1, retries=1)
    transient, other = ("40001", "23514") if database.is_postgresql else (1213, 1644)
    marker = tmp_path / "was-here"
    future = executor.submit(driver_jobs.raise_once, "a", transient, str(marker))
    future.result(LONGEST)
    assert executor.stats().retried == 1
    with pytest.raises(Exception, match="raised on purpose"):
        executor.submit(driver_jobs.raise_once, "b", other, "").result(LONGEST)
    assert executor.stats().retried == 1
    assert database.names() == {"a"}


# -- Cancelling ----------------------------------------------------------------------


def statements(database: Database) -> int:
    """Count the statements that the server works on for jobs."""
    sql = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
        "AND backend_type = 'client backend' AND pid <> pg_backend_pid() "
        "AND state = 'active'"
    )
    if database.is_mariadb:
        sql = (
            "SELECT count(*) FROM information_schema.processlist WHERE db = database() "
            "AND id <> connection_id() AND command <> 'Sleep'"
        )
    return int(database.rows(sql)[0][0])


@every_server
def test_statement_that_takes_too_long_is_cancelled_on_the_server(
    database: Database, make_executor: MakeExecutor
) -> None:
    """The error says so, the server is free again, and the worker lives on."""
    executor = make_executor(database.make_engine, 1)
    worker = executor.submit(jobs.pid).result(LONGEST)
    limited = executor.options(timeout=0.3, kill_after=60)
    with pytest.raises(JobTimeoutError, match="its statement was cancelled") as raised:
        limited.submit(failures.insert_and_query, "a").result(LONGEST)
    assert raised.value.outcome is Outcome.ROLLED_BACK
    wait_until(lambda: statements(database) == 0, "the server to be done with it")
    assert executor.submit(jobs.pid).result(LONGEST) == worker
    assert database.count() == 0


def test_job_without_a_statement_is_not_said_to_have_had_one(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """It slept."""
    executor = make_executor(sqlite_database.make_engine, 1)
    limited = executor.options(timeout=0.2, kill_after=60)
    with pytest.raises(JobTimeoutError, match="it was interrupted"):
        limited.submit(failures.insert_and_sleep, "a").result(LONGEST)


def test_job_of_a_worker_that_was_killed_is_told_that(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """And not that its statement was cancelled."""
    executor = make_executor(sqlite_database.make_engine, 1)
    limited = executor.options(timeout=0.2, kill_after=0.3)
    with pytest.raises(JobTimeoutError, match="its worker was killed"):
        limited.submit(failures.insert_and_stop, "a").result(LONGEST)


def test_job_of_a_driver_that_cannot_cancel_is_told_that(
    sqlite_database: Database,
    make_executor: MakeExecutor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What it had asked may go on; and the log has said once what does not hold."""
    factory = partial(driver_jobs.strange_engine, str(sqlite_database.url))
    executor = make_executor(factory, 2)
    wait([executor.submit(jobs.pid) for _ in range(20)], LONGEST)  # by both workers
    limited = executor.options(timeout=0.2, kill_after=60)
    with pytest.raises(JobTimeoutError, match="its driver could not cancel"):
        limited.submit(failures.insert_and_sleep, "a").result(LONGEST)
    told = [record.message for record in caplog.records]
    assert len([text for text in told if "does not know" in text]) == 1


def test_commit_that_a_driver_refuses_whose_codes_are_not_known_is_unknown(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """Somebody reads, so SQLite refuses it; but nobody can tell that from a lost one."""
    sqlite_database.rows("PRAGMA journal_mode = DELETE")
    url = str(sqlite_database.url.set(query={}))
    options = {"connect_args": {"timeout": 0.1}}
    factory = partial(driver_jobs.strange_engine, url, **options)
    executor = make_executor(factory, 1, retries=3)
    with sqlite_database.outside() as connection:
        connection.exec_driver_sql("BEGIN")
        connection.exec_driver_sql("SELECT count(*) FROM item").all()
        with pytest.raises(OutcomeUnknownError):
            executor.submit(jobs.insert_item, "a").result(LONGEST)
    assert executor.stats().retried == 0
    assert sqlite_database.count() == 0


def test_answer_that_is_there_counts_though_nobody_looked_in_time(
    sqlite_database: Database, tmp_path: Path
) -> None:
    """The parent was stopped while a job of milliseconds was done."""
    text = STOPPED.format(url=str(sqlite_database.url))
    with running(tmp_path / "program.py", text) as program:
        told, failed = program.communicate(timeout=60)
    assert told.split() == ["None"] * 5, failed
    assert sqlite_database.count() == 5


STOPPED = """
import os, signal, subprocess, sys
from dbpool_executor import DBPoolExecutor
import jobs

if __name__ == "__main__":
    with DBPoolExecutor({url!r}, 1) as executor:
        executor.submit(jobs.pid).result(60)
        limited = executor.options(timeout=0.2, kill_after=0.1)
        for i in range(5):
            future = limited.submit(jobs.insert_item, f"item {{i}}")
            waker = subprocess.Popen(["sh", "-c", f"sleep 1; kill -CONT {{os.getpid()}}"])
            os.kill(os.getpid(), signal.SIGSTOP)
            print(repr(future.exception(60)))
            waker.wait()
"""


# -- Rows, leaks, forks --------------------------------------------------------------


@every_driver
def test_rows_of_every_type_cross(
    database: Database, make_executor: MakeExecutor
) -> None:
    """Binary ones too, for which psycopg2 gives a memoryview."""
    executor = make_executor(database.make_engine, 1)
    row = executor.submit(driver_jobs.row_of_every_type).result(LONGEST)
    with database.outside() as connection:
        sql = driver_jobs.ROW[connection.dialect.name]
        told = connection.exec_driver_sql(sql).one()
        right = [bytes(v) if isinstance(v, memoryview) else v for v in told]
    assert list(row) == right
    assert row[0] == b"\x00\xff"


@every_driver
def test_connection_that_was_left_open_gives_its_slot_back(
    database: Database, make_executor: MakeExecutor
) -> None:
    """Six jobs leave one open, of a pool that has two; the next job is as ever."""
    factory = partial(database.make_engine, pool_size=1, max_overflow=1, pool_timeout=2)
    executor = make_executor(factory, 1)
    for _ in range(6):
        executor.submit(driver_jobs.leave_open).result(LONGEST)
    assert executor.submit(jobs.count_items).result(LONGEST) == 0
    assert database.is_sqlite or database.sessions() <= 2


@every_server
@pytest.mark.parametrize("use", ["idle", "open"])
def test_connection_of_the_parent_survives_what_a_copy_does(
    database: Database, tmp_path: Path, use: str
) -> None:
    """The copy uses it, closes it and exits as usual; the parent commits."""
    url = database.url.render_as_string(hide_password=False)
    text = FORKS.format(url=url, use=use)
    with running(tmp_path / "program.py", text) as program:
        told, failed = program.communicate(timeout=60)
    assert told.splitlines() == ["copy is kept off", "parent goes on"], failed
    assert database.names() == {"a"}


FORKS = """
import os, sys, warnings, logging
import dbpool_executor
from sqlalchemy import create_engine, text
warnings.simplefilter("ignore")
logging.disable(logging.CRITICAL)
engine = create_engine({url!r})
connection = engine.connect()
connection.execute(text("INSERT INTO item (name, amount) VALUES ('a', 0)"))
raw = connection.connection.driver_connection
if {use!r} == "idle":
    connection.commit()
    connection.close()
copy = os.fork()
if copy == 0:
    try:
        raw.cursor().execute("SELECT 1")
    except BaseException:
        print("copy is kept off", flush=True)
    try:
        raw.close()
    except BaseException:
        pass
    sys.exit()
os.waitpid(copy, 0)
if {use!r} == "idle":
    connection = engine.connect()
assert connection.connection.driver_connection is raw
connection.execute(text("UPDATE item SET amount = 1"))
connection.commit()
print("parent goes on", flush=True)
"""
