"""What is done in the parent before a worker is forked: it is refused, or made safe."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import multiprocessing
import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import (
    AssertionPool,
    Engine,
    NullPool,
    QueuePool,
    SingletonThreadPool,
    StaticPool,
    create_engine,
    select,
    text,
)
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import Session

import defence
import inherited
import jobs
import processes
import servers
from dbpool_executor import OpenConnectionsError, WorkerDiedError, WorkerStartError
from models import Item
from processes import MakeExecutor
from servers import Database
from waiting import LONGEST, wait_until

if defence.is_taken_away():
    defence.take_away()

FORK = multiprocessing.get_context("fork")

only_servers = pytest.mark.parametrize("database", servers.SERVERS, indirect=True)
only_postgresql = pytest.mark.parametrize(
    "database", ["postgresql-psycopg"], indirect=True
)
inherits_nothing = pytest.mark.parametrize(
    "start_method", ["forkserver", "spawn"], indirect=True
)


@contextlib.contextmanager
def engine_of(url: Any, **options: Any) -> Iterator[Engine]:
    """Make an engine of the parent, and dispose it."""
    engine = create_engine(url, **options)
    try:
        yield engine
    finally:
        engine.dispose()


def connect_idle(engine: Engine, count: int = 1) -> None:
    """Leave some idle connections in a pool."""
    connections = [engine.connect() for _ in range(count)]
    for connection in connections:
        connection.close()


# -- Refused --------------------------------------------------------------------


@only_servers
@pytest.mark.parametrize("is_named", [False, True], ids=["", "parent_engine"])
def test_fork_with_connections_in_use_is_refused_before_anything_is_forked(
    database: Database, make_executor: MakeExecutor, is_named: bool
) -> None:
    """The error names each engine and what it has; its transaction stays whole."""
    before = processes.workers()
    with (
        engine_of(database.url) as one,
        engine_of(database.url.set(database=None), pool_size=1) as other,
        Session(one.execution_options(logging_token="view")) as session,
        one.connect(),
        other.connect(),
    ):
        engines = [one, other] if is_named else None
        executor = make_executor(database.make_engine, 2, FORK, parent_engine=engines)
        session.add(Item(name="parent"))
        session.flush()
        with pytest.raises(OpenConnectionsError) as caught:
            executor.submit(jobs.insert_item, "worker")
        assert processes.workers() == before
        assert not processes.dispatchers()
        assert set(caught.value.held) == {
            f"{one!r} has 2 connections checked out, 1 session in a transaction",
            f"{other!r} has 1 connection checked out",
        }
        session.add(Item(name="parent later"))
        session.commit()
    assert database.names() == {"parent", "parent later"}
    executor.submit(jobs.insert_item, "worker").result(LONGEST)
    assert database.names() == {"parent", "parent later", "worker"}


@only_postgresql
def test_refusal_says_what_to_do_and_no_password(
    database: Database, make_executor: MakeExecutor
) -> None:
    """All three ways out are in the text, for ``map`` as for ``submit``."""
    executor = make_executor(database.make_engine, 1, FORK)
    with engine_of(database.url.set(password="secret")) as engine, engine.connect():
        with pytest.raises(OpenConnectionsError) as caught:
            executor.map(jobs.insert_item, ["worker"])
        said = str(caught.value)
        assert "secret" not in said
        assert repr(engine) in said
    for way_out in (
        "close it before the first submit()",
        "submit a first job before you open it",
        "leave out mp_context",
    ):
        assert way_out in said
    assert database.count() == 0


@only_servers
def test_refusal_ends_when_a_forgotten_session_is_collected(
    database: Database, make_executor: MakeExecutor
) -> None:
    """What is open is what is open now: a session that is garbage counts until then."""
    executor = make_executor(database.make_engine, 1, FORK)
    with engine_of(database.url) as engine:
        session = Session(engine)
        session.add(Item(name="never"))
        session.flush()
        with pytest.raises(OpenConnectionsError):
            executor.submit(jobs.insert_item, "worker")
        del session
        gc.collect()
        executor.submit(jobs.insert_item, "worker").result(LONGEST)
    assert database.names() == {"worker"}


def open_by_session(path: str) -> Callable[[], object]:
    """Open a SQLite file by a session that reads."""
    engine = create_engine(f"sqlite:///{path}")
    session = Session(engine)
    session.execute(select(Item)).all()
    return lambda: (session.close(), engine.dispose())


def open_idle_of_one(path: str) -> Callable[[], object]:
    """Open it by a pool that is never disposed."""
    engine = create_engine(f"sqlite:///{path}", poolclass=StaticPool)
    connect_idle(engine)
    return engine.dispose


def open_directly(path: str) -> Callable[[], object]:
    """Open it without SQLAlchemy."""
    connection = sqlite3.connect(path)
    connection.execute("SELECT count(*) FROM item").fetchall()
    return connection.close


def open_as_file(path: str) -> Callable[[], object]:
    """Open it as any file: to close it ends the locks of SQLite too."""
    return Path(path).open("rb").close


@pytest.mark.parametrize(
    "open_file", [open_by_session, open_idle_of_one, open_directly, open_as_file]
)
def test_fork_with_a_sqlite_file_open_is_refused(
    sqlite_database: Database,
    open_file: Callable[[str], Callable[[], object]],
    make_executor: MakeExecutor,
) -> None:
    """Whoever has opened it, the error names it, and closing it is enough."""
    path = os.path.realpath(sqlite_database.url.database or "")
    before = processes.workers()
    executor = make_executor(sqlite_database.make_engine, 1, FORK)
    close = open_file(path)
    with pytest.raises(OpenConnectionsError, match="SQLite file") as caught:
        executor.submit(jobs.insert_item, "worker")
    assert path in str(caught.value)
    assert processes.workers() == before
    close()
    executor.submit(jobs.insert_item, "worker").result(LONGEST)
    assert sqlite_database.names() == {"worker"}


def test_fork_with_an_empty_sqlite_file_open_is_refused(
    sqlite_database: Database, tmp_path: Path, make_executor: MakeExecutor
) -> None:
    """A file without a header is known by its connection."""
    executor = make_executor(sqlite_database.make_engine, 1, FORK)
    with (
        engine_of(f"sqlite:///{tmp_path / 'empty.db'}") as engine,
        engine.connect(),
        pytest.raises(OpenConnectionsError, match=r"empty\.db"),
    ):
        executor.submit(jobs.insert_item, "worker")
    executor.submit(jobs.insert_item, "worker").result(LONGEST)


def test_worker_is_not_replaced_while_a_sqlite_file_is_open(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """A replacement is refused as the first worker is: its file cannot be made safe."""
    executor = make_executor(sqlite_database.make_engine, 1, FORK)
    executor.submit(jobs.add, 1, 1).result(LONGEST)
    connection = sqlite3.connect(sqlite_database.url.database or "")
    connection.execute("SELECT count(*) FROM item").fetchall()
    with pytest.raises(WorkerDiedError):
        executor.submit(inherited.die).result(LONGEST)
    with pytest.raises(WorkerStartError, match="SQLite file"):
        executor.submit(jobs.insert_item, "worker").result(LONGEST)
    connection.close()
    assert sqlite_database.count() == 0


@only_servers
@inherits_nothing
def test_workers_that_are_not_forks_are_not_refused(
    database: Database, start_method: str, make_executor: MakeExecutor
) -> None:
    """Nothing of the parent's is looked at, closed or cut."""
    context = multiprocessing.get_context(start_method)
    executor = make_executor(database.make_engine, 1, context)
    with engine_of(database.url) as engine, Session(engine) as session:
        session.add(Item(name="parent"))
        session.flush()
        connect_idle(engine, 2)
        assert database.sessions() == 3
        executor.submit(jobs.add, 1, 1).result(LONGEST)
        assert database.sessions() == 3
        session.commit()
    assert database.names() == {"parent"}


