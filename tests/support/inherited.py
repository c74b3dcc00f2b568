"""The classic program: a module whose globals hold an engine and a session.

Imported by tests, by programs that fork and by workers, so it imports no pytest. Nor
does it import the package, which some of those programs must not know.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json.tool
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable
from typing import Any

from sqlalchemy import (
    Connection,
    CursorResult,
    Engine,
    NullPool,
    StaticPool,
    create_engine,
    exc,
    literal,
    select,
    text,
)
from sqlalchemy.orm import Session

from models import Item

engine: Engine
session: Session

STREAMED = 5_000
"""Rows of an open result: more than a driver and a socket keep for a reader."""


def init(url: str, **options: Any) -> None:
    """Bind the globals, or bind them anew: the former session's last use is over."""
    global engine, session
    engine = create_engine(url, **options)
    session = Session(engine)


def open_stream(connection: Connection) -> CursorResult[Any]:
    """Ask for many rows that come as they are read."""
    numbers = {
        "postgresql": f"generate_series(1, {STREAMED}) AS t(n)",
        "sqlite": (
            "(WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t "
            f"LIMIT {STREAMED}) SELECT n FROM t) AS t"
        ),
    }.get(connection.dialect.name, f"(SELECT seq AS n FROM seq_1_to_{STREAMED}) AS t")
    connection = connection.execution_options(stream_results=True, max_row_buffer=100)
    return connection.execute(text(f"SELECT n, '{'x' * 100}' FROM {numbers}"))


class Reading:
    """A result that the parent is in the middle of."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._reader = engine.connect()
        self._stream = open_stream(self._reader)
        self._read = [row[0] for row in self._stream.fetchmany(10)]

    def go_on(self) -> list[str]:
        """Do the next statement, read to the end, commit; give what was committed."""
        assert session.scalar(select(literal(self.name))) == self.name
        self._read += [row[0] for row in self._stream]
        assert self._read == list(range(1, STREAMED + 1))
        self._reader.close()
        session.add(Item(name=f"{self.name} after"))
        session.commit()
        return [f"{self.name} after"]


class Work(Reading):
    """What the parent has under way: such a result, and a transaction."""

    def __init__(self, name: str) -> None:
        session.add(Item(name=f"{name} before"))
        session.flush()
        super().__init__(name)

    def go_on(self) -> list[str]:
        """As above."""
        return [f"{self.name} before", *super().go_on()]


def rebind_and_write(url: str, name: str) -> str:
    """As a job, or in a copy: make an engine and a session, and write with them."""
    init(url)
    gc.collect()
    session.add(Item(name=name))
    session.commit()
    session.close()
    return name


def die() -> None:
    """As a job: end the worker in the middle of it."""
    os.kill(os.getpid(), signal.SIGKILL)


def drop_and_collect() -> None:
    """As a job: let go of the inherited session and engine."""
    global engine, session
    del engine, session
    gc.collect()


def dispose_and_collect() -> None:
    """As a job: close the inherited session and engine."""
    session.close()
    engine.dispose()
    gc.collect()


def write() -> None:
    """As a job: write with an engine and a session of its own."""
    with Session(create_engine(engine.url)) as own:
        own.add(Item(name="own"))
        own.commit()


def import_and_log(number: int) -> int:
    """As a job: take the import lock, and those of logging."""
    importlib.reload(json.tool)
    logging.getLogger("dbpool_executor").warning("from the worker")
    return number


# -- Jobs that fork -----------------------------------------------------------------


def fork_and_wait(address: tuple[str, int]) -> int:
    """As a job: leave a copy of the worker behind, which waits at a gate."""
    from jobs import wait_at_gate

    pid = os.fork()
    if pid == 0:
        wait_at_gate(address)
        os._exit(0)
    return pid


def start_and_wait(address: tuple[str, int]) -> int:
    """As a job: the same by ``multiprocessing``."""
    from jobs import wait_at_gate

    process = multiprocessing.get_context("fork").Process(
        target=wait_at_gate, args=(address,)
    )
    process.start()
    assert process.pid is not None
    return process.pid


def leave_copy_and_die(
    leave_copy: Callable[..., int], address: tuple[str, int]
) -> None:
    """As a job: leave a copy behind, and end the worker."""
    leave_copy(address)
    die()


def fork_and_return(name: str, address: tuple[str, int]) -> int:
    """As a job: come back from it in a copy as well, and go on when that has ended."""
    from jobs import insert_item, wait_at_gate

    insert_item(name)
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        wait_at_gate(address)
    return pid


# -- Beside a forkserver that has preloaded a module which connects -----------------

PRELOADED = "DBPOOL_TEST_PRELOADED"


def global_engine() -> Engine:
    """As an engine factory: give the engine of the globals."""
    return engine


def static_engine() -> Engine:
    """As an engine factory: make an engine with one connection for all."""
    return create_engine(engine.url, poolclass=StaticPool)


def make_engine() -> Engine:
    """As an engine factory: make an engine."""
    return create_engine(os.environ[PRELOADED])


def preloaded_engine() -> Engine:
    """As an engine factory: give the engine that the forkserver has connected."""
    import preloaded

    return preloaded.engine


def use_preloaded() -> tuple[int, str]:
    """As a job: use what was preloaded as its own.

    Returns:
        The number of the forkserver's session on the server, and how it went.
    """
    import preloaded

    assert preloaded.pid == os.getppid()
    try:
        if preloaded.server_session() == preloaded.number:
            return preloaded.number, "shared"
        preloaded.session.rollback()
    except exc.DBAPIError:
        return preloaded.number, "refused"
    finally:
        preloaded.engine.dispose()
        gc.collect()
    return preloaded.number, "fine"


def is_in_transaction(url: str, number: int) -> bool:
    """Ask a server whether one of its sessions has written and not yet ended."""
    sql = (
        "SELECT count(*) FROM pg_stat_activity WHERE pid = :number "
        "AND state = 'idle in transaction' AND backend_xid IS NOT NULL"
    )
    outside = create_engine(url, poolclass=NullPool)
    if outside.dialect.name in ("mysql", "mariadb"):
        sql = (
            "SELECT count(*) FROM information_schema.innodb_trx "
            "WHERE trx_mysql_thread_id = :number"
        )
    with outside.connect() as connection:
        return bool(connection.scalar(text(sql), {"number": number}))


# -- Beside connections that are no pool's --------------------------------------

raw: Any


def connect_raw(url: str, *, detached: bool) -> None:
    """Bind a global to a driver's connection, and write over it.

    Args:
        url: Of the database.
        detached: Whether it was a pool's once. Otherwise SQLAlchemy never knew it.
    """
    global raw
    unbound = create_engine(url)
    if detached:
        raw = unbound.raw_connection()
        raw.detach()
    else:
        args, kwargs = unbound.dialect.create_connect_args(unbound.url)
        raw = unbound.dialect.connect(*args, **kwargs)
    raw.cursor().execute("INSERT INTO item (name, amount) VALUES ('raw', 0)")


def end_raw() -> None:
    """As a job: undo what was written over the inherited connection, and close it."""
    with contextlib.suppress(Exception):
        raw.rollback()
    with contextlib.suppress(Exception):
        raw.close()


def end() -> None:
    """Let go of what the globals hold."""
    session.close()
    engine.dispose()
