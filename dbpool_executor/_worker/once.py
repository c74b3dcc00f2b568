"""Runs the jobs that have keys: claim, call, store, all in the job's transaction.

Runs in a worker, in the thread that runs its jobs. The claim comes first: of two jobs with
one key the second waits for the transaction of the first, and then finds its result.
Written last, the row would let both run.
"""

from __future__ import annotations

import hashlib
import pickle
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, inspect
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session

from .._drivers import errors as drivers
from .._ledger.claims import Claims, Entry
from .._ledger.ledger import COMMITTED, SETTLED, Ledger
from .._ledger.results import Kept
from .._wire.locate import name_of
from ..errors import KeyReusedError, LedgerError, NotStorableError, Outcome
from .commit_watch import CommitWatch

_LONGEST_PAUSE = 0.05  # seconds, between two tries to claim
_VIOLATIONS = 3  # in a row that no row explains

_NO_CLAIM = (
    "it has ended its transaction by itself, and its claim with it; use "
    "session.begin_nested() for a part that may fail, and leave the session open"
)

Calls = Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]]


class Once:
    """Runs keyed jobs with the ledger of a worker.

    Args:
        ledger: The executor's.

    Attributes:
        skipped: Calls that were found stored, since this was last set to 0.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._claims = Claims(ledger)
        self._is_checked = False
        self.skipped = 0

    def run(
        self,
        session: Session,
        keys: str | tuple[str, ...],
        fn: Callable[..., object],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        commits: CommitWatch,
    ) -> object:
        """Run a call, or the calls of a chunk, whose keys are not in the ledger yet.

        Args:
            session: The job's, with nothing begun.
            keys: The call's; or of a chunk, one for each call.
            fn: What the job calls.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            commits: Told where the claim is, and asked whether it may be gone.

        Returns:
            What becomes the result of the job, or the results of the chunk.

        Raises:
            LedgerError: The table is missing, or is not what it has to be; or the job has
                ended the transaction of its claim.
            KeyReusedError: A key is another function's.
            NotStorableError: A result is nothing that the ledger keeps.
            Exception: Whatever a call raises, or the database.
        """
        calls: Calls
        if is_chunk := not isinstance(keys, str):
            fn, chunk = args
            calls = [(each, {}) for each in chunk]
        else:
            keys, calls = (keys,), [(args, kwargs)]
        digests = [self._ledger.digest(key) for key in keys]
        self._check(session)
        wanted = dict(zip(digests, keys, strict=True))
        found = self._claim(
            session, wanted, name_of(fn), dict(zip(digests, calls, strict=True))
        )
        claimed = session.get_transaction()
        fairy = self._connection(session)._dbapi_connection
        commits.note_claim(fairy.dbapi_connection if fairy is not None else None)
        values: dict[str, object] = {}
        texts: dict[str, str | None] = {d: entry.result for d, entry in found.items()}
        for digest, (each, keywords) in zip(digests, calls, strict=True):
            if digest not in texts:
                values[digest] = fn(*each, **keywords)
                texts[digest] = self._text(values[digest], wanted[digest])
        # What it does from there on would have no key.
        if values and session.get_transaction() is not claimed:
            raise LedgerError(_NO_CLAIM, Outcome.ROLLED_BACK)
        session.flush()
        if values and commits.may_have_committed:
            there = self._claims.entries(self._connection(session), values)
            if len(there) < len(values):
                raise LedgerError(_NO_CLAIM, Outcome.ROLLED_BACK)
        kept = {d: text for d in values if (text := texts[d]) is not None}
        self._claims.store(self._connection(session), kept)
        self.skipped += sum(digest not in values for digest in digests)
        if self._ledger.results is None:
            loads = self._ledger.encoding.loads
            given = [values[d] if d in values else loads(None) for d in digests]
            return given if is_chunk else given[0]
        return Kept(
            self._ledger.results, [texts[d] for d in digests], is_chunk=is_chunk
        )

    def look_up(self, session: Session, keys: Iterable[str]) -> dict[str, Entry]:
        """Give what is committed of some keys, by key: a job of its own."""
        self._check(session)
        wanted = {self._ledger.digest(key): key for key in keys}
        found = self._claims.entries(self._connection(session), wanted)
        return {wanted[d]: entry for d, entry in found.items() if entry.is_committed}

    def settle(self, session: Session, keys: Sequence[str]) -> Kept | None:
        """Find out what became of a lost job: a job of its own.

        To write its rows is to wait for its transaction. If they can be written, it was
        rolled back, and if it should still come it fails by them.

        Args:
            session: This job's.
            keys: All those of the lost job, which claimed them in one transaction.

        Returns:
            The results; None if the job is rolled back.
        """
        wanted = {self._ledger.digest(key): key for key in keys}
        settled = self._claim(session, wanted, "settled", state=SETTLED)
        if len(settled) < len(wanted):
            return None
        texts = [settled[self._ledger.digest(key)].result for key in keys]
        return Kept(self._ledger.results, texts, is_chunk=True)

    # -- Claims ---------------------------------------------------------------------

    def _claim(
        self,
        session: Session,
        wanted: Mapping[str, str],
        name: str,
        calls: Mapping[str, object] | None = None,
        *,
        state: str = COMMITTED,
    ) -> dict[str, Entry]:
        """Write the rows that are not there, and give those that are committed.

        Nothing of the job has run, so whatever the database undoes here is begun anew,
        for as long as the job has time.
        """
        arguments = {d: _digest_of(call) for d, call in (calls or {}).items()}
        claims = self._claims
        missing, free, found = dict(wanted), set[str](), dict[str, Entry]()
        violations = 0
        while True:
            try:
                on = self._connection(session)
                if missing:
                    claims.insert(on, missing, name, state, arguments)
                if all(
                    claims.take_settled(on, digest, name, state)
                    for digest in sorted(free)
                ):
                    return found
            except IntegrityError as exc:
                session.rollback()
                violations += 1
                entries = self._entries(session, wanted)
                if violations > _VIOLATIONS and not entries.keys() & missing.keys():
                    raise exc from None
            except DBAPIError as exc:
                if exc.connection_invalidated or not drivers.is_transient(exc):
                    raise
                session.rollback()
                entries = self._entries(session, wanted)
            else:
                session.rollback()
                entries = self._entries(session, wanted)
            found = {d: e for d, e in entries.items() if e.is_committed}
            free = {d for d, e in entries.items() if not e.is_committed}
            missing = {d: key for d, key in wanted.items() if d not in entries}
            if state == COMMITTED:
                self._check_names(found, wanted, name)
            if missing or free:
                time.sleep(random.random() * _LONGEST_PAUSE)  # noqa: S311

    def _entries(self, session: Session, digests: Iterable[str]) -> dict[str, Entry]:
        entries = self._claims.entries(self._connection(session), digests)
        # What is claimed next must see what was committed since.
        session.rollback()
        return entries

    def _check_names(
        self, found: Mapping[str, Entry], wanted: Mapping[str, str], name: str
    ) -> None:
        for digest, entry in found.items():
            if not self._ledger.is_same_job(entry.job, name):
                raise KeyReusedError(wanted[digest], entry.job, name)

    def _text(self, value: object, key: str) -> str | None:
        try:
            return self._ledger.encoding.dumps(value)
        except NotStorableError as exc:
            exc.key = key
            raise

    def _connection(self, session: Session) -> Connection:
        # As the session would choose it for the table, where it has several databases.
        return session.connection(bind_arguments={"clause": self._ledger.table})

    # -- The table ------------------------------------------------------------------

    def _check(self, session: Session) -> None:
        """Refuse a table that could not keep what is promised, before the first claim."""
        if self._is_checked:
            return
        table = self._ledger.table
        bind = session.get_bind(clause=table)
        # Not over the job's transaction, of which the questions are no part.
        inspector = inspect(bind)
        if not inspector.has_table(table.name, schema=table.schema):
            raise LedgerError(
                f"{self._ledger!r} has no table, {table.fullname} is not in {bind.engine!r}; "
                "make it by ledger.create(engine), or add ledger.metadata to the migrations"
            )
        columns = {c["name"] for c in inspector.get_columns(table.name, table.schema)}
        if absent := sorted({c.name for c in table.columns} - columns):
            raise LedgerError(
                f"the table {table.fullname} of {self._ledger!r} has another shape: it "
                f"lacks {', '.join(absent)}; give the ledger a table of its own, by "
                "Ledger(table=...)"
            )
        primary = inspector.get_pk_constraint(table.name, table.schema)
        if primary["constrained_columns"] != ["digest"]:
            raise LedgerError(
                f"the table {table.fullname} of {self._ledger!r} has another primary key "
                "than digest, so it cannot keep a key from being claimed twice; make it "
                "by ledger.create(engine)"
            )
        if bind.dialect.name in ("mysql", "mariadb"):
            options = inspector.get_table_options(table.name, table.schema)
            engines = {str(v).lower() for k, v in options.items() if "_engine" in k}
            if engines != {"innodb"}:
                raise LedgerError(
                    f"the table {table.fullname} of {self._ledger!r} is kept by "
                    f"{', '.join(sorted(engines))}, which has no transactions: a row "
                    "would stay where the job is rolled back; ALTER TABLE ... "
                    "ENGINE=InnoDB"
                )
        self._is_checked = True


def _digest_of(call: object) -> str | None:
    try:
        return hashlib.sha256(pickle.dumps(call, 5)).hexdigest()
    except Exception:  # it came by cloudpickle
        return None
