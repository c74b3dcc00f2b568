"""Watches the commits of a worker's engine: whose they are, and whether they are whole.

Runs in a worker.
"""

from __future__ import annotations

import functools
import re
from contextlib import suppress
from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from . import _drivers
from ._alarm import Alarm
from ._inheritance import is_sqlite
from ._phase import Phase, PhaseRecord
from .errors import TransactionAbortedError


@functools.lru_cache(maxsize=512)
def _begins(words: str, statement: str) -> bool:
    """Say whether a statement begins with words, comments before them aside."""
    return _beginning(words).match(statement) is not None


@functools.cache
def _beginning(words: str) -> re.Pattern[str]:
    comments = r"(?:\s|--[^\n]*\n|#[^\n]*\n|/\*.*?\*/)*"
    return re.compile(rf"{comments}(?:{words})\b", re.IGNORECASE | re.DOTALL)


_COMMITS = r"COMMIT|END|PREPARE\s+TRANSACTION"
# MariaDB documentation, "SQL statements that cause an implicit commit"; and a procedure
# may do what it likes.
_COMMITS_ON_MYSQL = (
    r"ALTER|ANALYZE|BEGIN|CACHE|CALL|CHANGE|CHECK|COMMIT|CREATE|DROP|FLUSH|GRANT|INSTALL"
    r"|LOAD\s+INDEX|LOCK|OPTIMIZE|RENAME|REPAIR|RESET|REVOKE"
    r"|SET\b[^=]*\b(?:AUTOCOMMIT|PASSWORD)|START|STOP|TRUNCATE|UNINSTALL|UNLOCK|XA"
)
# Before these alone the sqlite3 module begins a transaction (Python documentation,
# "sqlite3", "Transaction control").
_BEGINS_ON_SQLITE = "INSERT|UPDATE|DELETE|REPLACE"
_READS_ON_SQLITE = (
    r"SELECT|VALUES|EXPLAIN|PRAGMA|BEGIN|ROLLBACK"
    r"|WITH\b(?!.*\b(?:INSERT|UPDATE|DELETE|REPLACE)\b)"
)
_ONE_STATEMENT = "a lock wait timeout undid one statement (error 1205)"
_ALL_BEFORE = "a deadlock undid everything before it (error 1213)"


class CommitWatch:
    """Sees every COMMIT before it is sent, refuses a broken one, notes the phase.

    Args:
        engine: The worker's.
        record: Where the phase is noted.
        alarm: Asked whether there is time for a COMMIT.

    Attributes:
        by_the_job: Whether the running job has committed anything by itself.
    """

    def __init__(self, engine: Engine, record: PhaseRecord, alarm: Alarm) -> None:
        self._record = record
        self._alarm = alarm
        self.by_the_job = False
        self._is_ending = False  # the commits from here on are the executor's
        self._undone: dict[Connection, str] = {}  # what the database undid, and where
        self._committing: DBAPIConnection | None = None  # the last to be committed
        for name in ("commit", "prepare_twophase", "commit_twophase"):
            event.listen(engine, name, self._before_commit)
        event.listen(engine, "begin", self._before_begin)
        event.listen(engine, "engine_connect", self._note_autocommit)
        event.listen(engine, "set_connection_execution_options", self._note_options)
        self._may_abort = engine.dialect.name == "postgresql"
        self._words = _COMMITS
        if engine.dialect.name == "sqlite":
            event.listen(engine, "before_cursor_execute", self._note_on_sqlite)
        else:
            event.listen(engine, "before_cursor_execute", self._note_statement)
        if engine.dialect.name in ("mysql", "mariadb"):
            self._words = _COMMITS_ON_MYSQL
            event.listen(engine, "handle_error", self._note_undone)
            event.listen(engine, "rollback", self._forget_undone)
            event.listen(engine, "rollback_savepoint", self._forget_undone)

    def begin_job(self) -> None:
        """Note that what follows is the next job's."""
        self.by_the_job = self._is_ending = False
        self._committing = None
        self._undone.clear()

    def end_job(self) -> None:
        """Note that the job's function has returned."""
        self._is_ending = True

    def _before_commit(self, connection: Connection, *_twophase: object) -> None:
        self._committing = connection.connection.dbapi_connection
        try:
            if self._may_abort and _drivers.is_aborted(connection):
                raise TransactionAbortedError(
                    "a database error aborted the transaction"
                )
            if self._undone and connection in self._undone:
                raise TransactionAbortedError(self._undone[connection])
            self._alarm.begin_commit()
        except BaseException:
            self.roll_back()
            raise
        self._note_commit()

    def roll_back(self) -> None:
        """Roll back the transaction whose COMMIT has failed.

        SQLAlchemy does not: for it a transaction has ended when its COMMIT raised. But
        SQLite keeps it open when COMMIT is refused (sqlite.org/lang_transaction.html),
        and so does every database when a listener raises before COMMIT is sent.
        """
        if self._committing is not None:
            with suppress(Exception):  # the connection is lost, and the rest with it
                self._committing.rollback()

    def after_commit(self, session: Session) -> None:
        """Note that a session's COMMIT is over; that of a savepoint is none."""
        if not self._is_ending:
            self._alarm.end_commit()
        elif not self.by_the_job and not session.in_nested_transaction():
            self._record.advance(Phase.COMMITTED)

    def _note_commit(self) -> None:
        self.by_the_job = self.by_the_job or not self._is_ending
        self._record.advance(Phase.COMMITTING)

    def _before_begin(self, _connection: Connection) -> None:
        if not self._is_ending:
            self._alarm.end_commit()

    def _note_autocommit(self, connection: Connection) -> None:
        if _drivers.autocommits(connection):
            self._note_commit()

    def _note_options(self, _connection: object, options: dict[str, Any]) -> None:
        if options.get("isolation_level") == "AUTOCOMMIT":
            self._note_commit()

    def _note_statement(
        self, _connection: object, _cursor: object, statement: str, *_rest: object
    ) -> None:
        if _begins(self._words, statement):
            self._note_commit()

    def _note_on_sqlite(
        self, connection: Connection, _cursor: object, statement: str, *_rest: object
    ) -> None:
        if _commits_on_sqlite(connection, statement):
            self._note_commit()

    def _note_undone(self, context: ExceptionContext) -> None:
        error, connection = context.sqlalchemy_exception, context.connection
        if connection is None or not isinstance(error, DBAPIError):
            return
        number = _drivers.mysql_number(error)
        if number == _drivers.DEADLOCK:
            self._undone[connection] = _ALL_BEFORE
        elif number == _drivers.LOCK_WAIT_TIMEOUT:
            self._undone.setdefault(connection, _ONE_STATEMENT)

    def _forget_undone(self, connection: Connection, *savepoint: object) -> None:
        # A savepoint does not outlive a deadlock.
        if not savepoint or self._undone.get(connection) == _ONE_STATEMENT:
            self._undone.pop(connection, None)


def _commits_on_sqlite(connection: Connection, statement: str) -> bool:
    driver_connection: Any = connection.connection.driver_connection
    is_known = is_sqlite(driver_connection)
    if not is_known or driver_connection.in_transaction:
        return _begins(_COMMITS, statement)
    if driver_connection.isolation_level is not None and _begins(
        _BEGINS_ON_SQLITE, statement
    ):
        return False
    return not _begins(_READS_ON_SQLITE, statement)
