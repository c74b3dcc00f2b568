"""The ledger as its user sees it: its table, and what the table says of a key.

Runs in both processes: the program makes it and asks it, workers write it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal

from sqlalchemy import (
    Column,
    DateTime,
    Engine,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    delete,
    inspect,
    select,
)
from sqlalchemy.exc import DBAPIError

from ..errors import Outcome
from .results import ENCODINGS, Encoding

COMMITTED: Final = "C"
SETTLED: Final = "X"  # as rolled back; free for whoever runs the key again

_OUTCOMES = {COMMITTED: Outcome.COMMITTED, SETTLED: Outcome.ROLLED_BACK}
_LONGEST_NAME = 255
_LONGEST_KEY = 4000


class Ledger:
    """Makes the effect of each job that has a key happen once.

    A row for the key is written in the job's own transaction, so it is in the database if
    and only if the job's work is. A job whose key is there is not run: its future gets the
    stored result.

    Args:
        name: Keys are unique within a ledger of this name; several may share a table.
        table: Name of the table.
        schema: Its schema; the connection's own by default.
        metadata: What the table is a part of; one of its own by default.
        results: How the result of a job is kept: ``"json"``, and a result that is not
            JSON fails the job before its COMMIT; ``"pickle"``, and whoever can write the
            table can then run code in this program (docs.python.org/3/library/pickle.html,
            the warning); None for not at all: a job that is skipped gives ``STORED``.
        names: For functions that were renamed: the old qualified name, as the table has
            it, and the new one.

    Attributes:
        name: As given.
        table: The ``sqlalchemy.Table``.
        metadata: What it is a part of, for Alembic's ``target_metadata``.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: ``results`` is another word, or ``name`` is empty or longer than 255
            characters.
    """

    def __init__(
        self,
        name: str,
        *,
        table: str = "dbpool_ledger",
        schema: str | None = None,
        metadata: MetaData | None = None,
        results: Literal["json", "pickle"] | None = "json",
        names: Mapping[str, str] | None = None,
    ) -> None:
        if not isinstance(name, str) or not isinstance(table, str):
            raise TypeError("the names of a ledger and of its table must be strings")
        if not 0 < len(name) <= _LONGEST_NAME:
            raise ValueError(
                f"the name of a ledger has 1 to {_LONGEST_NAME} characters, not "
                f"{len(name)}"
            )
        _check_text("the name of a ledger", name)
        if results not in ENCODINGS:
            raise ValueError(
                f'results must be "json", "pickle" or None, not {results!r}'
            )
        self.name: str = name
        self.results = results
        self.names: dict[str, str] = dict(names or {})
        self.metadata: MetaData = MetaData() if metadata is None else metadata
        known = self.metadata.tables.get(f"{schema}.{table}" if schema else table)
        self.table: Table = (
            _table(table, self.metadata, schema) if known is None else known
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # Without the program's metadata, of which workers need nothing else.
        table = self.table.name, self.table.schema
        return _rebuilt, (self.name, *table, self.results, self.names)

    def __repr__(self) -> str:
        return f"<Ledger {self.name!r} in {self.table.fullname}>"

    # -- For the program ------------------------------------------------------------

    def create(self, engine: Engine) -> None:
        """Create the table, unless it is there.

        Args:
            engine: Of the database that the jobs write to.
        """
        try:
            self.table.create(engine, checkfirst=True)
        except DBAPIError:
            # Another program may have been faster, between the look and the CREATE.
            if not inspect(engine).has_table(self.table.name, self.table.schema):
                raise

    def outcome(self, engine: Engine, key: str) -> Outcome | None:
        """Say what the table knows of a key.

        Args:
            engine: Of the database that the jobs write to.
            key: As given to ``options(key=...)``.

        Returns:
            COMMITTED; ROLLED_BACK if a lost job was settled as such and the key is free;
            None if there is no row.
        """
        table = self.table
        query = select(table.c.state).where(table.c.digest == self.digest(key))
        with engine.connect() as connection:
            state = connection.execute(query).scalar()
        return None if state is None else _OUTCOMES[state]

    def result(self, engine: Engine, key: str) -> Any:
        """Give the stored result of a key.

        Args:
            engine: Of the database that the jobs write to.
            key: As given to ``options(key=...)``.

        Returns:
            The result, as a job that is skipped gives it.

        Raises:
            LookupError: No job with this key is committed.
        """
        table = self.table
        query = select(table.c.result).where(
            table.c.digest == self.digest(key), table.c.state == COMMITTED
        )
        with engine.connect() as connection:
            row = connection.execute(query).one_or_none()
        if row is None:
            raise LookupError(
                f"no job with the key {key!r} is committed, as ledger {self.name!r} "
                "knows"
            )
        return self.encoding.loads(row.result)

    def prune(self, engine: Engine, older_than: timedelta) -> int:
        """Delete this ledger's old rows; a job whose row is gone may run again.

        Args:
            engine: Of the database that the jobs write to.
            older_than: How old a row must be, by the clock of the machine that wrote it.

        Returns:
            How many rows were deleted.
        """
        table = self.table
        old = table.c.committed_at < now() - older_than
        with engine.begin() as connection:
            statement = delete(table).where(table.c.ledger == self.name, old)
            return connection.execute(statement).rowcount

    # -- For the executor -----------------------------------------------------------

    @property
    def encoding(self) -> Encoding:
        """How results become the table's text."""
        return ENCODINGS[self.results]

    def digest(self, key: str) -> str:
        """Give the primary key of a key's row.

        One length on every database, and no collation that could fold two keys into one.
        """
        # The length first: else "a" and "bc" would be "ab" and "c".
        text = f"{len(self.name)}:{self.name}{key}"
        return hashlib.sha256(text.encode()).hexdigest()

    def is_same_job(self, stored: str, name: str) -> bool:
        """Say whether a row's job is the function of this name, renamed or not."""
        return stored == name or self.names.get(stored) == name


