"""Jobs that commit by themselves, each in a way of its own, and jobs that do not.

Imported by tests and by workers.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from typing import Any

from sqlalchemy import create_engine, insert, select, update
from sqlalchemy.exc import OperationalError

from dbpool_executor import current_engine, session
from models import Item

INSERT = "INSERT INTO item (name, amount) VALUES ('{}', 0)"
PREPARED = (
    "CREATE PROCEDURE IF NOT EXISTS commits() BEGIN COMMIT; END",
    "CREATE PROCEDURE IF NOT EXISTS goes_on() BEGIN COMMIT; START TRANSACTION; END",
    "CREATE PROCEDURE IF NOT EXISTS commits_not() BEGIN SELECT 1; END",
    "CREATE TABLE IF NOT EXISTS forever (name varchar(100)) ENGINE=MyISAM",
    "CREATE TABLE IF NOT EXISTS in_aria (name varchar(100)) ENGINE=Aria",
    "CREATE TABLE IF NOT EXISTS in_memory (name varchar(100)) ENGINE=MEMORY",
)
"""What the jobs on MariaDB need."""


def run(statement: str) -> None:
    """Send a statement as it is."""
    session.connection().exec_driver_sql(statement)


def with_(statement: str, name: str) -> None:
    """Write an item, and send a statement after it."""
    run(INSERT.format(name))
    run(statement)


def by_session(name: str) -> None:
    """Commit the session."""
    session.add(Item(name=name))
    session.commit()


def by_core(name: str) -> None:
    """Commit a connection of the engine's."""
    with current_engine().begin() as connection:
        connection.execute(insert(Item).values(name=name, amount=0))


def by_raw_connection(name: str) -> None:
    """Commit a connection of the driver's, as one does to COPY."""
    raw = current_engine().raw_connection()
    raw.cursor().execute(INSERT.format(name))
    raw.commit()
    raw.close()


def by_view(name: str) -> None:
    """Commit one that a view of the engine has lent."""
    raw = current_engine().execution_options(anything=1).raw_connection()
    raw.cursor().execute(INSERT.format(name))
    raw.commit()
    raw.close()


def by_pool(name: str) -> None:
    """Commit one of the engine's pool, after the first pool was disposed."""
    current_engine().dispose()
    raw = current_engine().pool.connect()
    raw.cursor().execute(INSERT.format(name))
    raw.commit()
    raw.close()


def by_another_engine(name: str) -> None:
    """Commit what nobody has told the executor of."""
    engine = create_engine(current_engine().url)
    with engine.begin() as connection:
        connection.exec_driver_sql(INSERT.format(name))


def by_driver(name: str) -> None:
    """Commit the connection of the driver below the session's."""
    run(INSERT.format(name))
    driver_connection: Any = session.connection().connection.driver_connection
    driver_connection.commit()


def by_cursor(name: str) -> None:
    """Send COMMIT by a cursor of the driver's."""
    cursor = session.connection().connection.cursor()
    cursor.execute(INSERT.format(name))
    cursor.execute("COMMIT")


