"""One engine and one session per worker, and what the server sees of them."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from functools import partial
from multiprocessing.context import BaseContext
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.ext.asyncio import create_async_engine

import faults
import jobs
import servers
from processes import MakeExecutor, worker_pids
from servers import Database
from waiting import LONGEST, Gate, wait_until

only_servers = pytest.mark.parametrize("database", servers.SERVERS, indirect=True)
one_server = pytest.mark.parametrize("database", ["postgresql-psycopg"], indirect=True)


def noted(record: Path) -> list[str]:
    """Read what workers noted in a file."""
    return record.read_text().split() if record.exists() else []


# -- The engine -------------------------------------------------------------------


def test_each_worker_makes_its_own_engine_once(
    sqlite_database: Database,
    context: BaseContext,
    make_executor: MakeExecutor,
    gate: Gate,
    tmp_path: Path,
) -> None:
    """The factory is called once in each worker and never in the parent."""
    record = tmp_path / "record"
    factory = partial(jobs.recording_engine, str(sqlite_database.url), record)
    executor = make_executor(factory, 2, context)
    assert noted(record) == []
    at_once = [executor.submit(jobs.wait_at_gate, gate.address) for _ in range(2)]
    workers = {gate.arrival(), gate.arrival()}
    gate.open()
    later = [executor.submit(jobs.insert_item, f"item {i}") for i in range(10)]
    for future in [*at_once, *later]:
        future.result(LONGEST)
    executor.shutdown()
    assert sorted(noted(record)) == sorted(map(str, workers))
    assert os.getpid() not in workers


def test_jobs_of_a_worker_share_its_engine(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """``current_engine()`` is the engine of the session, the same in each job."""
    executor = make_executor(sqlite_database.make_engine, 1)
    seen = [executor.submit(jobs.engine_identity).result(LONGEST) for _ in range(3)]
    assert len(set(seen)) == 1
    _pid, engine, bind = seen[0]
    assert engine == bind


def test_server_sees_one_session_per_worker(
    database: Database, make_executor: MakeExecutor, gate: Gate
) -> None:
    """Workers that work at the same time have a connection each, and keep it."""
    executor = make_executor(database.make_engine, 2)
    for _ in range(2):
        names = [f"item {database.count() + i}" for i in range(2)]
        futures = [
            executor.submit(jobs.insert_at_gate, name, gate.address)
            for name in names[: 1 if database.is_sqlite else 2]
        ]
        for _future in futures:
            gate.arrival()
        assert database.sessions() == len(futures)
        gate.open()
        for future in futures:
            future.result(LONGEST)
    assert database.sessions() == len(futures)
    executor.shutdown()
    wait_until(lambda: database.sessions() == 0, "the server to end the sessions")


@pytest.mark.parametrize("to_factory", [lambda url: url, str])
def test_url_stands_for_an_engine(
    sqlite_database: Database,
    make_executor: MakeExecutor,
    to_factory: Callable[[object], str],
) -> None:
    """A URL, as an object or as text, does for an engine factory."""
    executor = make_executor(to_factory(sqlite_database.url), 1)
    executor.submit(jobs.insert_item, "by url").result(LONGEST)
    assert sqlite_database.names() == {"by url"}


# -- The initializer and the session ------------------------------------------------


def test_initializer_has_engine_and_session_and_is_committed(
    database: Database, context: BaseContext, make_executor: MakeExecutor
) -> None:
    """It runs before the first job, with its arguments, as a transaction."""
    executor = make_executor(
        database.make_engine,
        1,
        context,
        initializer=jobs.insert_table_named,
        initargs=("tables",),
    )
    assert executor.submit(jobs.count_items).result(LONGEST) == 1
    (name,) = database.names()
    assert {"item", "link"} <= set(name.removeprefix("tables ").split(","))


def test_initializer_runs_once_in_each_worker(
    sqlite_database: Database, make_executor: MakeExecutor, gate: Gate
) -> None:
    """Each worker that runs jobs has run it, and none has run it twice."""
    executor = make_executor(
        sqlite_database.make_engine,
        2,
        initializer=jobs.insert_own_item,
        initargs=("worker",),
    )
    futures = [executor.submit(jobs.wait_at_gate, gate.address) for _ in range(2)]
    workers = {gate.arrival(), gate.arrival()}
    gate.open()
    futures += [executor.submit(jobs.add, 1, 2) for _ in range(10)]
    for future in futures:
        future.result(LONGEST)
    assert sqlite_database.names() == {f"worker {pid}" for pid in workers}


def test_initializer_leaves_nothing_in_the_first_jobs_session(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """It is a transaction of its own, with a session of its own."""
    executor = make_executor(
        sqlite_database.make_engine,
        1,
        initializer=jobs.insert_and_leave_traces,
        initargs=("a",),
    )
    traces = executor.submit(jobs.look_for_traces).result(LONGEST)
    assert (traces["objects"], traces["new"], traces["info"]) == (0, 0, {})
    assert sqlite_database.names() == {"a", "a pending"}


def test_finalizer_ends_each_worker_as_a_transaction(
    database: Database, context: BaseContext, make_executor: MakeExecutor
) -> None:
    """It runs after the last job, also of a worker that has done as many as it may."""
    executor = make_executor(
        database.make_engine,
        1,
        context,
        max_tasks_per_child=1,
        finalizer=jobs.insert_own_item,
        finalargs=("end of",),
    )
    workers = [executor.submit(jobs.pid).result(LONGEST) for _ in range(2)]
    executor.shutdown()
    assert database.names() == {f"end of {pid}" for pid in workers}


def test_finalizer_that_raises_is_rolled_back_and_told(
    sqlite_database: Database,
    make_executor: MakeExecutor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It costs no job its result, and no worker its end."""
    executor = make_executor(
        sqlite_database.make_engine,
        1,
        finalizer=jobs.insert_and_raise,
        finalargs=("lost", ValueError("no more")),
    )
    executor.submit(jobs.insert_item, "kept").result(LONGEST)
    executor.shutdown()
    assert sqlite_database.names() == {"kept"}
    told = [record.getMessage() for record in caplog.records]
    assert [text for text in told if "finalizer" in text and "no more" in text]
    assert executor.stats().died == 0


