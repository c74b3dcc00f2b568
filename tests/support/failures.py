"""Jobs that fail, are killed, wait too long or are tried again.

Imported by workers, so it imports no pytest.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Float,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    event,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.exc import DBAPIError

import faults
import jobs
from dbpool_executor import current_engine, session
from models import Item
from servers import Database

metadata = MetaData()

account = Table(
    "account",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("balance", Integer, nullable=False),
)
transfer_log = Table(
    "transfer_log",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("amount", Integer, nullable=False),
)


def create_accounts(database: Database, count: int, balance: int) -> None:
    """Create the accounts anew, and no transfers."""
    with database.outside() as connection:
        metadata.drop_all(connection)
        metadata.create_all(connection)
        rows = [{"id": i, "balance": balance} for i in range(1, count + 1)]
        connection.execute(insert(account), rows)


def transfer(number: int, source: int, target: int, amount: int) -> int:
    """Move an amount between two accounts, and note it; the number is the key."""
    # In the order of the keys, so that two transfers cannot wait for each other.
    for key, change in sorted([(source, -amount), (target, amount)]):
        balance = account.c.balance
        session.execute(
            update(account).where(account.c.id == key).values(balance=balance + change)
        )
    session.execute(insert(transfer_log).values(id=number, amount=amount))
    return number


def note_number(number: int, seconds: float) -> int:
    """Take a while, and write one row whose primary key is the job's own number."""
    time.sleep(seconds)
    session.execute(insert(transfer_log).values(id=number, amount=0))
    return number


def careless_engine(url: str) -> Engine:
    """Make an engine for SQLite that does not wait for the disk."""
    engine = create_engine(url)
    event.listen(engine, "connect", _do_not_wait_for_the_disk)
    return engine


def _do_not_wait_for_the_disk(connection: Any, _record: object) -> None:
    connection.execute("PRAGMA synchronous = OFF")


# -- COMMIT -----------------------------------------------------------------------

delayed = Table(
    "delayed",
    metadata,
    Column("name", String(100), primary_key=True),
    Column("seconds", Float, nullable=False),
    Column("state", String(5), nullable=False),
)
"""On PostgreSQL a row of it makes COMMIT take so long, and then fail with that state."""

_DELAY = """
CREATE OR REPLACE FUNCTION delay() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_sleep(NEW.seconds);
    IF NEW.state <> '' THEN
        RAISE EXCEPTION 'by order of the test' USING ERRCODE = NEW.state;
    END IF;
    RETURN NULL;
END $$
"""
_AT_COMMIT = """
CREATE CONSTRAINT TRIGGER delay AFTER INSERT ON delayed
DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION delay()
"""


def create_delayed(database: Database) -> None:
    """Create the table of rows that delay COMMIT, on PostgreSQL."""
    with database.outside() as connection:
        delayed.drop(connection, checkfirst=True)
        delayed.create(connection)
        for statement in (_DELAY, _AT_COMMIT):
            connection.exec_driver_sql(statement)


def insert_delayed(name: str, seconds: float, state: str = "") -> str:
    """Write an item, and a row that makes COMMIT take a while, or fail."""
    jobs.insert_item(name)
    session.execute(insert(delayed).values(name=name, seconds=seconds, state=state))
    return name


def insert_if_still_empty(name: str, address: tuple[str, int]) -> None:
    """Write an item that depends on what was read, and wait."""
    jobs.count_items()
    jobs.insert_at_gate(name, address)


def commit_and_insert_delayed(name: str, seconds: float) -> None:
    """Commit an item, and go on to a transaction that takes long to commit."""
    jobs.insert_and_commit_oneself(name)
    insert_delayed(f"{name} delayed", seconds)


# -- What is tried again ------------------------------------------------------------


def note_and_insert(record: Path, name: str) -> None:
    """Note that the job runs, and write an item."""
    jobs.note(record)
    jobs.insert_item(name)


def end_with(exc: BaseException | None) -> NoReturn:
    """Raise, or be killed."""
    if exc is None:
        faults.die()
    raise exc


def note_and_raise(record: Path, name: str, exc: BaseException | None) -> None:
    """Note that the job runs, write an item, and raise."""
    note_and_insert(record, name)
    end_with(exc)


def commit_and_raise(record: Path, name: str, exc: BaseException | None) -> None:
    """Do so, but commit the item before."""
    note_and_insert(record, name)
    session.commit()
    end_with(exc)


