"""The sessions of a worker's jobs: made, used again, ended.

Runs in a worker, in the thread that runs its jobs.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.orm import Session, sessionmaker

log = logging.getLogger("dbpool_executor")


class Sessions:
    """Gives each job a session that is as good as new.

    Args:
        engine: The worker's.
        options: Keyword arguments for ``sessionmaker``.

    Attributes:
        maker: Of which all of them are; it takes listeners.
    """

    def __init__(self, engine: Engine, options: Mapping[str, Any]) -> None:
        self.maker = sessionmaker(**{"bind": engine, **options})
        self._engine = engine
        self._unused: Session | None = None  # as good as new, for the next job
        self._as_made: dict[str, object] = {}  # what the last one was made of
        # Of a class of the user's nobody knows what else its sessions hold.
        is_plain = self.maker.class_.__bases__ == (Session,)
        self._may_keep = is_plain and hasattr(sys, "getrefcount")
        if engine.dialect.name == "sqlite":
            event.listen(engine, "checkin", _make_writable)
        self.adopt(engine, read_only=False)

    def adopt(self, engine: Engine, *, read_only: bool) -> None:
        """Bind those to come to an engine.

        Args:
            engine: The worker's, or a view of it.
            read_only: Whether they must not write, where that is said for each
                transaction and not by the view.
        """
        # Not maker(), which joins its keywords anew for each session.
        new: Any = self.maker.class_
        bind = {} if engine is self._engine else {"bind": engine}
        self._new = partial(new, **(self.maker.kw | bind))
        self._listens = read_only and engine.dialect.name != "postgresql"
        self._unused = None

    def open(self) -> Session:
        """Make a session, or give one that is as good as new."""
        opened, self._unused = self._unused, None
        if opened is None:
            opened = self._new()
            self._as_made = {
                name: value.copy() if type(value) is dict else value
                for name, value in vars(opened).items()
            }
        if self._listens:
            event.listen(opened, "after_begin", _make_read_only)
        return opened

    def end(self, session: Session) -> None:
        """Close a session, or keep it for the next job.

        Args:
            session: An attribute of the caller's, which nothing else of his refers to.
        """
        try:
            if self._is_as_made(session):
                # To close it and to make another takes 3 to 4 % of the time of a one-row
                # read (benchmarks/README.md).
                del vars(session)["dispatch"]  # it will have one without the job's
                self._unused = session
            else:
                session.close()
        except Exception:
            # The job's fate is decided by now.
            log.warning("the session of a job did not close", exc_info=True)

    def _is_as_made(self, session: Session) -> bool:
        """Say whether nobody else holds a session, or could tell it from a new one."""
        try:
            listened_to = {"dispatch": session.dispatch}  # by whomever
            return (
                self._may_keep
                and vars(session) == self._as_made | listened_to
                and not session.identity_map
                and sys.getrefcount(session) <= _OWN_REFERENCES
            )
        except Exception:  # what the job has put there refuses to be compared
            return False


# To a session that ends: Database's, that of the two methods here, and getrefcount()'s.
_OWN_REFERENCES = 4

_READ_ONLY = "dbpool_executor.read_only"


def _make_read_only(_session: Session, _transaction: object, on: Connection) -> None:
    if on.dialect.name == "sqlite":
        on.exec_driver_sql("PRAGMA query_only = 1")
        # It belongs to the connection, and so would reach the next job.
        on.info[_READ_ONLY] = True
    else:
        on.exec_driver_sql("SET TRANSACTION READ ONLY")


def _make_writable(connection: Any, entry: Any) -> None:
    if entry.info.pop(_READ_ONLY, False) and connection is not None:
        connection.execute("PRAGMA query_only = 0")
