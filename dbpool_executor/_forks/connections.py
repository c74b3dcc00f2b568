"""Keeps one process's connections out of its forked copies.

Runs in every process that imports the package, at each fork of it. A forked copy
inherits the sockets of all open connections. Whatever it does with them there, even to
let the garbage collector have them, is done to the connection of the process that
opened them. So, at every fork:

- before it, strong references are taken to all connections, and the garbage collector
  is stopped. After the fork is too late: collection can run in the copy before any hook
  does, and so do the ends of all thread-local values;
- in the copy, they are kept for ever, and ``/dev/null`` is put over their descriptors.
  They are never closed: a descriptor's number is soon somebody else's. Their pools
  forget them.
"""

from __future__ import annotations

import gc
import multiprocessing
import operator
import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain, compress
from typing import Any

from .._drivers.connections import descriptor_of
from .gc_pause import collection_pause, counted_as_old

# Whether somebody may have connected before this module was imported.
_is_late = "sqlalchemy.pool" in sys.modules

with counted_as_old():
    import sqlalchemy.orm  # noqa: F401 - whoever imports the package needs it too
    from sqlalchemy import Engine, event
    from sqlalchemy.pool import ConnectionPoolEntry, Pool, PoolProxiedConnection

    from .pools import forget_inherited, pool_of, stays, warn_at_use

# By which a driver's connection is known, PEP 249.
_CONNECTION_SHAPE = ("cursor", "commit", "rollback", "close")


class _Watch:
    """What is known of the connections of this process. One object, never replaced."""

    def __init__(self) -> None:
        # Every entry that has connected since this module was imported, by id().
        self.entries: weakref.WeakValueDictionary[int, ConnectionPoolEntry] = (
            weakref.WeakValueDictionary()
        )
        # Whether those from before the import are in `entries` too.
        self.knows_older = not _is_late
        # Every pool that has ever had one.
        self.pools: weakref.WeakSet[Pool] = weakref.WeakSet()
        self.has_frozen = False  # what is frozen is not found among all objects
        self.graveyard: list[object] = []  # inherited, kept for ever
        # Those that had a connection when this process was forked, or a parent of it.
        self.inherited_pools: weakref.WeakSet[Pool] = weakref.WeakSet()
        self.fork = _Fork()

    def note(self, entry: ConnectionPoolEntry) -> None:
        self.entries[id(entry)] = entry
        if (pool := pool_of(entry)) is not None:
            self.pools.add(pool)

    def live_entries(self) -> list[ConnectionPoolEntry]:
        if not self.knows_older:
            for entry in living(ConnectionPoolEntry):
                self.note(entry)
            self.knows_older = True
        found = [ref() for ref in self.entries.valuerefs()]
        return [e for e in found if e is not None and e.dbapi_connection is not None]


class _Fork(threading.local):
    """What a thread keeps while it forks."""

    held: Sequence[object] = ()
    is_thorough = False


def living(*classes: type) -> list[Any]:
    """Give the objects of some classes that the garbage collector knows.

    Takes some 20 ms in a program with 200 000 objects.
    """
    return _living(lambda cls: issubclass(cls, classes))


def _living(is_wanted: Callable[[type], bool]) -> list[Any]:
    if _watch.has_frozen:
        gc.unfreeze()
        _watch.has_frozen = False
    # Each by its type() and not by isinstance(): a proxy's __class__ may be a property
    # that runs anybody's code.
    collection_pause.begin()
    try:
        wanted = set(filter(is_wanted, set(map(type, _all_objects()))))
        objects: list[object] = []
        found: list[Any] = []
        is_found = map(wanted.__contains__, map(type, objects))
        steps: list[Callable[[], None]] = [
            partial(objects.extend, _all_objects()),
            partial(found.extend, compress(objects, is_found)),
            objects.clear,
        ]
        # One call, and C alone, so that no other thread runs while there are references
        # to all objects: it might let one go, and leave its end to this thread.
        # mysqlclient fails if the end of a result meets the next query of its
        # connection. Collection, which runs finalizers, is paused for the same reason.
        deque(map(operator.call, steps), maxlen=0)
        return found
    finally:
        collection_pause.end()


def _all_objects() -> Iterator[object]:
    # Asked for at the first next(), let go after the last.
    return chain.from_iterable(map(gc.get_objects, (None,)))


def live_entries() -> list[ConnectionPoolEntry]:
    """Give the entries of all pools of this process that hold a connection."""
    return _watch.live_entries()


def freeze() -> None:
    """Have the garbage collector not look at what is here by now.

    It need not look at what stays, nor touch the memory pages that a forked copy has in
    common with this process (docs.python.org/3/library/gc.html#gc.freeze). Undone when
    objects have to be looked for.
    """
    _watch.has_frozen = True
    gc.freeze()


def give_back(entry: ConnectionPoolEntry) -> None:
    """Close a connection that is checked out, and give its pool the slot back."""
    lent = getattr(entry, "fairy_ref", None)
    proxy: PoolProxiedConnection | None = None if lent is None else lent()
    # To invalidate the entry alone would leave it checked out.
    (entry if proxy is None else proxy).invalidate()


@contextmanager
def thorough() -> Iterator[None]:
    """Have a fork of this thread inside the block look at every object.

    So it finds the connections that were made without SQLAlchemy, or taken from it.
    """
    _watch.fork.is_thorough = True
    try:
        yield
    finally:
        _watch.fork.is_thorough = False


