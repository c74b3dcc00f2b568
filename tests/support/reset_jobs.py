"""Jobs that leave something on their connection, and say what they find there."""

from __future__ import annotations

from sqlalchemy import text

from dbpool_executor import current_engine, session

LOCK = 4711


def leave_all_on_postgresql() -> None:
    """What a careless tenant leaves, and commits."""
    for statement in (
        "SET search_path TO pg_catalog, tenant_7",
        f"SELECT pg_advisory_lock({LOCK})",
        "CREATE TEMPORARY TABLE left_behind (n integer)",
        "PREPARE left_behind AS SELECT 1",
        "LISTEN left_behind",
    ):
        session.execute(text(statement))


def leave_and_fail() -> None:
    """The same, and fail; all but the lock is rolled back by the server."""
    leave_all_on_postgresql()
    raise LookupError


def leave_by_the_engine() -> None:
    """The same, on a connection of current_engine()."""
    with current_engine().connect() as connection:
        connection.execute(text("SET search_path TO pg_catalog, tenant_7"))
        connection.execute(text(f"SELECT pg_advisory_lock({LOCK})"))
        connection.commit()


def found_on_postgresql() -> list[object]:
    """Give what is there, and the session's number."""
    one = session.scalar
    return [
        "tenant_7" in str(one(text("SHOW search_path"))),
        one(text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'")),
        one(text("SELECT to_regclass('pg_temp.left_behind') IS NOT NULL")),
        one(
            text("SELECT count(*) FROM pg_prepared_statements WHERE name = :name"),
            {"name": "left_behind"},
        ),
        one(text("SELECT count(*) FROM pg_listening_channels()")),
    ]


def session_number() -> object:
    """Give the number of the session on the server."""
    return session.scalar(text("SELECT pg_backend_pid()"))


def leave_on_sqlite() -> None:
    """A temporary table."""
    session.execute(text("CREATE TEMPORARY TABLE left_behind (n INTEGER)"))


def found_on_sqlite() -> object:
    """Count it."""
    return session.scalar(text("SELECT count(*) FROM sqlite_temp_master"))


def leave_on_mysql() -> None:
    """A variable, a lock and a temporary table."""
    session.execute(text("SET @left_behind = 1"))
    session.execute(text(f"SELECT GET_LOCK('lock-{LOCK}', 5)"))


def found_on_mysql() -> list[object]:
    """Give what is there."""
    return [
        session.scalar(text("SELECT @left_behind IS NOT NULL")),
        session.scalar(text(f"SELECT IS_FREE_LOCK('lock-{LOCK}')")),
    ]
