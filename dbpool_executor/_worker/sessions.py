"""The sessions of a worker's jobs: made, used again, ended.

Runs in a worker, in the thread that runs its jobs.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.orm import Session, SessionEvents, sessionmaker
from sqlalchemy.pool import ConnectionPoolEntry

from .._wire.locate import full_name

log = logging.getLogger("dbpool_executor")

SessionOptions = Mapping[str, Any] | Callable[[Engine], Mapping[str, Any]]
"""Keyword arguments for ``sessionmaker``, or what gives them for the worker's engine."""

# Of a session, for each event. Where there are only those of its class, which each
# session has, SQLAlchemy has one and the same object for all sessions.
_listeners = attrgetter(
    *(name for name in vars(SessionEvents) if name != "dispatch" and name[0] != "_")
)


class Sessions:
    """Gives each job a session that is as good as new.

    Args:
        engine: The worker's.
        options: Keyword arguments for ``sessionmaker``, or what gives them for an
            engine.
        before_close: Called with each session that is about to be closed.

    Attributes:
        maker: Of which all of them are; it takes listeners.

    Raises:
        TypeError: What the options give is no mapping.
        Exception: Whatever they raise.
    """

    def __init__(
        self,
        engine: Engine,
        options: SessionOptions,
        before_close: Callable[[Session], None],
    ) -> None:
        given = options(engine) if callable(options) else options
        if not isinstance(given, Mapping):
            raise TypeError(
                f"session_options returned a {full_name(type(given))}; it must return "
                "the keyword arguments of sqlalchemy.orm.sessionmaker(), as a dict"
            )
        self.maker = sessionmaker(**{"bind": engine, **given})
        _call_before_close(self.maker.class_, before_close)
        self._engine = engine
        self._unused: Session | None = None  # as good as new, for the next job
        self._as_made: dict[str, object] = {}  # what the last one was made of
        self._own_references = 0
        # Of a class of the user's nobody knows what else its sessions hold: none is kept.
        if self.maker.class_.__bases__ == (Session,):
            self._own_references = _own_references()
            self._no_listeners = _listeners(self.maker().dispatch)
        if engine.dialect.name == "sqlite":
            event.listen(engine, "checkin", _make_writable)
        self.adopt(engine, read_only=False)

    def adopt(self, engine: Engine, *, read_only: bool) -> None:
        """Have the sessions that are opened from now on use an engine.

        Args:
            engine: The worker's, or a view of it.
            read_only: Whether to begin each of their transactions as a read-only one.
        """
        # Not maker(), which joins its keywords anew for each session.
        new: Any = self.maker.class_
        is_as_given = (
            engine is self._engine or self.maker.kw["bind"] is not self._engine
        )
        bind = {} if is_as_given else {"bind": engine}
        self._new = partial(new, **(self.maker.kw | bind))
        self._makes_read_only = read_only
        self._unused = None

    def other_engines(self) -> Iterator[Engine]:
        """Give the engines that the options name, besides the worker's."""
        binds = [self.maker.kw["bind"], *(self.maker.kw.get("binds") or {}).values()]
        for bind in binds:
            engine = getattr(bind, "engine", None)
            if isinstance(engine, Engine) and engine.pool is not self._engine.pool:
                yield engine

    def open(self) -> Session:
        """Make a session, or give one that is as good as new."""
        opened, self._unused = self._unused, None
        if opened is None:
            opened = self._new()
            self._as_made = {
                name: value.copy() if type(value) is dict else value
                for name, value in vars(opened).items()
            }
        if self._makes_read_only:
            event.listen(opened, "after_begin", _make_read_only)
        return opened

    def end(self, session: Session) -> None:
        """Close a session, or keep it for the next job.

        Args:
            session: What one attribute of the caller's refers to, and no variable.
        """
        try:
            own = self._own_references  # of this very line
            if own and sys.getrefcount(session) <= own and self._is_as_made(session):
                # To close it and to make another takes 7 % of the time of a one-row
                # read (benchmarks/README.md).
                if _listeners(session.dispatch) != self._no_listeners:
                    del vars(session)["dispatch"]  # it will have one without the job's
                self._unused = session
            else:
                session.close()
        except Exception:
            # The job's fate is decided by now.
            log.warning("the session of a job did not close", exc_info=True)

    def _is_as_made(self, session: Session) -> bool:
        """Say whether nobody could tell a session from a new one."""
        try:
            listened_to = {"dispatch": session.dispatch}  # by whomever
            return (
                vars(session) == self._as_made | listened_to
                and not session.identity_map
            )
        except Exception:  # what the job has put there refuses to be compared
            return False


def _call_before_close(maker_class: Any, before_close: Callable[[Any], None]) -> None:
    """Have a function called before the sessions of a sessionmaker's own class close."""

    def calling(close: Callable[[Any], None]) -> Callable[[Any], None]:
        @functools.wraps(close)
        def wrapped(session: Any) -> None:
            before_close(session)
            close(session)

        return wrapped

    for name in ("close", "reset", "invalidate"):
        if (close := getattr(maker_class, name, None)) is not None:
            setattr(maker_class, name, calling(close))


def _own_references() -> int:
    """Count the references to a session that nobody but the worker has, as end() does.

    Not a constant: from CPython 3.14 on not every reference is counted ("What's New in
    Python 3.14", sys.getrefcount()). 0 where none is.
    """
    if not hasattr(sys, "getrefcount"):
        return 0

    def end(session: object) -> int:
        return sys.getrefcount(session)

    holder = SimpleNamespace(session=object())
    return end(holder.session)


_READ_ONLY = "dbpool_executor.read_only"


def _make_read_only(_session: Session, _transaction: object, on: Connection) -> None:
    if on.dialect.name == "sqlite":
        on.exec_driver_sql("PRAGMA query_only = 1")
        # It belongs to the connection, and so would reach the next job.
        on.info[_READ_ONLY] = True
    else:
        on.exec_driver_sql("SET TRANSACTION READ ONLY")


def _make_writable(connection: Any, entry: ConnectionPoolEntry) -> None:
    if entry.info.pop(_READ_ONLY, False) and connection is not None:
        connection.execute("PRAGMA query_only = 0")