def commit_by_core_and_raise(
    record: Path, name: str, exc: BaseException | None
) -> None:
    """Do so, with a connection of the engine."""
    jobs.note(record)
    jobs.insert_by_core(name)
    end_with(exc)


def autocommit_and_raise(record: Path, name: str, exc: BaseException | None) -> None:
    """Do so, on a connection that commits each statement by itself."""
    jobs.note(record)
    session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
    jobs.insert_item(name)
    end_with(exc)


def switch_to_autocommit_and_raise(
    record: Path, name: str, exc: BaseException | None
) -> None:
    """Do so, on a connection that was switched over after it was opened."""
    jobs.note(record)
    with current_engine().connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT")
        connection.execute(insert(Item).values(name=name, amount=0))
        end_with(exc)


def execute_and_raise(
    record: Path, name: str, statement: str, exc: BaseException | None
) -> None:
    """Write an item, execute what may commit it, and raise."""
    note_and_insert(record, name)
    session.execute(text(statement))
    end_with(exc)


def execute_first_and_raise(
    record: Path, statement: str, exc: BaseException | None
) -> None:
    """Execute what may be committed by itself, and raise."""
    jobs.note(record)
    session.execute(text(statement))
    end_with(exc)


def note_and_die(record: Path, name: str) -> NoReturn:
    """Note that the job runs, write an item, and be killed."""
    note_and_insert(record, name)
    faults.die()


def die_at_first(record: Path, name: str) -> int:
    """Do so the first time; then tell which worker this is."""
    is_first = not record.exists()
    note_and_insert(record, name)
    if is_first:
        faults.die()
    return os.getpid()


def raise_at_first(record: Path, name: str, exc: BaseException) -> None:
    """Write an item, and raise the first time."""
    is_first = not record.exists()
    note_and_insert(record, name)
    if is_first:
        raise exc


def lost_connection() -> DBAPIError:
    """Make the error of a connection that is gone, as SQLAlchemy tells it."""
    return DBAPIError("SELECT", {}, Exception("gone"), connection_invalidated=True)


def add_to_both(
    first: str,
    second: str,
    address: tuple[str, int],
    record: Path,
    *,
    by_savepoint: bool = False,
) -> None:
    """Change two items, and wait in between the first time that the job runs."""
    is_first = not record.exists()
    jobs.note(record)
    _add_one(first)
    if is_first:
        jobs.wait_at_gate(address)
    with session.begin_nested() if by_savepoint else contextlib.nullcontext():
        _add_one(second)


def read_and_add(name: str, address: tuple[str, int], record: Path) -> None:
    """Read an item, and change it; wait in between the first time."""
    session.scalars(select(Item.amount).where(Item.name == name)).one()
    is_first = not record.exists()
    jobs.note(record)
    if is_first:
        jobs.wait_at_gate(address)
    _add_one(name)


def add_without_patience(name: str) -> None:
    """Change an item; on a server, give up at once if it is locked."""
    match session.get_bind().dialect.name:
        case "postgresql":
            session.execute(text("SET LOCAL lock_timeout = '10ms'"))
        case "mysql":
            session.execute(text("SET innodb_lock_wait_timeout = 1"))
    _add_one(name)


def hasty_engine(url: str) -> Engine:
    """Make an engine for SQLite that does not wait for a lock."""
    return create_engine(url, connect_args={"timeout": 0})


def _add_one(name: str) -> None:
    item = update(Item).where(Item.name == name)
    session.execute(item.values(amount=Item.amount + 1))


# -- What takes too long -------------------------------------------------------------

_SLEEP = {
    "postgresql": "SELECT pg_sleep(600)",
    "mysql": "SELECT SLEEP(600)",
    "sqlite": (
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "
        "SELECT count(*) FROM n"
    ),
}


def insert_and_query(name: str) -> None:
    """Write an item, and have the server work for ten minutes."""
    jobs.insert_item(name)
    session.execute(text(_SLEEP[session.get_bind().dialect.name]))


def insert_and_change(name: str, other: str) -> None:
    """Write an item, and change another one, whoever has locked it."""
    jobs.insert_item(name)
    _add_one(other)


def insert_and_loop(name: str) -> NoReturn:
    """Write an item, and never return."""
    jobs.insert_item(name)
    while True:
        pass


def insert_and_sleep(name: str) -> None:
    """Write an item, and sleep."""
    jobs.insert_item(name)
    sleep()


