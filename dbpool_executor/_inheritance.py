"""Keeps one process's connections out of its forked copies.

Runs in every process that imports the package, at each fork of it. A forked copy
inherits the sockets of all open connections. Whatever it does with them there, even to
let the garbage collector have them, is done to the connection of the process that
opened them. So, at every fork:

- before it, strong references are taken to all connections and to what would end
  something on them when collected. After the fork is too late: collection can run in
  the copy before any hook does;
- in the copy, they are kept for ever, and ``/dev/null`` is put over their descriptors.
  They are never closed: a descriptor's number is soon somebody else's.
"""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from sqlalchemy import Connection, Engine, Result, Transaction, event
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry, Pool, PoolProxiedConnection

# What rolls back, says goodbye or reads from its socket when it is collected. Drivers'
# connections and cursors are known by their shape, PEP 249.
_TIED = (ConnectionPoolEntry, PoolProxiedConnection, Session, Connection, Transaction)
_CONNECTION_SHAPE = ("cursor", "commit", "rollback", "close")
_CURSOR_SHAPE = ("execute", "executemany", "fetchone", "fetchmany", "close")


class _Watch:
    """What is known of the connections of this process. One object, never replaced."""

    def __init__(self) -> None:
        # Every entry that has connected since this module was imported, by id().
        self.entries: weakref.WeakValueDictionary[int, ConnectionPoolEntry] = (
            weakref.WeakValueDictionary()
        )
        self.knows_older = False  # those from before the import are in `entries` too
        self.graveyard: list[object] = []  # inherited, kept for ever
        self.fork = threading.local()  # of the thread that forks: held, thorough

    def live_entries(self) -> list[ConnectionPoolEntry]:
        if not self.knows_older:
            for entry in living(ConnectionPoolEntry):
                self.entries[id(entry)] = entry
            self.knows_older = True
        found = [ref() for ref in self.entries.valuerefs()]
        return [e for e in found if e is not None and e.dbapi_connection is not None]


def living(*classes: type) -> list[Any]:
    """Give the objects of some classes that the garbage collector knows.

    Takes some 20 ms in a program with 200 000 objects.
    """
    # type() and not isinstance(): a proxy's __class__ may run anybody's code.
    return [o for o in gc.get_objects() if issubclass(type(o), classes)]


def pool_of(entry: ConnectionPoolEntry) -> Pool | None:
    """Give the pool of an entry, which has no public name for it."""
    return getattr(entry, "_ConnectionRecord__pool", None)


def live_entries() -> list[ConnectionPoolEntry]:
    """Give the entries of all pools of this process that hold a connection."""
    return _watch.live_entries()


@contextmanager
def thorough() -> Iterator[None]:
    """Have a fork of this thread inside the block look at every object.

    Also at connections that were made without SQLAlchemy. Without it, that is done
    only if a connection is checked out.
    """
    _watch.fork.thorough = True
    try:
        yield
    finally:
        _watch.fork.thorough = False


def refuse_inherited(engine: Engine) -> None:
    """Refuse an engine with connections that another process opened.

    Args:
        engine: What the engine factory returned.

    Raises:
        RuntimeError: It is such an engine.
    """
    inherited = any(
        isinstance(kept, ConnectionPoolEntry) and pool_of(kept) is engine.pool
        for kept in _watch.graveyard
    )
    if inherited:
        name = module_level_name(engine)
        raise RuntimeError(
            f"the engine factory returned {name or repr(engine)}, which holds "
            f"connections that another process opened; have it return a new engine, "
            "create_engine(url), instead"
        )


def module_level_name(value: object) -> str | None:
    """Find the module and global name of an object; None if it has none."""
    import sys

    for module_name, module in list(sys.modules.items()):
        for name, candidate in list(getattr(module, "__dict__", {}).items()):
            if candidate is value:
                return f"{module_name}.{name}"
    return None