def by_autocommit(name: str) -> None:
    """Have each statement committed."""
    engine = current_engine().execution_options(isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(INSERT.format(name))


def in_place(table: str, name: str) -> None:
    """Write to a table that knows no transactions."""
    run(f"INSERT INTO {table} (name) VALUES ('{name}')")


def by_copy(name: str) -> None:
    """Write a row, and copy it to a table that knows no transactions."""
    run(INSERT.format(name))
    run(f"INSERT INTO forever SELECT name FROM item WHERE name = '{name}'")


def by_outermost_savepoint(name: str) -> None:
    """Release a savepoint that has begun SQLite's transaction."""
    with session.begin_nested():
        session.add(Item(name=name))


COMMITTING: dict[str, dict[str, Callable[[str], None]]] = {
    "all": {
        "session": by_session,
        "core": by_core,
        "raw connection": by_raw_connection,
        "raw connection of a view": by_view,
        "pool": by_pool,
        "another engine": by_another_engine,
        "driver": by_driver,
        "cursor": by_cursor,
        "autocommit": by_autocommit,
        "COMMIT": partial(with_, "/* it */ COMMIT"),
    },
    "postgresql": {
        "string": partial(with_, "SELECT 1; COMMIT"),
        "string that begins again": partial(with_, "SELECT 1; COMMIT; BEGIN"),
        "CHAIN": partial(with_, "COMMIT AND CHAIN"),
        "DO after COMMIT": partial(with_, "COMMIT; DO $$ BEGIN NULL; END $$"),
    },
    "mariadb": {
        "CREATE": partial(with_, "CREATE TABLE IF NOT EXISTS item2 (n int)"),
        "EXECUTE": partial(
            with_, "EXECUTE IMMEDIATE 'CREATE TABLE IF NOT EXISTS item2 (n int)'"
        ),
        "version": partial(
            with_, "/*!50000 CREATE TABLE IF NOT EXISTS item2 (n int) */"
        ),
        "SET STATEMENT": partial(
            with_,
            "SET STATEMENT max_statement_time = 9 FOR CREATE TABLE IF NOT EXISTS "
            "item2 (n int)",
        ),
        "SET DEFAULT ROLE": partial(with_, "SET DEFAULT ROLE NONE"),
        "CALL": partial(with_, "CALL commits()"),
        "CALL that begins again": partial(with_, "CALL goes_on()"),
        "MyISAM": partial(in_place, "forever"),
        "Aria": partial(in_place, "in_aria"),
        "copy": by_copy,
        "MEMORY": partial(in_place, "in_memory"),
    },
    "sqlite": {"savepoint": by_outermost_savepoint},
}
"""The ways to commit, by the kind of database."""


def by_orm(name: str) -> None:
    """Write by the unit of work."""
    session.add(Item(name=name))
    session.flush()
    session.scalars(select(Item).with_for_update()).all()
    session.execute(update(Item).values(amount=1))


def by_many(name: str) -> None:
    """Write many rows at once."""
    session.execute(insert(Item), [{"name": f"{name} {i}"} for i in range(3)])
    session.execute(
        insert(Item).returning(Item.id), [{"name": f"{name} r{i}"} for i in range(3)]
    )


def by_savepoint(name: str) -> None:
    """Write inside a savepoint, after a write."""
    session.add(Item(name=name))
    session.flush()
    with session.begin_nested():
        session.add(Item(name=f"{name} inner"))


HARMLESS: dict[str, dict[str, Callable[[str], None]]] = {
    "all": {
        "orm": by_orm,
        "many": by_many,
        "savepoint": by_savepoint,
        "text": partial(with_, "SELECT ';'"),
    },
    "postgresql": {
        "DDL": partial(with_, "CREATE TABLE item3 (n int)"),
        "DO": partial(with_, "DO $$ BEGIN PERFORM 1; END $$"),
        "strings": partial(with_, "SELECT 1; SELECT 2"),
        "PREPARE": partial(with_, "PREPARE p AS SELECT 1"),
    },
    "mariadb": {
        "SET": partial(with_, "SET SESSION innodb_lock_wait_timeout = 9"),
        "temporary table": partial(with_, "CREATE TEMPORARY TABLE item4 (n int)"),
    },
    "sqlite": {"DDL": partial(with_, "CREATE TABLE item5 (n int)")},
}
"""The ways to write that commit nothing."""

OPAQUE: dict[str, dict[str, Callable[[str], None]]] = {
    "mariadb": {
        "CALL": partial(with_, "CALL commits_not()"),
        "PREPARE": partial(with_, "PREPARE p FROM 'SELECT 1'"),
        "EXECUTE": partial(with_, "EXECUTE IMMEDIATE 'SELECT 1'"),
    },
}
"""Those that a server can be asked about, and a dead worker cannot."""


def kill() -> None:
    """Die."""
    os.kill(os.getpid(), signal.SIGKILL)


def give_up() -> None:
    """Raise what nobody repeats."""
    raise LookupError("given up")


def lose_connection() -> None:
    """Raise what is repeated if it can be."""
    raise OperationalError("", {}, Exception("lost"), connection_invalidated=True)


DEATHS = {"kill": kill, "raise": give_up, "transient": lose_connection}


def write_and_end(kind: str, group: str, way: str, name: str, death: str) -> None:
    """Write an item in one of the ways, and end in one of the ways."""
    groups = {"COMMITTING": COMMITTING, "HARMLESS": HARMLESS, "OPAQUE": OPAQUE}[group]
    groups[kind][way](name)
    DEATHS[death]()


def insert_link_and_give_up() -> None:
    """Write what a trigger copies, and raise."""
    run("INSERT INTO link (item_id) VALUES (7)")
    lose_connection()
