"""Watches the commits of a worker's engine: whose they are, and whether they are whole.

Runs in a worker.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from sqlalchemy import Dialect, Engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from sqlalchemy.pool import PoolProxiedConnection

from .._drivers import errors as drivers
from .._drivers.connections import autocommits, is_sqlite
from .._wire.phase import Phase, PhaseRecord
from ..errors import TransactionAbortedError
from .timeout import Alarm


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
        is_shared: Whether others of this process use the engine's dialect as well.

    Attributes:
        by_the_job: Whether the running job has committed anything by itself.
        is_ending: Whether its function is over: the commits from here on are not its own.
        is_used: Whether there is anything to forget before the next job.
        autocommits: Whether the job has used a connection whose statements commit.
    """

    def __init__(
        self,
        engine: Engine,
        record: PhaseRecord,
        alarm: Alarm,
        *,
        is_shared: bool = False,
    ) -> None:
        self._record = record
        self._alarm = alarm
        self.by_the_job = False
        self.is_ending = False
        self.is_used = False
        self.autocommits = False
        self._committed = 0  # transactions of the job whose COMMIT has succeeded
        # What the database undid, and where.
        self._undone: dict[DBAPIConnection | None, str] = {}
        self._begun: list[DBAPIConnection | None] = []  # connections used by the job
        name = engine.dialect.name
        self._may_abort = name == "postgresql"
        self._is_sqlite = name == "sqlite"
        self._undoes = name in ("mysql", "mariadb")
        self._words = _COMMITS_ON_MYSQL if self._undoes else _COMMITS
        if is_shared:
            self._listen_to(engine)
        else:
            self._wrap(engine.dialect)
        if self._undoes:
            event.listen(engine, "handle_error", self._note_undone)

    def begin_job(self) -> None:
        """Note that what follows is the next job's."""
        self.by_the_job = self.is_ending = self.is_used = self.autocommits = False
        self._committed = 0
        self._begun.clear()
        self._undone.clear()
        self._record.note_xid(0)

    @property
    def committed_all(self) -> bool:
        """Whether every transaction that the job has begun was seen to be committed."""
        return len(self._begun) == self._committed

    @property
    def has_begun(self) -> bool:
        """Whether the job has begun a transaction that was seen."""
        return bool(self._begun)

    def end_job(self) -> None:
        """Note that the function of the job is over."""
        self.is_ending = self.is_used = True

    def roll_back(self) -> None:
        """Roll back what is open, after a COMMIT has failed.

        SQLAlchemy does not: for it a transaction has ended when its COMMIT raised. But
        SQLite keeps it open when COMMIT is refused (sqlite.org/lang_transaction.html),
        and so does every database when a listener raises before COMMIT is sent.
        """
        for connection in self._begun:
            _roll_back(connection)

    def after_commit(self, session: Session) -> None:
        """Note that a session's COMMIT is over; that of a savepoint is none."""
        if not self.is_ending:
            self._alarm.end_commit()
        elif not self.by_the_job and not session.in_nested_transaction():
            self._record.advance(Phase.COMMITTED)

    # -- How it hears -----------------------------------------------------------

    def _wrap(self, dialect: Dialect) -> None:
        """Hear from the dialect, by whose methods an engine does all that it does.

        Dearer are an engine's events: with a single listener, SQLAlchemy joins two sets
        of them anew for each connection of each job (benchmarks/README.md).
        """

        def before(name: str, call: Callable[..., None]) -> None:
            method = getattr(dialect, name)

            def wrapped(*args: Any, **options: Any) -> Any:
                call(*args)
                return method(*args, **options)

            setattr(dialect, name, wrapped)

        # What each job does goes through as few calls as it can.
        does_nothing = DefaultDialect.do_begin
        if getattr(dialect.do_begin, "__func__", None) is does_nothing:
            vars(dialect)["do_begin"] = self._before_begin
        else:
            before("do_begin", self._before_begin)
        do_commit, do_execute = dialect.do_commit, dialect.do_execute

        def commit(connection: PoolProxiedConnection) -> None:
            self._before_commit(connection)
            do_commit(connection)
            self._committed += 1

        def execute(
            cursor: Any, statement: str, values: Any, context: Any = None
        ) -> None:
            if self._is_sqlite or _begins(self._words, statement):
                self._before_statement(cursor, statement)
            do_execute(cursor, statement, values, context)

        vars(dialect).update(do_commit=commit, do_execute=execute)
        for name in ("do_prepare_twophase", "do_commit_twophase"):
            before(name, lambda on, *_rest: self._before_commit(on.connection))
        for name in ("do_executemany", "do_execute_no_params"):
            before(name, self._before_statement)
        before("set_isolation_level", self._note_level)
        if self._undoes:
            before("do_rollback", self._forget_undone)
            before(
                "do_rollback_to_savepoint",
                lambda on, _name: self._forget_undone(on.connection, _ONE_STATEMENT),
            )

    def _listen_to(self, engine: Engine) -> None:
        """Hear from an engine's events, and not of other engines with its dialect."""

        def before(name: str, call: Callable[..., None]) -> None:
            event.listen(engine, name, lambda on, *rest: call(on.connection, *rest))

        before("begin", self._before_begin)
        for name in ("commit", "prepare_twophase", "commit_twophase"):
            before(name, lambda on, *_rest: self._before_commit(on))
        before("commit", self._count_commit)
        event.listen(
            engine,
            "before_cursor_execute",
            lambda _on, *statement: self._before_statement(*statement),
        )
        event.listen(
            engine,
            "set_connection_execution_options",
            lambda on, options: self._note_level(on, options.get("isolation_level")),
        )
        event.listen(
            engine,
            "engine_connect",
            lambda on: self._note_level(
                on, on.get_execution_options().get("isolation_level")
            ),
        )
        if self._undoes:
            before("rollback", self._forget_undone)
            before(
                "rollback_savepoint",
                lambda on, *_rest: self._forget_undone(on, _ONE_STATEMENT),
            )

    def _before_commit(self, connection: PoolProxiedConnection) -> None:
        where = connection.dbapi_connection
        try:
            if self._may_abort and drivers.is_aborted(where):
                raise TransactionAbortedError(
                    "a database error aborted the transaction"
                )
            if self._undone and where in self._undone:
                raise TransactionAbortedError(self._undone[where])
            self._alarm.begin_commit()
        except BaseException:
            _roll_back(where)
            raise
        self._note_commit()

    def _count_commit(self, _connection: object) -> None:
        self._committed += 1

    def _note_commit(self) -> None:
        self.is_used = True
        self.by_the_job = self.by_the_job or not self.is_ending
        self._record.advance(Phase.COMMITTING)

    def _before_begin(self, connection: PoolProxiedConnection) -> None:
        where = connection.dbapi_connection
        self.is_used = True
        self._begun.append(where)
        if self.is_ending:
            return
        if self.by_the_job:
            self._alarm.end_commit()
        if not self._is_sqlite and autocommits(where):
            self.autocommits = True
            self._note_commit()

    def _note_level(self, _connection: object, level: str | None) -> None:
        # At the end of a job it is only put back to what it was.
        if level == "AUTOCOMMIT" and not self.is_ending:
            self.autocommits = True
            self._note_commit()

    def _before_statement(self, cursor: object, statement: str, *_rest: object) -> None:
        if self._is_sqlite:
            commits = _commits_on_sqlite(getattr(cursor, "connection", None), statement)
        else:
            commits = _begins(self._words, statement)
        if commits:
            self._note_commit()

    def _note_undone(self, context: ExceptionContext) -> None:
        error, connection = context.sqlalchemy_exception, context.connection
        if not isinstance(error, DBAPIError) or error.connection_invalidated:
            return
        if connection is None or connection.invalidated:
            return
        self.is_used = True
        number = drivers.mysql_number(error)
        where = connection.connection.dbapi_connection
        if number == drivers.DEADLOCK:
            self._undone[where] = _ALL_BEFORE
        elif number == drivers.LOCK_WAIT_TIMEOUT:
            self._undone.setdefault(where, _ONE_STATEMENT)

    def _forget_undone(
        self, connection: PoolProxiedConnection, what: str | None = None
    ) -> None:
        # A savepoint does not outlive a deadlock.
        if self._undone and what in (
            None,
            self._undone.get(connection.dbapi_connection),
        ):
            self._undone.pop(connection.dbapi_connection, None)


def _roll_back(connection: DBAPIConnection | None) -> None:
    if connection is not None:
        with suppress(Exception):  # it is lost, and what it has not committed
            connection.rollback()


def _commits_on_sqlite(driver_connection: Any, statement: str) -> bool:
    is_known = is_sqlite(driver_connection)
    if not is_known or driver_connection.in_transaction:
        return _begins(_COMMITS, statement)
    if driver_connection.isolation_level is not None and _begins(
        _BEGINS_ON_SQLITE, statement
    ):
        return False
    return not _begins(_READS_ON_SQLITE, statement)