def sleep() -> None:
    """Sleep, for longer than any test waits."""
    time.sleep(600)


def insert_and_go_on(name: str) -> None:
    """Write an item, and have its end by the time limit be overheard."""
    jobs.insert_item(name)
    with contextlib.suppress(BaseException):
        session.execute(text(_SLEEP[session.get_bind().dialect.name]))


def commit_and_query(name: str) -> None:
    """Commit an item, and have the server work for ten minutes on another."""
    jobs.insert_and_commit_oneself(name)
    insert_and_query(f"{name} again")


def insert_and_stop(name: str) -> None:
    """Write an item, and be stopped as if by Ctrl-Z."""
    jobs.insert_item(name)
    os.kill(os.getpid(), signal.SIGSTOP)


def insert_and_hide(name: str) -> None:
    """Write an item, and let nothing from outside in."""
    jobs.insert_item(name)
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    time.sleep(600)


def query_by_core(name: str) -> None:
    """Have the server work on a connection of the job's own."""
    with current_engine().begin() as connection:
        connection.execute(insert(Item).values(name=name, amount=0))
        connection.execute(text(_SLEEP[connection.dialect.name]))


def isolation() -> str:
    """Ask the server how this job's session is isolated."""
    sql = "SHOW transaction_isolation"
    if session.get_bind().dialect.name == "mysql":
        sql = "SELECT @@tx_isolation"
    return str(session.execute(text(sql)).scalar_one())


# -- The life of a worker ------------------------------------------------------------


def handlers() -> dict[str, str]:
    """Tell what this process does at each signal, as Python knows it."""
    return {
        number.name: repr(signal.getsignal(number))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD)
    }


def insert_at_interrupts(name: str, address: tuple[str, int]) -> None:
    """Be sent three SIGINT in the middle of a transaction."""
    jobs.insert_item(name)
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGINT)
    jobs.wait_at_gate(address)


def give_bytes(size: int, received: bytes = b"") -> bytes:
    """Give back as much as is asked for, whatever came."""
    return b"\0" * size


def leave_open(name: str) -> None:
    """Take a connection, write with it, and forget it."""
    connection = current_engine().connect()
    connection.execute(insert(Item).values(name=name, amount=0))
    _forgotten.append(connection)


_forgotten: list[Connection] = []


def show_warnings_in(record: Path) -> None:
    """As an initializer: have every warning of this worker written to a file."""

    def show(message: Warning | str, category: type[Warning], *_: Any) -> None:
        jobs.note(record, f"{category.__name__}: {message}")

    warnings.simplefilter("always")
    warnings.showwarning = show  # type: ignore[assignment]


def large_pool(url: str, size: int) -> Engine:
    """Make an engine that may hold many connections."""
    return create_engine(url, pool_size=size)


# -- Stages of the table -------------------------------------------------------------


def insert_twice(name: str) -> None:
    """Write an item, and another one of the same name."""
    jobs.insert_item(name)
    jobs.insert_item(name)


def insert_twice_unflushed(name: str) -> None:
    """Leave both to the flush."""
    session.add_all([Item(name=name, amount=0), Item(name=name, amount=0)])


def insert_and_swallow_timeout(name: str) -> None:
    """Write an item, and go on after a lock that was not given in time."""
    jobs.insert_item(name)
    with current_engine().begin() as other:
        other.execute(update(Item).where(Item.name == "locked").values(amount=1))
        with contextlib.suppress(DBAPIError):
            add_without_patience("locked")
        other.rollback()


def die_once(record: Path) -> None:
    """As an initializer: be killed the first time that any worker runs it."""
    is_first = not record.exists()
    jobs.note(record)
    if is_first:
        faults.die()


def insert_and_give_bytes(name: str, size: int, address: tuple[str, int]) -> bytes:
    """Write an item, commit it, wait, and then send a large result."""
    wait = partial(jobs.wait_at_gate, address)
    faults.insert_and_have(name, "close", wait)
    return b"\1" * size


def note_and_query(record: str, name: str) -> None:
    """Note which worker this is, write an item, and have the server work on."""
    jobs.insert_item(name)
    jobs.note(Path(record))
    session.execute(text(_SLEEP[session.get_bind().dialect.name]))


def note_and_loop(record: str) -> NoReturn:
    """Note which worker this is, and never return."""
    jobs.note(Path(record))
    while True:
        pass
