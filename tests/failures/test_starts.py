"""Workers that hang while they start, and databases that are down meanwhile."""

from __future__ import annotations

import logging
import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, wait
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pymysql
import pytest
from sqlalchemy import create_engine

import jobs
import starting
from dbpool_executor import DBPoolExecutor, WorkerStartError
from dbpool_executor._drivers.errors import may_pass
from dbpool_executor.errors import Outcome
from dbpool_executor.testing import InlineExecutor
from processes import MakeExecutor, worker_pids
from proxy import between
from servers import Database
from waiting import LONGEST, Gate, wait_until

FORK = multiprocessing.get_context("fork")  # with nothing to import
servers_reached = pytest.mark.parametrize(
    "database",
    ["postgresql-psycopg", "postgresql-psycopg2", "mariadb-pymysql"],
    indirect=True,
)


# -- Workers that hang ---------------------------------------------------------------


def interrupt(executor: DBPoolExecutor) -> None:
    """Leave a with block by Ctrl-C."""
    with pytest.raises(KeyboardInterrupt), executor:
        raise KeyboardInterrupt


ENDINGS: dict[str, Callable[[DBPoolExecutor], object]] = {
    "shutdown": lambda executor: executor.shutdown(cancel_futures=True),
    "terminate_workers": DBPoolExecutor.terminate_workers,
    "kill_workers": DBPoolExecutor.kill_workers,
    "interrupt": interrupt,
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_workers_that_hang_while_they_start_do_not_delay_an_end(
    sqlite_database: Database, tmp_path: Path, make_executor: MakeExecutor, ending: str
) -> None:
    """The jobs that wait for them are cancelled, long before their time is up."""
    seen = tmp_path / "seen"
    executor = make_executor(
        sqlite_database.make_engine,
        2,
        initializer=starting.hang,
        initargs=(seen,),
        start_timeout=None,
    )
    futures = [executor.submit(abs, -1) for _ in range(5)]
    wait_until(lambda: seen.exists() and len(seen.read_text()) == 2, "both to hang")
    ender = threading.Thread(target=ENDINGS[ending], args=(executor,), daemon=True)
    ender.start()
    assert not wait(futures, LONGEST).not_done
    ender.join(LONGEST)
    assert not ender.is_alive()
    wait_until(lambda: not worker_pids(), "the workers to end")
    assert all(future.cancelled() for future in futures)
    assert {future.outcome for future in futures} == {Outcome.NEVER_STARTED}


@pytest.mark.parametrize(
    ("make_factory", "initializer", "context", "what"),
    [
        (None, starting.hang_here, FORK, "the initializer did not return"),
        (starting.HangingFactory, None, FORK, "the engine factory did not return"),
        (
            starting.HangingImport,
            None,
            multiprocessing.get_context("forkserver"),
            "its imports did not end",
        ),
    ],
    ids=["initializer", "factory", "import"],
)
def test_start_that_takes_too_long_has_failed(
    sqlite_database: Database,
    make_executor: MakeExecutor,
    make_factory: Any,
    initializer: Any,
    context: Any,
    what: str,
) -> None:
    """Its error says which stage of it has hung, and at which line."""
    factory = sqlite_database.make_engine
    if make_factory is not None:
        factory = make_factory(factory)
    executor = make_executor(
        factory, 3, context, initializer=initializer, start_timeout=1.0
    )
    futures = [executor.submit(abs, -1) for _ in range(3)]
    for future in futures:
        error = future.exception(LONGEST)
        assert isinstance(error, WorkerStartError)
        assert f"{what} within 1 s (start_timeout)" in str(error)
        assert isinstance(error.__cause__, TimeoutError)
        (note,) = error.__cause__.__notes__
        assert "in hang_here" in note


def test_start_that_hangs_breaks_nothing_while_a_worker_is_ready(
    sqlite_database: Database, tmp_path: Path, make_executor: MakeExecutor, gate: Gate
) -> None:
    """However often it does; the jobs that wait are done by that one."""
    executor = make_executor(
        sqlite_database.make_engine,
        2,
        FORK,
        initializer=starting.hang_after_first,
        initargs=(tmp_path / "seen",),
        start_timeout=0.2,
    )
    first = executor.submit(jobs.wait_at_gate, gate.address)
    pid = gate.arrival()
    second = executor.submit(jobs.pid)
    wait_until(lambda: executor.stats().died > 3, "four to fail")
    gate.open()
    first.result(LONGEST)
    assert second.result(LONGEST) == pid


# -- Databases that are down -----------------------------------------------------------


@servers_reached
def test_jobs_wait_for_a_database_that_comes_back(
    database: Database, make_executor: MakeExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    """When the program starts, and when workers are replaced; the log says so once."""
    caplog.set_level(logging.INFO, "dbpool_executor")
    with between(database) as (proxy, make_engine):
        proxy.go_down()
        executor = make_executor(
            make_engine,
            2,
            initializer=starting.ask_server,
            max_tasks_per_child=1,
        )
        for _ in range(2):
            died = executor.stats().died
            futures = [executor.submit(abs, -number) for number in range(4)]
            wait_until(lambda: executor.stats().died > died + 3, "four to fail")  # noqa: B023
            assert not any(future.done() for future in futures)
            proxy.come_back()
            assert [future.result(LONGEST) for future in futures] == [0, 1, 2, 3]
            assert caplog.text.count("which may pass; jobs wait") == 1
            assert "workers can start again" in caplog.text
            wait_until(lambda: not worker_pids(), "the workers to leave")
            caplog.clear()
            proxy.go_down()


@servers_reached
@pytest.mark.parametrize(
    ("patience", "text"), [(0.0, ""), (1.5, "for 1.5 s (connect_pa")]
)
def test_database_that_stays_down_breaks_the_executor(
    database: Database, make_executor: MakeExecutor, patience: float, text: str
) -> None:
    """After the time that was given for it, with its error as the cause."""
    with between(database) as (proxy, make_engine):
        proxy.go_down()
        executor = make_executor(
            make_engine,
            1,
            FORK,
            initializer=starting.ask_server,
            connect_patience=patience,
        )
        error = executor.submit(abs, -1).exception(LONGEST)
        assert isinstance(error, WorkerStartError)
        assert type(error.__cause__).__name__ == "OperationalError"
        assert text in str(error)
        # How many there are in a time depends on the machine.
        assert error.attempts == 3 if not patience else error.attempts >= 1
        with pytest.raises(WorkerStartError):
            executor.submit(abs, -1)


@pytest.mark.parametrize("database", ["mariadb-pymysql"], indirect=True)
def test_password_that_is_wrong_is_not_tried_on_and_on(
    database: Database, make_executor: MakeExecutor
) -> None:
    """Where the driver tells it from a server that is down."""
    url = database.url.set(username="nobody", password="wrong")
    executor = make_executor(
        partial(create_engine, url), 1, initializer=starting.ask_server
    )
    error = executor.submit(abs, -1).exception(LONGEST)
    assert isinstance(error, WorkerStartError)
    assert error.attempts == 3
    assert "Access denied" in str(error)


@pytest.mark.parametrize("database", ["postgresql-psycopg"], indirect=True)
def test_worker_that_is_ready_outlasts_the_patience(
    database: Database, tmp_path: Path, make_executor: MakeExecutor, gate: Gate
) -> None:
    """Others fail to start for longer than was given; it does their jobs."""
    with between(database) as (proxy, make_engine):
        executor = make_executor(
            make_engine,
            2,
            initializer=starting.ask_server,
            connect_patience=0.2,
        )
        first = executor.submit(jobs.wait_at_gate, gate.address)
        pid = gate.arrival()
        proxy.go_down()
        second = executor.submit(jobs.pid)
        wait_until(lambda: executor.stats().died > 3, "four to fail")
        gate.open()
        assert second.result(LONGEST) == pid
        assert first.done()


@pytest.mark.parametrize("database", ["postgresql-psycopg"], indirect=True)
@pytest.mark.parametrize("ending", ENDINGS)
def test_database_that_is_down_does_not_delay_an_end(
    database: Database, make_executor: MakeExecutor, ending: str
) -> None:
    """Jobs that wait for it are cancelled, and nothing more is tried."""
    with between(database) as (proxy, make_engine):
        proxy.go_down()
        executor = make_executor(make_engine, 2, initializer=starting.ask_server)
        futures = [executor.submit(abs, -1) for _ in range(5)]
        wait_until(lambda: executor.stats().died, "one to fail")
        ENDINGS[ending](executor)
        for future in futures:
            with pytest.raises(CancelledError):
                future.result(LONGEST)


# -- The arguments ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (psycopg.OperationalError("connection failed"), True),
        (psycopg.errors.TooManyConnections("no more"), True),
        (psycopg.errors.CannotConnectNow("starting up"), True),
        (psycopg.errors.InvalidPassword("wrong"), False),
        (psycopg.errors.UndefinedTable("no such table"), False),
        (psycopg.ProgrammingError("placeholders"), False),
        (pymysql.OperationalError(2003, "refused"), True),
        (pymysql.OperationalError(1040, "too many"), True),
        (pymysql.OperationalError(1045, "denied"), False),
        (pymysql.OperationalError(1049, "unknown database"), False),
        (ImportError("no module"), False),
        (ConnectionRefusedError("some service"), False),
    ],
)
def test_which_errors_may_pass(error: Exception, passes: bool) -> None:
    """By the codes of the drivers; what has none was about the connection."""
    assert may_pass(error) == passes


@pytest.mark.parametrize("executor_class", [DBPoolExecutor, InlineExecutor])
@pytest.mark.parametrize("name", ["start_timeout", "connect_patience"])
@pytest.mark.parametrize("value", ["1", True, -1, float("nan"), float("inf")])
def test_what_is_no_number_of_seconds_is_refused(
    executor_class: Any, name: str, value: object
) -> None:
    """At once, by its name."""
    with pytest.raises((TypeError, ValueError), match=f"^{name} must be a number"):
        executor_class("sqlite://", **{name: value})


def test_no_time_to_start_is_refused() -> None:
    """It is taken for a wish to have no bound, which has a word of its own."""
    with pytest.raises(ValueError, match="None is for no bound"):
        DBPoolExecutor("sqlite://", start_timeout=0)
    with pytest.raises(TypeError, match="connect_patience"):
        DBPoolExecutor("sqlite://", connect_patience=None)  # type: ignore[arg-type]