# -- Made safe: idle connections ------------------------------------------------


@only_servers
def test_idle_connections_of_every_engine_are_closed_before_the_fork(
    database: Database, make_executor: MakeExecutor
) -> None:
    """The server sees none of them any more, and the engines go on working."""
    executor = make_executor(database.make_engine, 1, FORK)
    with engine_of(database.url) as one, engine_of(database.url, pool_size=3) as other:
        connect_idle(one, 2)
        connect_idle(other, 3)
        assert database.sessions() == 5
        executor.submit(jobs.add, 1, 1).result(LONGEST)
        wait_until(lambda: database.sessions() == 0, "the idle sessions end")
        for engine in (one, other):
            with Session(engine) as session:
                session.add(Item(name=f"parent {id(engine)}"))
                session.commit()
    assert database.count() == 2


@only_servers
def test_idle_connections_are_closed_before_a_worker_is_replaced(
    database: Database, make_executor: MakeExecutor
) -> None:
    """So it is for a replacement, beside a connection that is in use."""
    executor = make_executor(database.make_engine, 1, FORK)
    executor.submit(jobs.add, 1, 1).result(LONGEST)
    with engine_of(database.url) as engine, Session(engine) as session:
        session.add(Item(name="parent"))
        session.flush()
        connect_idle(engine, 2)
        with pytest.raises(WorkerDiedError):
            executor.submit(inherited.die).result(LONGEST)
        executor.submit(jobs.add, 1, 1).result(LONGEST)
        wait_until(lambda: database.sessions() == 1, "the idle sessions end")
        session.commit()
    assert database.names() == {"parent"}


