"""Programs that fork by themselves, and whose copies use the engines that they inherit.

Imported by ``warm.py``, which runs them; it imports no pytest. No copy makes an engine of
its own.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

from sqlalchemy import (
    AssertionPool,
    Connection,
    Engine,
    NullPool,
    QueuePool,
    StaticPool,
    create_engine,
    event,
    text,
)
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import Pool, SingletonThreadPool

from dbpool_executor import ForkedConnectionError
from models import Item

POOLS: dict[str, dict[str, Any]] = {
    "default": {},
    "pre-ping": {"pool_pre_ping": True},
    "last in, first out": {"pool_use_lifo": True, "pool_pre_ping": True},
    "one": {"pool_size": 1, "max_overflow": 0, "pool_timeout": 1},
    "overflow": {"pool_size": 1, "max_overflow": 1, "pool_timeout": 1},
    "unlimited": {"pool_size": 0},
    "recycled": {"pool_recycle": 3600},
    "null": {"poolclass": NullPool},
    "static": {"poolclass": StaticPool},
    "thread": {"poolclass": SingletonThreadPool},
    "assertion": {"poolclass": AssertionPool},
}

POOLS_OF_ONE = ("null", "static", "thread", "assertion")


def numbers_of(engine: Engine, count: int = 1) -> set[int]:
    """Use several connections of an engine at once, and give their server sessions."""
    connections = [engine.connect() for _ in range(count)]
    try:
        return set(map(_number, connections))
    finally:
        for connection in connections:
            connection.close()


def _number(connection: Connection) -> int:
    is_postgresql = connection.dialect.name == "postgresql"
    name = "pg_backend_pid()" if is_postgresql else "connection_id()"
    return int(connection.scalar(text(f"SELECT {name}")) or 0)


def said_in_copy(act: Callable[[], None]) -> str:
    """Do something in a copy that leaves normally, and give what it says of it.

    Returns:
        Nothing if all went well there, else the traceback.
    """
    read, written = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        try:
            act()
        except BaseException:
            os.write(written, traceback.format_exc()[-4000:].encode())
        os.close(written)
        os._exit(0)
    os.close(written)
    with os.fdopen(read) as said:
        text = said.read()
    os.waitpid(pid, 0)
    return text


# -- What is idle ---------------------------------------------------------------


def idle_pools(url: str) -> dict[str, Any]:
    """Fork with idle connections in pools of every kind; use each in the copy."""
    engines = {name: create_engine(url, **options) for name, options in POOLS.items()}
    counted: list[object] = []
    for engine in engines.values():
        event.listen(engine, "connect", lambda *_: counted.append(1))
    counts = {name: 1 if name in (*POOLS_OF_ONE, "one") else 2 for name in engines}
    before = {name: numbers_of(engines[name], counts[name]) for name in engines}
    connected = len(counted)

    def copy() -> None:
        opened = 0
        for name, engine in engines.items():
            for _ in range(2):
                assert not numbers_of(engine, counts[name]) & set.union(
                    *before.values()
                )
            opened += counts[name] * (2 if name == "null" else 1)
            # Of a pool of one and one more, that one is closed when it comes back.
            opened += name == "overflow"
            assert len(counted) - connected >= opened, name
        again = said_in_copy(grandchild)
        assert not again, again

    def grandchild() -> None:
        for name, engine in engines.items():
            assert not numbers_of(engine, counts[name]) & set.union(*before.values())

    said = [said_in_copy(copy), said_in_copy(copy)]
    after = {name: numbers_of(engines[name], counts[name]) for name in engines}
    kept = [n for n in engines if n != "null" and not before[n] & after[n]]
    return {"said": said, "lost": kept}


def own_pool(url: str) -> dict[str, Any]:
    """Fork with pools that no engine has, and that cannot be made anew."""

    class Stubborn(QueuePool):
        def recreate(self) -> QueuePool:
            raise NotImplementedError

    model = create_engine(url)
    args, kwargs = model.dialect.create_connect_args(model.url)
    connect = partial(model.dialect.connect, *args, **kwargs)
    pools = [QueuePool(connect, pool_size=1, max_overflow=0), Stubborn(connect)]

    def use(pool: Pool) -> int:
        connection = pool.connect()
        try:
            cursor = connection.cursor()
            cursor.execute(
                "SELECT pg_backend_pid()"
                if model.dialect.name == "postgresql"
                else "SELECT connection_id()"
            )
            return int(cursor.fetchall()[0][0])
        finally:
            connection.close()

    before = set(map(use, pools))

    def copy() -> None:
        for pool in pools:
            assert use(pool) not in before
            assert use(pool) not in before

    said = [said_in_copy(copy)]
    return {"said": said, "lost": sorted(before - set(map(use, pools)))}


# -- What is in use -------------------------------------------------------------


def held(url: str) -> dict[str, Any]:
    """Fork with sessions and connections in use, here and in another thread."""
    said: list[str] = []
    committed: list[str] = []
    for name, options in POOLS.items():
        engine = create_engine(url, **options)
        session = Session(engine)
        session.add(Item(name=f"{name} before"))
        session.flush()
        number = _number(session.connection())

        def copy(
            engine: Engine = engine, session: Session = session, number: int = number
        ) -> None:
            for _ in range(2):
                _expect_refusal(lambda: session.execute(text("SELECT 1")))
            _expect_refusal(session.commit)
            session.rollback()
            assert _number(session.connection()) != number
            session.close()
            assert number not in numbers_of(engine)

        said.append(said_in_copy(copy))
        session.add(Item(name=f"{name} after"))
        session.commit()
        session.close()
        engine.dispose()
        committed += [f"{name} before", f"{name} after"]
    return {"said": said, "committed": committed}


def _expect_refusal(use: Callable[[], object]) -> None:
    try:
        use()
    except ForkedConnectionError as error:
        assert str(os.getppid()) in str(error)
        return
    raise AssertionError("it was not refused")


def held_by_others(url: str) -> dict[str, Any]:
    """Fork while other threads use all connections, connect, or hold locks of a pool."""
    options: dict[str, Any] = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 1}
    engine = create_engine(url, **options)
    raw = engine.connect()
    number = _number(raw)
    ready, go_on = threading.Event(), threading.Event()
    pool: Any = engine.pool

    def hold() -> None:
        with pool._pool.mutex, pool._overflow_lock:
            ready.set()
            go_on.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    assert ready.wait(20)

    def copy() -> None:
        assert number not in numbers_of(engine)
        raw.close()  # to the pool that it was from
        assert engine.pool.status() == create_and_use(url, options)

    said = [said_in_copy(copy)]
    go_on.set()
    thread.join(20)
    after = _number(raw)
    raw.close()
    return {"said": said, "is_same": after == number}


def create_and_use(url: str, options: dict[str, Any]) -> str:
    """Tell the state of a pool that was used once."""
    fresh = create_engine(url, **options)
    numbers_of(fresh)
    return fresh.pool.status()


# -- What stays -----------------------------------------------------------------


def embedded(url: str) -> dict[str, Any]:
    """Fork with idle connections to SQLite, a file and a database in memory."""
    memory, file = create_engine("sqlite://"), create_engine(url)
    for engine in (memory, file):
        with engine.begin() as connection:
            connection.execute(text("CREATE TABLE kept (n INTEGER)"))
            connection.execute(text("INSERT INTO kept VALUES (7)"))
    said: list[str] = []

    def copy() -> None:
        logged: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("dbpool_executor").addHandler(handler)
        for engine in (memory, file):
            for _ in range(2):
                with engine.connect() as connection:
                    assert connection.scalar(text("SELECT n FROM kept")) == 7
        assert len(logged) == 2, logged
        assert all(str(os.getppid()) in text for text in logged), logged

    said.append(said_in_copy(copy))
    said.append(said_in_copy(lambda: None))
    return {"said": said}


# -- Asynchronous engines -------------------------------------------------------


def async_pools(url: str) -> dict[str, Any]:
    """Fork with idle and held connections of asynchronous engines; use them anew."""
    engine = create_async_engine(url, pool_size=1, max_overflow=0, pool_timeout=1)
    other = create_async_engine(url, pool_pre_ping=True)

    async def number_of(engine: AsyncEngine) -> int:
        async with engine.connect() as connection:
            return int(await connection.scalar(text("SELECT pg_backend_pid()")) or 0)

    async def main() -> dict[str, Any]:
        session = AsyncSession(engine)
        number = await session.scalar(text("SELECT pg_backend_pid()"))
        idle = await number_of(other)

        async def copy() -> None:
            try:
                await session.execute(text("SELECT 1"))
            except ForkedConnectionError:
                pass
            else:
                raise AssertionError("it was not refused")
            await session.rollback()
            await session.close()
            for _ in range(2):
                assert await number_of(engine) != number
                assert await number_of(other) != idle

        said = said_in_copy(lambda: _in_new_loop(copy))
        again = await session.scalar(text("SELECT pg_backend_pid()"))
        await session.close()
        is_same = (again, await number_of(other)) == (number, idle)
        await engine.dispose()
        await other.dispose()
        return {"said": [said], "is_same": is_same}

    return asyncio.run(main())


def _in_new_loop(act: Callable[[], Any]) -> None:
    asyncio._set_running_loop(None)  # that of the parent, which forked inside of it
    asyncio.run(act())


PROGRAMS = (idle_pools, own_pool, held, held_by_others, embedded, async_pools)
