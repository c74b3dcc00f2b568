"""How the databases differ for whoever watches their commits.

Runs in a worker.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from sqlalchemy import Dialect

from .._drivers.questions import TablesWithoutTransactions
from .._drivers.statements import Effect, effect_on


class Traits(NamedTuple):
    """How the database of an engine differs from others.

    Attributes:
        may_abort: Whether an error aborts the transaction.
        is_sqlite: Whether it is SQLite.
        undoes: Whether it is MySQL or MariaDB, where an error may undo a part, and
            ROLLBACK may leave one.
        effect_of: Says what a statement may do.
        tables: Those that ROLLBACK does not reach, where there may be some.
    """

    may_abort: bool
    is_sqlite: bool
    undoes: bool
    effect_of: Callable[[str], Effect]
    tables: TablesWithoutTransactions | None


def traits_of(dialect: Dialect) -> Traits:
    """Give the traits of an engine's database."""
    name = dialect.name
    undoes = name in ("mysql", "mariadb")
    return Traits(
        may_abort=name == "postgresql",
        is_sqlite=name == "sqlite",
        undoes=undoes,
        effect_of=effect_on(name, dialect.driver),
        tables=TablesWithoutTransactions() if undoes else None,
    )
