"""Asks the driver or the server whether anything was committed, where they can tell.

Runs in both processes. Each takes a connection of the driver's, and raises whatever the driver
raises.
"""

from __future__ import annotations

import re
import time
from contextlib import suppress
from typing import Any

_SAVEPOINT = "dbpool_executor_mark"
_CHANGED_FOR_GOOD = 1196  # ER_WARNING_NOT_COMPLETE_ROLLBACK

_SCHEMAS = (
    "SELECT schema_name, schema_name = DATABASE() FROM information_schema.schemata "
    "WHERE schema_name NOT IN ('information_schema', 'performance_schema', 'mysql', 'sys')"
)
_TABLES = (
    "SELECT table_name FROM information_schema.tables "
    "WHERE table_schema IN ({}) AND table_type = 'BASE TABLE' AND engine NOT IN "
    "(SELECT engine FROM information_schema.engines WHERE transactions = 'YES')"
)
_WORD = re.compile(r"[\w$]+")
_BEFORE_DOT = re.compile(r"([\w$]+)`?\s*\.")
_FRESH = 10.0  # seconds for which a list of tables is believed, and
_FRESH_PER_SECOND = 1000.0  # for each that it took


def begins_by_itself(connection: Any) -> bool:
    """Say whether a driver of SQLite begins a transaction before it writes."""
    return (
        getattr(connection, "isolation_level", None) is not None
        and getattr(connection, "autocommit", None) is not True
    )


def mark(connection: Any) -> None:
    """Leave a savepoint in the transaction: it does not outlive a COMMIT.

    On MySQL and MariaDB, where it does not begin a transaction either, so that what may
    not be said inside one may be said after it.
    """
    _execute(connection, f"SAVEPOINT {_SAVEPOINT}")


def is_marked(connection: Any) -> bool:
    """Undo what came after :func:`mark`, and say whether it was all in one transaction."""
    try:
        _execute(connection, f"ROLLBACK TO SAVEPOINT {_SAVEPOINT}")
    except Exception:  # it does not exist any more, or nobody is there to be asked
        return False
    return True


def has_changed_for_good(connection: Any) -> bool:
    """Say whether the ROLLBACK before this left changes in place, on MySQL and MariaDB.

    That is so for tables without transactions (MariaDB documentation, "ROLLBACK").
    """
    rows = _execute(connection, "SHOW WARNINGS")
    return any(row[1] == _CHANGED_FOR_GOOD for row in rows)


def is_several_files(connection: Any) -> bool:
    """Say whether a connection to SQLite commits its files one by one.

    That is so for attached files under WAL (sqlite.org/lang_attach.html).
    """
    files = [row for row in _execute(connection, "PRAGMA database_list") if row[2]]
    return len(files) > 1 and any(
        _execute(connection, f'PRAGMA "{name}".journal_mode')[0][0] == "wal"
        for _number, name, _file in files
    )


class TablesWithoutTransactions:
    """The tables of a MySQL or MariaDB server that no ROLLBACK reaches.

    A list that is kept for a while. What a trigger, a view or a stored function writes
    to them is not seen in a statement.
    """

    def __init__(self) -> None:
        self._stale_at = 0.0  # on time.monotonic()
        self._others: set[str] = set()  # schemas that are not read
        self._used: set[str] = set()  # schemas that are
        self._names: set[str] = set()  # of the tables

    def forget(self) -> None:
        """Have the list read again: a statement may have changed it."""
        self._stale_at = 0.0

    def are_named_in(self, statement: str, connection: Any) -> bool:
        """Say whether a statement names one of them.

        Args:
            statement: Of those that write.
            connection: Where to ask for the list. What it asks ends no transaction.
        """
        if time.monotonic() >= self._stale_at:
            self._read(connection)
        if not (self._names or self._others):
            return False
        text = statement.lower()
        # Large servers have many schemas: only those that are used are read.
        if (
            self._others
            and "." in text
            and (used := self._others.intersection(_BEFORE_DOT.findall(text)))
        ):
            self._others -= used
            self._used |= used
            self._read_tables(connection)
        # A name that is no word is rare, and looked for anywhere.
        return bool(self._names) and (
            not self._names.isdisjoint(_WORD.findall(text))
            or any(name in text for name in self._names if not _WORD.fullmatch(name))
        )

    def _read(self, connection: Any) -> None:
        start = time.monotonic()
        schemas = [(_text(row[0]), row[1]) for row in _execute(connection, _SCHEMAS)]
        self._used = {name for name, is_current in schemas if is_current}
        self._others = {name for name, is_current in schemas if not is_current}
        self._read_tables(connection)
        end = time.monotonic()
        self._stale_at = end + max(_FRESH, _FRESH_PER_SECOND * (end - start))

    def _read_tables(self, connection: Any) -> None:
        if not self._used:
            self._names = set()
            return
        schemas = ", ".join(
            "'{}'".format(name.replace("\\", "\\\\").replace("'", "''"))
            for name in self._used
        )
        rows = _execute(connection, _TABLES.format(schemas))
        self._names = {_text(row[0]) for row in rows}


def _text(name: Any) -> str:
    text = name.decode() if isinstance(name, (bytes, bytearray)) else str(name)
    return text.lower()


def _execute(connection: Any, statement: str) -> list[Any]:
    cursor = connection.cursor()
    try:
        cursor.execute(statement)
        rows: list[Any] = []
        if cursor.description is not None:
            rows = list(cursor.fetchall())
        return rows
    finally:
        with suppress(Exception):
            cursor.close()