def check_key(key: object) -> str:
    """Refuse what no database could keep as a key.

    Raises:
        TypeError: It is not a string.
        ValueError: It is too long, or has characters that are no text.
    """
    if not isinstance(key, str):
        raise TypeError(
            f"a job's key must be a string, not {key!r}; make one of what the job is "
            'about, such as f"charge-{order_id}"'
        )
    if len(key) > _LONGEST_KEY:
        raise ValueError(
            f"a job's key has {len(key)} characters, and {_LONGEST_KEY} are the most; "
            "use a digest of what is longer"
        )
    _check_text("a job's key", key)
    return str(key)


def _check_text(what: str, text: str) -> None:
    # PostgreSQL stores no NUL in a text (its documentation, "Character Types"), and lone
    # surrogates are not UTF-8.
    if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError(
            f"{what}, {text!r}, has characters that databases do not store"
        )


def now() -> datetime:
    """Give the time as the table has it: UTC, without a zone, which not all can keep."""
    return datetime.now(UTC).replace(tzinfo=None)


def _table(name: str, metadata: MetaData, schema: str | None) -> Table:
    # All of the dialect, which a program without a ledger need not wait for.
    from sqlalchemy.dialects.mysql import LONGTEXT

    long_text = Text().with_variant(LONGTEXT(), "mysql", "mariadb")
    return Table(
        name,
        metadata,
        # Not CHAR: psycopg sends a text, and PostgreSQL would compare it with a column of
        # that type without the index.
        Column("digest", String(64), primary_key=True),
        Column("ledger", String(_LONGEST_NAME), nullable=False),
        # Nullable, since Oracle takes an empty key for NULL.
        Column("key", Text),
        Column("state", String(1), nullable=False),
        Column("attempt", Integer, nullable=False),
        Column("job", Text, nullable=False),
        Column("arguments", String(64)),
        Column("result", long_text),
        Column("committed_at", DateTime, nullable=False, index=True),
        schema=schema,
        # Else a row could stay where the job is rolled back.
        mysql_engine="InnoDB",
        mysql_charset="utf8mb4",
        mariadb_engine="InnoDB",
        mariadb_charset="utf8mb4",
    )


def _rebuilt(
    name: str,
    table: str,
    schema: str | None,
    results: Literal["json", "pickle"] | None,
    names: Mapping[str, str],
) -> Ledger:
    return Ledger(name, table=table, schema=schema, results=results, names=names)