def bury_inherited() -> list[str]:
    """Bury what was inherited without this module's hooks, and tell of all of it.

    For a worker, first thing: a forkserver has no hooks if it preloaded a module that
    opens a connection, and not this package.

    Returns:
        What was inherited, for the parent's log.
    """
    _bury(_stowaways())
    pools = {pool_of(e) for e in _watch.graveyard if isinstance(e, ConnectionPoolEntry)}
    if not pools:
        return []
    names = [repr(engine) for engine in living(Engine) if engine.pool in pools]
    return [
        f"workers inherit open connections of {name} from the process that forks them; "
        "they are kept out of use, but a module that is preloaded should not connect"
        for name in names
    ]


def _stowaways() -> list[object]:
    """Give the connections that this process shares with its parent, unburied."""
    ours, theirs = _sockets("self"), _sockets(str(os.getppid()))
    shared = {fd for fd, inode in ours.items() if inode in theirs.values()}
    entries = live_entries() if shared else []
    found = [e for e in entries if shared & _descriptors(e)]
    return [*found, *_tied_objects()] if found else []


# -- The hooks ------------------------------------------------------------------


def _note_entry(_connection: object, entry: ConnectionPoolEntry) -> None:
    _watch.entries[id(entry)] = entry


def _before_fork() -> None:
    entries = _watch.live_entries()
    held: list[object] = list(entries)
    if getattr(_watch.fork, "thorough", False) or any(e.in_use for e in entries):
        held += _tied_objects()
    _watch.fork.held = held


def _after_fork_in_parent() -> None:
    _watch.fork.held = None


def _after_fork_in_child() -> None:
    _bury(_watch.fork.held or [])
    _watch.fork.held = None
    _watch.entries.clear()


def _bury(held: Iterable[object]) -> None:
    held = list(held)
    _watch.graveyard += held
    with suppress(OSError):
        null = os.open(os.devnull, os.O_RDWR)
        try:
            for each in held:
                for descriptor in _descriptors(each):
                    os.dup2(null, descriptor, inheritable=False)
        finally:
            os.close(null)


def _tied_objects() -> list[object]:
    known: dict[type, bool] = {}
    return [o for o in gc.get_objects() if _is_tied(type(o), known)]


def _is_tied(cls: type, known: dict[type, bool]) -> bool:
    tied = known.get(cls)
    if tied is None:
        tied = known[cls] = issubclass(cls, (*_TIED, Result)) or any(
            all(_has(cls, name) for name in shape)
            for shape in (_CONNECTION_SHAPE, _CURSOR_SHAPE)
        )
    return tied


def _has(cls: type, name: str) -> bool:
    # Not getattr(): a metaclass may run code of its own there.
    return any(name in base.__dict__ for base in cls.__mro__)


def _descriptors(value: object) -> set[int]:
    """Give the socket descriptors of a pool's entry or a driver's connection."""
    if isinstance(value, ConnectionPoolEntry):
        value = value.driver_connection
    found = set()
    # psycopg, psycopg2 and mysqlclient; PyMySQL; asyncpg; aiomysql and asyncmy.
    for path in ("", "_sock", "_transport._sock", "_writer.transport._sock"):
        with suppress(Exception):  # closed, or without such an attribute
            holder: Any = value
            for name in path.split(".") if path else ():
                holder = getattr(holder, name)
            if type(descriptor := holder.fileno()) is int and descriptor >= 0:
                found.add(descriptor)
    return found


def _sockets(process: str) -> dict[int, str]:
    """Give the sockets of a process, descriptor and inode, where /proc tells them."""
    found = {}
    with suppress(OSError):
        for descriptor in os.listdir(f"/proc/{process}/fd"):
            with suppress(OSError):
                target = os.readlink(f"/proc/{process}/fd/{descriptor}")
                if target.startswith("socket:"):
                    found[int(descriptor)] = target
    return found


# A reload runs this module again in the same namespace: the hooks cannot be taken back,
# so they stay, and look up what they call by name.
if "_watch" not in globals():
    _watch = _Watch()
    event.listen(Pool, "connect", lambda *args: _note_entry(*args))
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(
            before=lambda: _before_fork(),
            after_in_parent=lambda: _after_fork_in_parent(),
            after_in_child=lambda: _after_fork_in_child(),
        )
