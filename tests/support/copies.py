"""What programs that fork have, and what their forked copies do with it.

Imported by ``forking.py`` and ``forking_executors.py``; it imports no pytest. With
``defence.SWITCH`` set it does not import the package.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, create_engine, event, exc, select, text
from sqlalchemy.orm import Session, close_all_sessions, scoped_session, sessionmaker

import defence

# Before the package registers hooks of its own: of those that run before a fork the
# first to be registered is the last to run, in the copy it is the first.
at_last_before_fork: list[Callable[[], object]] = []
at_first_in_copy: list[Callable[[], object]] = []
os.register_at_fork(
    before=lambda: [act() for act in at_last_before_fork],
    after_in_child=lambda: [act() for act in at_first_in_copy],
)

if not defence.is_taken_away():
    import dbpool_executor  # noqa: F401 - to be imported is all it takes

SECONDS = 20.0  # for anything here

FINE, REFUSED, SHARED, BROKEN = 0, 3, 4, 5
ENDS = {
    FINE: "fine",
    REFUSED: "refused",  # by the database or its driver
    SHARED: "shared",  # it was given a connection of its parent
    BROKEN: "broken",  # a connection of its own was
}


class Parent:
    """What a program has when it forks.

    Args:
        url: Of its database.
        options: For its engine.

    Attributes:
        engine: Its engine.
        registry: Its sessions, one for each thread.
        sockets: Its connections: descriptor, and number of the session on the server.
    """

    def __init__(self, url: str, **options: Any) -> None:
        self.engine = create_engine(url, **options)
        self.registry = scoped_session(sessionmaker(self.engine))
        self.sockets: dict[int, int] = {}
        event.listen(self.engine, "connect", self._note)
        event.listen(self.engine, "close", self._forget)
        self._pid = os.getpid()

    def _note(self, driver: Any, _entry: object) -> None:
        if os.getpid() == self._pid:
            self.sockets[descriptor(driver)] = _number(driver)

    def _forget(self, driver: Any, _entry: object) -> None:
        if os.getpid() == self._pid:
            self.sockets.pop(descriptor(driver), None)


def descriptor(driver: Any) -> int:
    """Give the socket of a driver's connection."""
    number: int = getattr(driver, "_sock", driver).fileno()
    return number


def _number(driver: Any) -> int:
    """Give the number of a session on its server, as the driver knows it."""
    for name in ("get_backend_pid", "thread_id"):
        if hasattr(driver, name):
            return int(getattr(driver, name)())
    return int(driver.info.backend_pid)


def check_own(parent: Parent, connection: Connection | Session) -> None:
    """Ask the server which session this is, and leave if it is the parent's."""
    name = "pg_backend_pid()"
    if parent.engine.dialect.name in ("mysql", "mariadb"):
        name = "connection_id()"
    if connection.scalar(text(f"SELECT {name}")) in parent.sockets.values():
        os._exit(SHARED)


# -- What a copy does -----------------------------------------------------------


def nothing(_parent: Parent) -> None:
    """Do nothing."""


def collects(_parent: Parent) -> None:
    """Allocate as any program does, and collect garbage."""
    allocates()
    gc.collect()


def allocates() -> None:
    """Allocate enough to have the garbage collector run by itself."""
    for _ in range(20_000):
        ring: list[object] = []
        ring.append(ring)


def uses_engine(parent: Parent) -> None:
    """Use the inherited engine as often as it has connections, and once more."""
    refused = None
    for _ in range(len(parent.sockets) + 1):
        try:
            with parent.engine.connect() as connection:
                check_own(parent, connection)
        except exc.DBAPIError as error:
            refused = error
    if refused is not None:
        raise refused


def uses_session(parent: Parent) -> None:
    """Use the inherited session of another thread."""
    for session in [s for s in gc.get_objects() if issubclass(type(s), Session)]:
        check_own(parent, session)


def disposes(parent: Parent) -> None:
    """Dispose the inherited engine."""
    parent.engine.dispose()
    gc.collect()


def disposes_without_closing(parent: Parent) -> None:
    """Dispose it as SQLAlchemy's documentation advises."""
    parent.engine.dispose(close=False)
    gc.collect()


def removes(parent: Parent) -> None:
    """Remove the inherited session of the thread that forks."""
    parent.registry.remove()


def closes_sessions(parent: Parent) -> None:
    """Close all inherited sessions."""
    parent.registry.remove()
    close_all_sessions()
    gc.collect()


def closes_descriptors(parent: Parent) -> None:
    """Close the inherited sockets, and go on with a connection of its own."""
    for number in parent.sockets:
        os.close(number)
    with create_engine(parent.engine.url).connect() as own:
        own.execute(select(1))
        del parent.engine, parent.registry
        gc.collect()
        try:
            own.execute(select(1))
        except exc.DBAPIError:
            os._exit(BROKEN)


def covers_descriptors(parent: Parent) -> None:
    """Put something harmless over the inherited sockets, then do the worst."""
    cover(parent)
    with contextlib.suppress(exc.DBAPIError):
        parent.registry.remove()
    disposes(parent)


def cover(parent: Parent) -> None:
    """Put something harmless over the inherited sockets."""
    null = os.open(os.devnull, os.O_RDWR)
    for number in parent.sockets:
        os.dup2(null, number)


def rebinds(parent: Parent) -> None:
    """Make an engine and a session of its own under the old names."""
    parent.engine = create_engine(parent.engine.url)
    parent.registry = scoped_session(sessionmaker(parent.engine))
    gc.collect()
    check_own(parent, parent.registry())
    parent.registry.commit()


DEEDS = {
    deed.__name__: deed
    for deed in (
        nothing,
        collects,
        uses_engine,
        uses_session,
        disposes,
        disposes_without_closing,
        removes,
        closes_sessions,
        closes_descriptors,
        covers_descriptors,
        rebinds,
    )
}


def in_copy(deed: Callable[[], object], leave: str) -> str:
    """Fork, have the copy do something and leave, and wait for its end.

    Args:
        deed: What the copy does.
        leave: ``_exit``, or ``exit`` for the normal end of an interpreter.

    Returns:
        How the copy fared, in a word.
    """
    pid = os.fork()
    if pid == 0:
        code = FINE
        try:
            deed()
        except exc.DBAPIError:
            code = REFUSED
        if leave == "_exit":
            os._exit(code)
        # On its way out it passes no block that would do anything more.
        sys.exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return ENDS.get(code, str(code))