def refuse_inherited(engine: Engine) -> None:
    """Refuse an engine with connections that another process opened.

    Args:
        engine: What the engine factory returned.

    Raises:
        RuntimeError: It is such an engine.
    """
    if engine.pool in _watch.inherited_pools:
        name = module_level_name(engine)
        raise RuntimeError(
            f"the engine factory returned {name or repr(engine)}, which holds "
            f"connections that another process opened; have it return a new engine, "
            "create_engine(url), instead"
        )


def module_level_name(value: object) -> str | None:
    """Find the module and global name of an object of the program; None if it has none."""
    for module_name, module in list(sys.modules.items()):
        # Each object that is looked at costs a worker a copy of its memory page.
        if module_name.partition(".")[0] in _NOT_THE_PROGRAMS:
            continue
        for name, candidate in list(getattr(module, "__dict__", {}).items()):
            if candidate is value:
                return f"{module_name}.{name}"
    return None


_NOT_THE_PROGRAMS = sys.stdlib_module_names | {"sqlalchemy"}


def bury_inherited() -> list[str]:
    """Bury what was inherited without this module's hooks, and tell of all of it.

    For a worker, first thing: a forkserver has no hooks if it preloaded a module that
    opens a connection, and not this package.

    Returns:
        What was inherited, for the parent's log. Nothing for a fork of the parent: it
        may have opened connections since its first job.
    """
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid == os.getppid():
        return []
    _bury(_stowaways())
    pools = set(_watch.inherited_pools)
    if not pools:
        return []
    engines = {engine.pool: repr(engine) for engine in living(Engine)}
    return [
        f"workers inherit open connections of {engines.get(pool, 'some engine')} from "
        "the process that forks them; they are kept out of use, but a module that is "
        "preloaded should not connect"
        for pool in pools
    ]


def _stowaways() -> list[object]:
    """Give the connections that this process shares with its parent, unburied."""
    ours, theirs = _streams("self"), _streams(str(os.getppid()))
    shared = {fd for fd, inode in ours.items() if inode in theirs.values()}
    return [e for e in _connections() if _descriptor(e) in shared] if shared else []


# -- The hooks ------------------------------------------------------------------


def _note_entry(_connection: object, entry: ConnectionPoolEntry) -> None:
    _watch.note(entry)


def hold() -> None:
    """Take strong references to all connections, before a fork."""
    collection_pause.begin()
    held = _connections()
    if _watch.fork.is_thorough:
        held += _living(_is_connection)
    _watch.fork.held = held


def let_go() -> None:
    """Undo :func:`hold` in the process that was forked."""
    _watch.fork.held = ()
    collection_pause.end()


def bury() -> None:
    """Put all connections out of use in a forked copy, for ever."""
    # Looked at again: since the first look another thread may have connected.
    _bury([*_watch.fork.held, *_connections()])
    _watch.fork = _Fork()
    _watch.entries.clear()
    collection_pause.end_in_child()


def _connections() -> list[object]:
    """Give all entries that hold a connection, and what returns it when collected."""
    entries = live_entries()
    lent = [getattr(entry, "fairy_ref", None) for entry in entries]
    return [*entries, *(ref() for ref in lent if ref is not None)]


def _bury(held: Iterable[object]) -> None:
    held = {id(each): each for each in held}.values()
    entries = [each for each in held if isinstance(each, ConnectionPoolEntry)]
    _watch.graveyard += held
    _watch.graveyard += [entry.dbapi_connection for entry in entries]
    for descriptor in {_descriptor(each) for each in held}:
        if descriptor is None:
            continue
        with suppress(OSError):
            # Closed first: the process may have as many open as it is allowed.
            os.close(descriptor)
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor, inheritable=False)
                os.close(null)
    by_pool: dict[Pool, list[ConnectionPoolEntry]] = {p: [] for p in _watch.pools}
    for entry in entries:
        if (pool := pool_of(entry)) is not None:
            by_pool.setdefault(pool, []).append(entry)
    for pool, its_own in by_pool.items():
        if its_own:
            _watch.inherited_pools.add(pool)
        (warn_at_use if stays(pool, its_own) else forget_inherited)(pool, its_own)


def _is_connection(cls: type) -> bool:
    return issubclass(cls, PoolProxiedConnection) or all(
        # Not getattr(): a metaclass may run code of its own there.
        any(name in base.__dict__ for base in cls.__mro__)
        for name in _CONNECTION_SHAPE
    )


def _descriptor(value: object) -> int | None:
    """Give the socket's descriptor of a pool's entry or a driver's connection."""
    if isinstance(value, (ConnectionPoolEntry, PoolProxiedConnection)):
        value = value.driver_connection
    return descriptor_of(value)


def _streams(process: str) -> dict[int, str]:
    """Give the sockets of a process, descriptor and inode, where /proc tells them."""
    found = {}
    with suppress(OSError):
        for descriptor in os.listdir(f"/proc/{process}/fd"):
            with suppress(OSError):
                target = os.readlink(f"/proc/{process}/fd/{descriptor}")
                if target.startswith("socket:"):
                    found[int(descriptor)] = target
    return found


# A reload runs this module again in the same namespace.
if "_watch" not in globals():
    _watch = _Watch()
    event.listen(Pool, "connect", lambda *args: _note_entry(*args))  # noqa: PLW0108