def test_session_options_reach_the_session(
    sqlite_database: Database, context: BaseContext, make_executor: MakeExecutor
) -> None:
    """They are the arguments of the worker's ``sessionmaker``."""
    executor = make_executor(
        sqlite_database.make_engine,
        1,
        context,
        session_options={
            "class_": faults.ObedientSession,
            "autoflush": False,
            "expire_on_commit": False,
            "info": {"from": "options"},
        },
    )
    assert executor.submit(jobs.session_settings).result(LONGEST) == {
        "class": "ObedientSession",
        "autoflush": False,
        "expire_on_commit": False,
        "info": {"from": "options"},
    }


def test_session_has_the_defaults_of_sqlalchemy(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """Without options it is as ``sessionmaker(engine)`` makes it."""
    executor = make_executor(sqlite_database.make_engine, 1)
    assert executor.submit(jobs.session_settings).result(LONGEST) == {
        "class": "Session",
        "autoflush": True,
        "expire_on_commit": True,
        "info": {},
    }


# -- The end ------------------------------------------------------------------------


@only_servers
def test_worker_that_leaves_says_goodbye_to_the_server(
    database: Database, context: BaseContext, make_executor: MakeExecutor
) -> None:
    """Its connections are closed in the way of their protocol, not just dropped."""

    def breaks_off() -> bool:
        executor = make_executor(database.make_engine, 1, context)
        executor.submit(jobs.count_items).result(LONGEST)
        before = database.broken_sessions()
        executor.shutdown()
        wait_until(lambda: database.sessions() == 0, "the server to end the session")
        return database.broken_sessions() > before

    # MariaDB counts for all its databases together: what others break in the meantime
    # must not fail this test. A worker that says no goodbye breaks off each time.
    assert not all(breaks_off() for _ in range(10))


@only_servers
def test_server_notices_a_worker_that_says_no_goodbye(
    database: Database, make_executor: MakeExecutor
) -> None:
    """The test above can fail: a worker that is killed is counted."""
    executor = make_executor(database.make_engine, 1)
    executor.submit(jobs.count_items).result(LONGEST)
    before = database.broken_sessions()
    # Not by kill_workers(), at which an idle worker may still leave by itself.
    (worker,) = worker_pids()
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: database.broken_sessions() > before, "the server to notice")


