"""Watches the commits of a job: whose they are, whether they are whole, what is lost.

Runs in a worker.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from weakref import WeakSet

from sqlalchemy import Connection
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from sqlalchemy.pool import PoolProxiedConnection

from .._drivers import errors as drivers
from .._drivers import questions
from .._drivers.connections import autocommits, status_of
from .._drivers.statements import Effect
from .._drivers.table import Status
from .._wire.phase import Phase, PhaseRecord
from ..errors import LedgerError, Outcome, TransactionAbortedError
from .timeout import Alarm
from .traits import Traits

_ONE_STATEMENT = "a lock wait timeout undid one statement (error 1205)"
_OWN_COMMIT = (
    "it commits by itself: its claim would be committed without its result, and what it "
    "does then would have no key; leave the COMMIT to the end of the job, and use "
    "session.begin_nested() for a part that may fail"
)
_ELSEWHERE = (
    "it has written to another database than the ledger is in, which no COMMIT can store "
    "together with the claim; write there in a job of its own"
)
_ALL_BEFORE = "a deadlock undid everything before it (error 1213)"

Where = DBAPIConnection | None


class CommitWatch:
    """Sees every COMMIT before it is sent, refuses a broken one, notes the phase.

    A statement that may commit is noted as a commit of the job's own before it is sent:
    what cannot be excluded has to be expected, should the worker die. It is taken back
    where the driver or the server proves that nothing was committed.

    Args:
        record: Where the phase is noted.
        alarm: Asked whether there is time for a COMMIT.
        found: Called with each connection of an engine that is not watched.

    Attributes:
        by_the_job: Whether the running job may have committed anything by itself.
        is_ending: Whether its function is over: the commits from here on are not its own.
        is_used: Whether there is anything to forget before the next job.
        autocommits: Whether the job has used a connection whose statements commit.
        is_work_lost: Whether a session of the job was closed with work that was not
            committed.
        has_committed: Whether, of the commits at the end of the job, one has succeeded.
    """

    def __init__(
        self, record: PhaseRecord, alarm: Alarm, found: Callable[[Connection], None]
    ) -> None:
        self._record = record
        self._alarm = alarm
        self._found = found
        self.by_the_job = False
        self.is_ending = False
        self.is_used = False
        self.autocommits = False
        self._committed = 0  # transactions of the job whose COMMIT has succeeded
        self.is_work_lost = False
        self.has_committed = False
        # What the database undid, and where.
        self._undone: dict[Where, str] = {}
        self._begun: list[Where] = []  # connections used by the job
        self._written: dict[Where, Traits] = {}  # where work is not committed
        self._marked: set[Where] = set()  # where a savepoint tells of commits
        self._prepared: set[Where] = set()  # where a transaction is, and not ended
        self._owners: dict[Where, int] = {}  # sessions of the job, by id()
        # Rolled back by a session, which has not yet said that it was meant to be.
        self._dropped: set[Where] = set()
        self._watched: WeakSet[object] = WeakSet()  # dialects
        self._has_begun_to_commit = False  # at the end, where nothing is heard after it
        self._claimed: Where = None  # where the keys of the job are

    def begin_job(self) -> None:
        """Note that what follows is the next job's."""
        self.by_the_job = self.is_ending = self.is_used = self.autocommits = False
        self.is_work_lost = self.has_committed = self._has_begun_to_commit = False
        self._committed = 0
        self._claimed = None
        self._begun.clear()
        self._undone.clear()
        self._written.clear()
        self._marked.clear()
        self._prepared.clear()
        self._owners.clear()
        self._dropped.clear()
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

    @property
    def may_have_committed(self) -> bool:
        """Whether it is not known that the job has committed nothing by itself."""
        return self.by_the_job or bool(self._marked)

    def note_claim(self, where: Where) -> None:
        """Note that the job has claimed its keys, so that all its work is to be there."""
        self._claimed = where
        self.is_used = True

    @property
    def has_claim(self) -> bool:
        """Whether the job has claimed its keys."""
        return self._claimed is not None

    @property
    def is_left_prepared(self) -> bool:
        """Whether a transaction is prepared: others may commit it, or roll it back."""
        return bool(self._prepared)

    @property
    def has_several(self) -> bool:
        """Whether the job has begun transactions on more than one connection."""
        return len(set(map(id, self._begun))) > 1

    def has_lost_work(self, current: Session | None) -> bool:
        """Say whether work of the job would be lost although it has not raised.

        Args:
            current: The session that will be committed; None if there is none.
        """
        return (
            self.is_work_lost
            or bool(self._dropped)
            or any(
                self._owners.get(where, id(current)) != id(current)
                for where in self._written
            )
        )

    def roll_back(self) -> bool:
        """Roll back what is open, after a COMMIT has failed.

        SQLAlchemy does not: for it a transaction has ended when its COMMIT raised. But
        SQLite keeps it open when COMMIT is refused (sqlite.org/lang_transaction.html),
        and so does every database when a listener raises before COMMIT is sent.

        Returns:
            Whether it is not known that nothing was committed.
        """
        # What they could tell went with the transaction.
        self.by_the_job = self.may_have_committed
        is_split = False
        for where in self._begun:
            traits = self._written.get(where)
            if traits is not None and traits.is_sqlite:
                with suppress(Exception):
                    is_split |= questions.is_several_files(where)
            _roll_back(where)
        return self.has_committed or is_split or self.is_left_prepared

    def ask(self) -> None:
        """Roll back, now that the job has failed, and ask whether that is all of it."""
        for where in self._marked:
            self.by_the_job |= not questions.is_marked(where)
        self._marked.clear()
        for where, traits in list(self._written.items()):
            # Also what is left of a session that the job has kept for itself.
            _roll_back(where)
            if traits.undoes and not self.by_the_job:
                self._ask_after_rollback(where)
        self._written.clear()

    def give_up(self) -> None:
        """Take it that what cannot be asked any more is committed."""
        self.by_the_job = self.may_have_committed
        self._marked.clear()

    # -- What sessions tell ------------------------------------------------------

    def after_begin(
        self, session: Session, _transaction: object, connection: Connection
    ) -> None:
        """Note whose a connection is, and watch its engine."""
        if connection.dialect not in self._watched:
            self._found(connection)
        fairy = connection._dbapi_connection
        if fairy is not None:
            self._owners[fairy.dbapi_connection] = id(session)
        if self._dropped:  # it has begun again, and said nothing
            self.is_work_lost = True
            self._dropped.clear()

    def after_commit(self, session: Session) -> None:
        """Note that a session's COMMIT is over; that of a savepoint is none."""
        if not self.is_ending:
            self._alarm.end_commit()
        elif not self.by_the_job and not session.in_nested_transaction():
            self._record.advance(Phase.COMMITTED)

    def after_rollback(self, session: Session) -> None:
        """Note that a session was rolled back on purpose; its close() says nothing."""
        if self._dropped and not session.in_nested_transaction():
            own = id(session)
            self._dropped = {w for w in self._dropped if self._owners.get(w) != own}

    def before_close(self, session: Session) -> None:
        """Note what a session that is closed has not even sent."""
        if self.is_ending or self.is_work_lost:
            return
        if (
            session.new
            or session.deleted
            or any(map(session.is_modified, session.dirty))
        ):
            self.is_used = self.is_work_lost = True

    # -- What engines tell -------------------------------------------------------

    def note_watched(self, dialect: object) -> bool:
        """Note that the engines with a dialect are watched.

        Returns:
            Whether they have been before.
        """
        was_watched = dialect in self._watched
        self._watched.add(dialect)
        return was_watched

    def note_lent(self, where: Where, traits: Traits) -> None:
        """Note that the job has got a driver's own connection, where it may commit."""
        if not self.is_ending:
            self._note_commit()
            self._written[where] = traits

    def before_begin(self, connection: PoolProxiedConnection, traits: Traits) -> None:
        """Note where a transaction begins."""
        where = connection.dbapi_connection
        self.is_used = True
        self._begun.append(where)
        if self.is_ending:
            return
        if self.by_the_job:
            self._alarm.end_commit()
        if not traits.is_sqlite and autocommits(where):
            self.autocommits = True
            self._note_commit()

    def before_commit(self, connection: PoolProxiedConnection, traits: Traits) -> None:
        """Refuse a COMMIT that would not be whole, or note it.

        Raises:
            TransactionAbortedError: It would store half a job, or nothing.
            LedgerError: It would store what a job with a key has done without the key, or
                the key without what the job has done.
            JobInterrupt: The time is up.
        """
        where = connection.dbapi_connection
        try:
            if self._claimed is not None:
                self._refuse_apart_from_claim(where)
            if traits.may_abort and drivers.is_aborted(where):
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

    def after_commit_of(self, connection: PoolProxiedConnection) -> None:
        """Note that a COMMIT has succeeded."""
        self._written.pop(connection.dbapi_connection, None)
        self.forget_prepared(connection.dbapi_connection)
        self._committed += 1
        if self.is_ending:
            self.has_committed = True

    def after_prepare_of(self, connection: PoolProxiedConnection) -> None:
        """Note that a transaction is prepared: a ROLLBACK does not reach it any more."""
        self._prepared.add(connection.dbapi_connection)

    def forget_prepared(self, where: Where) -> None:
        """Note that what was prepared has been committed or rolled back."""
        if self._prepared:
            self._prepared.discard(where)

    def before_untold_commit(
        self, connection: PoolProxiedConnection, traits: Traits
    ) -> None:
        """Do the same where nobody says whether it has succeeded."""
        # If there is another one, the last one has.
        self.has_committed |= self._has_begun_to_commit
        self.before_commit(connection, traits)
        self._committed += 1
        self._has_begun_to_commit = self.is_ending
        self._written.pop(connection.dbapi_connection, None)

    def before_rollback(self, connection: PoolProxiedConnection) -> Traits | None:
        """Ask what can be asked before a ROLLBACK, and note what is lost by it.

        Returns:
            What :meth:`after_rollback_of` needs, if anything was written.
        """
        where = connection.dbapi_connection
        self.forget_undone(where)
        traits = self._written.pop(where, None)
        if traits is None:
            return None
        if where in self._marked:
            self.by_the_job |= not questions.is_marked(where)
            self._marked.discard(where)
            if not self.may_have_committed:
                self._record.advance(Phase.RUNNING)
        if (
            where in self._owners
            and not self.is_ending
            and status_of(where) is not Status.IDLE
            and not autocommits(where)
        ):
            self._dropped.add(where)
        return traits

    def after_rollback_of(
        self, connection: PoolProxiedConnection, traits: Traits
    ) -> None:
        """Ask whether a ROLLBACK has left anything where it was."""
        if traits.undoes and not self.by_the_job:
            self._ask_after_rollback(connection.dbapi_connection)

    def before_statement(
        self, effect: Effect, where: Where, statement: str, traits: Traits
    ) -> bool:
        """Note what a statement may do.

        Returns:
            Whether :meth:`after_statement` has to be called.
        """
        self.is_used = True
        self._written[where] = traits
        if traits.is_sqlite:
            is_open = status_of(where) is Status.OPEN
            if effect is Effect.COMMITS:
                is_first = not self.may_have_committed
                self._note_commit()
                return is_open and is_first
            if not is_open and not (
                effect is Effect.WRITES and questions.begins_by_itself(where)
            ):
                self._note_commit()
        elif effect is Effect.COMMITS:
            if traits.tables is not None:
                traits.tables.forget()
            if not (traits.undoes and self._mark(where)):
                self._note_commit()
        elif traits.tables is not None and not self.by_the_job:
            try:
                commits = traits.tables.are_named_in(statement, where)
            except Exception:  # nobody is there to be asked
                commits = True
            if commits:
                self._note_commit()
        return False

    def after_statement(self, where: Where) -> None:
        """Take back that a statement may have committed, if the driver proves it.

        SQLite's alone: what ends its transaction begins no other one.
        """
        if status_of(where) is Status.OPEN:
            self.by_the_job = False
            self._record.note_own_commit(happened=False)
            self._record.advance(Phase.RUNNING)

    def note_level(self, level: str | None) -> None:
        """Note that a connection commits each statement from now on."""
        # At the end of a job it is only put back to what it was.
        if level == "AUTOCOMMIT" and not self.is_ending:
            self.autocommits = True
            self._note_commit()

    def note_undone(self, context: ExceptionContext) -> None:
        """Note what an error of MySQL or MariaDB has undone."""
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

    def before_rollback_to_savepoint(self, connection: PoolProxiedConnection) -> None:
        """Forget the statement that was undone: what is left is whole again."""
        # A savepoint does not outlive a deadlock.
        where = connection.dbapi_connection
        if self._undone.get(where) == _ONE_STATEMENT:
            del self._undone[where]

    def forget_undone(self, where: Where) -> None:
        """Forget what was undone: nothing is left."""
        if self._undone:
            self._undone.pop(where, None)

    # -- ------------------------------------------------------------------------

    def _refuse_apart_from_claim(self, where: Where) -> None:
        if not self.is_ending:
            # To end a transaction that has only read is no harm.
            if where is not self._claimed and where not in self._written:
                return
            raise LedgerError(_OWN_COMMIT, Outcome.ROLLED_BACK)
        if any(other is not self._claimed for other in self._written):
            raise LedgerError(_ELSEWHERE, Outcome.ROLLED_BACK)

    def _note_commit(self) -> None:
        self.is_used = True
        if not self.is_ending:
            self.by_the_job = True
            self._record.note_own_commit()
        self._record.advance(Phase.COMMITTING)

    def _mark(self, where: Where) -> bool:
        """Leave a savepoint that tells whether what follows commits."""
        if self.is_ending or self.by_the_job or autocommits(where):
            return False
        if where not in self._marked:
            try:
                questions.mark(where)
            except Exception:  # the statement will say why
                return False
            self._marked.add(where)
        self._record.note_own_commit()
        self._record.advance(Phase.COMMITTING)
        return True

    def _ask_after_rollback(self, where: Where) -> None:
        with suppress(Exception):  # it is lost, and what it has not committed
            self.by_the_job |= questions.has_changed_for_good(where)


def _roll_back(connection: Where) -> None:
    if connection is not None:
        with suppress(Exception):  # it is lost, and what it has not committed
            connection.rollback()