@only_servers
def test_null_pool_has_nothing_to_close(
    database: Database, make_executor: MakeExecutor
) -> None:
    """An engine without idle connections is no reason to refuse."""
    executor = make_executor(database.make_engine, 1, FORK)
    with engine_of(database.url, poolclass=NullPool) as engine:
        connect_idle(engine)
        assert database.sessions() == 0
        executor.submit(jobs.insert_item, "worker").result(LONGEST)
        with engine.connect() as connection:
            assert connection.scalar(text("SELECT count(*) FROM item")) == 1


@only_postgresql
def test_idle_connections_of_a_frozen_engine_are_closed(
    database: Database, make_executor: MakeExecutor
) -> None:
    """``gc.freeze()``, which preloading servers call, hides engines from ``gc``."""
    executor = make_executor(database.make_engine, 1, FORK)
    with engine_of(database.url) as engine:
        connect_idle(engine, 2)
        gc.freeze()
        try:
            executor.submit(jobs.add, 1, 1).result(LONGEST)
        finally:
            gc.unfreeze()
        wait_until(lambda: database.sessions() == 0, "the idle sessions end")
        connect_idle(engine, 2)


@pytest.mark.parametrize(
    ("url", "pool"),
    [
        ("sqlite://", SingletonThreadPool),
        ("sqlite://", StaticPool),
        ("sqlite:///:memory:", SingletonThreadPool),
        ("sqlite:///file:shared?mode=memory&cache=shared&uri=true", QueuePool),
    ],
)
def test_database_in_memory_is_left_alone(
    sqlite_database: Database,
    url: str,
    pool: type,
    make_executor: MakeExecutor,
) -> None:
    """What is in it is there after the fork."""
    executor = make_executor(sqlite_database.make_engine, 1, FORK)
    with engine_of(url, poolclass=pool) as engine:
        with engine.begin() as connection:
            connection.execute(text("CREATE TABLE kept (id integer)"))
            connection.execute(text("INSERT INTO kept VALUES (1)"))
        executor.submit(jobs.insert_item, "worker").result(LONGEST)
        with engine.connect() as connection:
            assert connection.scalar(text("SELECT id FROM kept")) == 1
    assert sqlite_database.names() == {"worker"}


@only_servers
@pytest.mark.parametrize("pool", [StaticPool, AssertionPool])
def test_connection_of_a_pool_of_one_is_left_alone(
    database: Database, pool: type, make_executor: MakeExecutor
) -> None:
    """What was set on it for all its users is set still."""
    executor = make_executor(database.make_engine, 1, FORK)
    with engine_of(database.url, poolclass=pool) as engine:
        with engine.connect() as connection:
            connection.execute(text("CREATE TEMPORARY TABLE kept (id integer)"))
            connection.commit()
        executor.submit(jobs.insert_item, "worker").result(LONGEST)
        with engine.connect() as connection:
            assert connection.scalar(text("SELECT count(*) FROM kept")) == 0
    assert database.names() == {"worker"}


# -- The engine that is named ---------------------------------------------------