@one_server
def test_worker_that_is_replaced_says_goodbye_to_the_server(
    database: Database, make_executor: MakeExecutor
) -> None:
    """Having done its last task it leaves as it would at the end."""
    before = database.broken_sessions()
    executor = make_executor(database.make_engine, 1, max_tasks_per_child=1)
    for _ in range(3):
        executor.submit(jobs.count_items).result(LONGEST)
    wait_until(lambda: database.sessions() == 0, "the server to end the sessions")
    assert database.broken_sessions() == before


def test_worker_that_cannot_initialize_closes_its_connections(
    database: Database, make_executor: MakeExecutor
) -> None:
    """The engine is disposed, and the initializer's work rolled back."""
    executor = make_executor(
        database.make_engine, 1, initializer=faults.fail_to_initialize
    )
    assert executor.submit(jobs.count_items).exception(LONGEST) is not None
    executor.shutdown()
    wait_until(lambda: database.sessions() == 0, "the server to end the sessions")
    assert database.count() == 0


# -- The parent's own engine ----------------------------------------------------------


def use_engine(engine: Engine) -> set[int]:
    """Leave an idle connection in an engine's pool, and name its descriptors."""
    before = jobs.open_inodes()
    with engine.connect() as connection:
        connection.execute(text("SELECT count(*) FROM item"))
    return jobs.open_inodes() - before


@pytest.mark.parametrize(
    "database", ["sqlite", "postgresql-psycopg", "mariadb-pymysql"], indirect=True
)
def test_parent_engine_is_disposed_before_the_first_worker_starts(
    database: Database, context: BaseContext, make_executor: MakeExecutor
) -> None:
    """No worker holds a descriptor of the parent's, and the server has closed them."""
    engine = database.make_engine()
    parents = use_engine(engine)
    assert parents
    executor = make_executor(database.make_engine, 1, context, parent_engine=engine)
    assert parents <= jobs.open_inodes()
    inherited = executor.submit(jobs.open_inodes).result(LONGEST)
    assert parents & (inherited | jobs.open_inodes()) == set()
    executor.shutdown()
    wait_until(lambda: database.sessions() == 0, "the server to end the session")
    assert use_engine(engine), "the engine goes on working"
    engine.dispose()


@one_server
def test_several_parent_engines_are_disposed(
    database: Database, context: BaseContext, make_executor: MakeExecutor
) -> None:
    """``parent_engine`` may be a list."""
    engines = [create_engine(database.url) for _ in range(2)]
    parents = use_engine(engines[0]) | use_engine(engines[1])
    executor = make_executor(database.make_engine, 1, context, parent_engine=engines)
    inherited = executor.submit(jobs.open_inodes).result(LONGEST)
    assert parents & (inherited | jobs.open_inodes()) == set()
    executor.shutdown()
    wait_until(lambda: database.sessions() == 0, "the server to end the sessions")


@pytest.mark.parametrize(
    ("database", "driver", "is_running"),
    [
        ("sqlite", "sqlite+aiosqlite", True),
        ("sqlite", "sqlite+aiosqlite", False),
        ("postgresql-psycopg", "postgresql+asyncpg", True),
        # What asyncpg has open can be closed by its own event loop alone.
        ("postgresql-psycopg", "postgresql+psycopg", True),
        ("postgresql-psycopg", "postgresql+psycopg", False),
    ],
    indirect=["database"],
)
def test_async_parent_engine_is_disposed(
    database: Database,
    driver: str,
    is_running: bool,
    make_executor: MakeExecutor,
) -> None:
    """Whether its event loop runs at the first submit or has ended."""
    pytest.importorskip(driver.split("+")[1])
    url = database.url.difference_update_query(["application_name", "timeout"])
    engine = create_async_engine(url.set(drivername=driver))
    executor = make_executor(database.make_engine, 1, parent_engine=engine)
    parents: set[int] = set()

    async def main() -> None:
        before = jobs.open_inodes()
        async with engine.connect() as connection:
            await connection.execute(text("SELECT count(*) FROM item"))
        parents.update(jobs.open_inodes() - before)
        if is_running:
            assert await asyncio.wrap_future(executor.submit(jobs.count_items)) == 0

    asyncio.run(main())
    assert executor.submit(jobs.count_items).result(LONGEST) == 0
    executor.shutdown()
    assert parents
    # Drivers close in their own time: in a thread, or with the next turn of the loop.
    wait_until(
        lambda: not parents & jobs.open_inodes(), "the parent's connection to be closed"
    )
    wait_until(lambda: database.sessions() == 0, "the server to end the sessions")
