"""Claims, looks up and settles keys: Core statements over a connection.

Runs in both processes: workers execute them, in the transaction of a job, and the parent
gets what they find. No upsert and no dialect's own SQL: the one
thing asked of a database is that a second INSERT of a primary key waits for the
transaction of the first, and then fails.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection, bindparam, insert, select, update

from .ledger import COMMITTED, SETTLED, Ledger, now

_IN_ONE_QUERY = 1000  # digests; some databases take no longer lists


class Entry(NamedTuple):
    """A row of the ledger.

    Attributes:
        state: COMMITTED or SETTLED.
        attempt: That wrote it.
        job: Qualified name of its function.
        result: Its text; None if there is none.
    """

    state: str
    attempt: int
    job: str
    result: str | None

    @property
    def is_committed(self) -> bool:
        """Whether the effect of the key is in the database."""
        return self.state == COMMITTED


class Claims:
    """The statements of one ledger, which SQLAlchemy compiles once.

    Args:
        ledger: It.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        table = ledger.table
        columns = table.c
        self._insert = insert(table)
        self._select = select(
            columns.digest, columns.state, columns.attempt, columns.job, columns.result
        ).where(columns.digest.in_(bindparam("digests", expanding=True)))
        self._take = (
            update(table)
            .where(columns.digest == bindparam("at"), columns.state == SETTLED)
            .values(
                state=bindparam("as"),
                attempt=columns.attempt + 1,
                job=bindparam("by"),
                committed_at=bindparam("when"),
            )
        )

        self._store = (
            update(table)
            .where(columns.digest == bindparam("at"))
            .values(result=bindparam("text"))
        )

    def insert(
        self,
        on: Connection,
        keys: Mapping[str, str],
        job: str,
        state: str,
        arguments: Mapping[str, str | None] | None = None,
    ) -> None:
        """Write the row of each key.

        Args:
            on: In the job's transaction.
            keys: By their digests.
            job: Qualified name of the function.
            state: COMMITTED, which it is once the transaction is; or SETTLED.
            arguments: Digests of what each is called with.

        Raises:
            sqlalchemy.exc.IntegrityError: A row was there, or came meanwhile.
        """
        # In order, so that two jobs that claim the same keys wait for each other and
        # never both at once.
        rows: list[dict[str, Any]] = [
            {
                "digest": digest,
                "ledger": self._ledger.name,
                "key": keys[digest],
                "state": state,
                "attempt": 1,
                "job": job,
                "arguments": (arguments or {}).get(digest),
                "committed_at": now(),
            }
            for digest in sorted(keys)
        ]
        on.execute(self._insert, rows[0] if len(rows) == 1 else rows)

    def take_settled(self, on: Connection, digest: str, job: str, state: str) -> bool:
        """Claim a key that was settled as rolled back, or settle it once more.

        Returns:
            Whether it was still free, once whoever had claimed it has ended.
        """
        values = {"at": digest, "by": job, "as": state, "when": now()}
        return on.execute(self._take, values).rowcount == 1

    def store(self, on: Connection, texts: Mapping[str, str]) -> None:
        """Write results into claimed rows, by digest."""
        # A row each: of an UPDATE with a list PostgreSQL may keep a plan that was made when
        # the table was small, and read all of it from then on.
        rows = [{"at": digest, "text": texts[digest]} for digest in sorted(texts)]
        if rows:
            on.execute(self._store, rows[0] if len(rows) == 1 else rows)

    def entries(self, on: Connection, digests: Iterable[str]) -> dict[str, Entry]:
        """Look up digests; those without a row are not in what is returned."""
        wanted: Sequence[str] = list(digests)
        found: dict[str, Entry] = {}
        for first in range(0, len(wanted), _IN_ONE_QUERY):
            part = wanted[first : first + _IN_ONE_QUERY]
            for digest, *entry in on.execute(self._select, {"digests": part}):
                found[digest] = Entry(*entry)
        return found