@only_servers
def test_engine_that_is_named_is_disposed_under_every_start_method(
    database: Database, start_method: str, make_executor: MakeExecutor
) -> None:
    """Its idle connections are closed; another engine's are not, unless it forks."""
    context = multiprocessing.get_context(start_method)
    with engine_of(database.url) as named, engine_of(database.url) as other:
        connect_idle(named, 2)
        connect_idle(other, 1)
        executor = make_executor(database.make_engine, 1, context, parent_engine=named)
        assert database.sessions() == 3
        executor.submit(jobs.add, 1, 1).result(LONGEST)
        left = 0 if start_method == "fork" else 1
        wait_until(lambda: database.sessions() == left, "the idle sessions end")


# -- Asynchronous engines -------------------------------------------------------


def asynchronous(database: Database) -> AsyncEngine:
    """Make an asynchronous engine for the same database."""
    url = database.url.difference_update_query(["application_name"])
    return create_async_engine(url.set(drivername="postgresql+asyncpg"))


@only_postgresql
@pytest.mark.parametrize("is_named", [False, True])
def test_idle_connections_of_an_asynchronous_engine_are_closed(
    database: Database,
    start_method: str,
    is_named: bool,
    make_executor: MakeExecutor,
) -> None:
    """In a running loop, which goes on with the engine afterwards."""
    pytest.importorskip("asyncpg")
    engine = asynchronous(database)
    executor = make_executor(
        database.make_engine,
        1,
        multiprocessing.get_context(start_method),
        parent_engine=engine if is_named else None,
    )

    async def main() -> int:
        connections = [await engine.connect() for _ in range(2)]
        for connection in connections:
            await connection.close()
        assert database.sessions() == 2
        await asyncio.wrap_future(executor.submit(jobs.add, 1, 1))
        left = 0 if is_named or start_method == "fork" else 2
        wait_until(lambda: database.sessions() == left, "the idle sessions end")
        async with engine.connect() as connection:
            answer: int = (await connection.execute(text("SELECT 1"))).scalar_one()
        await engine.dispose()
        return answer

    assert asyncio.run(main()) == 1


@only_postgresql
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_idle_connections_of_a_loop_that_is_closed_are_closed(
    database: Database, make_executor: MakeExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    """There is nobody left to await their end."""
    pytest.importorskip("asyncpg")
    # SQLAlchemy logs that the loop is closed, and the record would keep the connection.
    caplog.set_level(logging.CRITICAL, "sqlalchemy.pool")
    engine = asynchronous(database)

    async def main(engine: AsyncEngine) -> None:
        async with engine.connect() as connection:
            await connection.execute(text("SELECT 1"))

    asyncio.run(main(engine))
    assert database.sessions() == 1
    executor = make_executor(database.make_engine, 1, FORK)
    executor.submit(jobs.add, 1, 1).result(LONGEST)
    del engine
    gc.collect()
    wait_until(lambda: database.sessions() == 0, "the idle session ends")


@only_postgresql
def test_fork_with_an_asynchronous_connection_in_use_is_refused(
    database: Database, make_executor: MakeExecutor
) -> None:
    """And its transaction is whole afterwards."""
    pytest.importorskip("asyncpg")
    executor = make_executor(database.make_engine, 1, FORK)

    async def main() -> None:
        engine = asynchronous(database)
        async with engine.begin() as connection:
            await connection.execute(text("INSERT INTO item VALUES (1, 'parent', 0)"))
            with pytest.raises(OpenConnectionsError, match="1 connection checked out"):
                executor.submit(jobs.insert_item, "worker")
        await engine.dispose()

    asyncio.run(main())
    assert database.names() == {"parent"}


def test_sqlite_file_of_an_asynchronous_engine_is_closed_when_it_is_idle(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """And refused while it is in use."""
    pytest.importorskip("aiosqlite")
    executor = make_executor(sqlite_database.make_engine, 1, FORK)

    async def main() -> None:
        url = sqlite_database.url.set(drivername="sqlite+aiosqlite")
        engine = create_async_engine(url)
        async with engine.begin() as connection:
            await connection.execute(text("INSERT INTO item VALUES (1, 'parent', 0)"))
            with pytest.raises(OpenConnectionsError):
                executor.submit(jobs.insert_item, "worker")
        await asyncio.wrap_future(executor.submit(jobs.insert_item, "worker"))
        await engine.dispose()

    asyncio.run(main())
    assert sqlite_database.names() == {"parent", "worker"}
