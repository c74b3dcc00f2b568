"""What becomes of SQLAlchemy's pools in a forked copy of their process.

Runs in every process that imports the package, in each forked copy of it. Every pool
forgets the connections that it has inherited and opens its own; one that was in use at
the fork refuses whatever is done with it. Nothing inherited is closed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from typing import Any, NoReturn

from sqlalchemy import event
from sqlalchemy.pool import ConnectionPoolEntry, NullPool, Pool

from .._drivers.connections import is_embedded, is_sqlite

log = logging.getLogger("dbpool_executor")


def pool_of(entry: ConnectionPoolEntry) -> Pool | None:
    """Give the pool of an entry, which has no public name for it."""
    return getattr(entry, "_ConnectionRecord__pool", None)


def stays(pool: Pool, entries: Collection[ConnectionPoolEntry]) -> bool:
    """Say whether a copy of a pool is left as it is, with what it has inherited.

    So are those of databases without a server: there is no socket that two processes
    would talk over, and a new connection would be to another database (in memory), or no
    safer (a file).
    """
    return is_embedded(getattr(pool._dialect, "name", "")) or any(
        is_sqlite(entry.driver_connection) for entry in entries
    )


def forget_inherited(pool: Pool, entries: Collection[Any]) -> None:
    """Have a pool of this copy be as if it had never connected.

    In place, since the program holds the pool by its engine and perhaps by other ways;
    its listeners stay. Its locks are replaced too: a thread that is not in the copy may
    hold them.

    Args:
        pool: The pool.
        entries: Its entries that were inherited, with a connection.
    """
    opener = os.getppid()
    is_renewed = _renew(pool)
    # What is in use is returned there, so that the pool does not count it.
    grave = NullPool(_refuse_to_connect, dialect=pool._dialect, reset_on_return=None)
    for entry in entries:
        lent = None if (ref := getattr(entry, "fairy_ref", None)) is None else ref()
        entry.finalize_callback.clear()  # it would reset the connection
        if lent is None and not is_renewed:
            entry.dbapi_connection = None  # it will connect when it is used
            continue
        entry.dbapi_connection = cut_off = _CutOff(opener)
        entry._ConnectionRecord__pool = grave
        if lent is not None:
            lent.dbapi_connection = cut_off
            lent._pool = grave


def _renew(pool: Pool) -> bool:
    try:
        fresh = vars(pool.recreate())
    except Exception:  # a class of the program's own, which makes none
        return False
    state = vars(pool)
    for name, value in list(state.items()):
        if isinstance(value, ConnectionPoolEntry):  # that of a StaticPool
            del state[name]
    state.update(fresh)
    return True


def warn_at_use(pool: Pool, entries: Collection[ConnectionPoolEntry]) -> None:
    """Have a pool that stays as it is warn once, when an inherited entry is used.

    Args:
        pool: Of a database without a server.
        entries: Its entries that were inherited, with a connection.
    """
    if not entries:
        return
    inherited = set(entries)
    opener = os.getppid()

    def warn(_connection: object, entry: ConnectionPoolEntry, _lent: object) -> None:
        if entry in inherited:
            inherited.clear()
            log.warning(
                "process %s uses a connection to an embedded database that process %s "
                "opened before it forked this one; a file may be damaged by it "
                "(sqlite.org/howtocorrupt.html, section 2.6), and what is written to "
                "memory stays in this process; dispose the engine before the fork",
                os.getpid(),
                opener,
            )

    event.listen(pool, "checkout", warn)


def _refuse_to_connect() -> NoReturn:
    raise RuntimeError("a connection that was cut off is not opened again")


class _CutOff:
    """In place of a driver's connection that was in use when its process was forked.

    To let go of it does nothing; whatever else is asked of it raises.
    """

    __slots__ = ("_opener",)

    def __init__(self, opener: int) -> None:
        object.__setattr__(self, "_opener", opener)

    def rollback(self) -> None:
        """Do nothing: the transaction is the other process's."""

    close = terminate = rollback

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse()

    def __setattr__(self, name: str, value: object) -> None:
        self._refuse()

    def _refuse(self) -> NoReturn:
        from ..errors import ForkedConnectionError

        raise ForkedConnectionError(self._opener, os.getpid())
