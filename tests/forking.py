"""Programs that fork by themselves, with connections open.

Run as a script: an interpreter that has imported everything once. For each program it
is asked for it forks a process, so that a program costs a fork and not the import of
SQLAlchemy; ``warm.py`` is its other side. With ``defence.SWITCH`` set it does not know
the package. Imports no pytest.
"""

from __future__ import annotations

import _imp
import asyncio
import contextlib
import gc
import importlib
import json
import logging
import multiprocessing
import os
import resource
import select as select_
import signal
import sys
import threading
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import (
    Connection,
    Engine,
    NullPool,
    create_engine,
    event,
    exc,
    literal,
    select,
    text,
)
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session, close_all_sessions, scoped_session, sessionmaker
from sqlalchemy.pool import ConnectionPoolEntry

import defence
import inherited
from models import Item
from waiting import Gate, wait_until

# Before the package registers hooks of its own: of those that run before a fork the
# first to be registered is the last to run, in the copy it is the first.
_at_last_before_fork: list[Callable[[], object]] = []
_at_first_in_copy: list[Callable[[], object]] = []
os.register_at_fork(
    before=lambda: [act() for act in _at_last_before_fork],
    after_in_child=lambda: [act() for act in _at_first_in_copy],
)

if __name__ == "__mp_main__" and defence.is_taken_away():
    defence.take_away()  # in a worker of a program that has an executor
elif not defence.is_taken_away():
    import dbpool_executor  # noqa: F401 - to be imported is all it takes

SECONDS = 20.0  # for anything here

FINE, REFUSED, SHARED, BROKEN = 0, 3, 4, 5
_ENDS = {
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
        sockets: Its connections: the descriptor, and the session's number on the server.
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
    return _ENDS.get(code, str(code))


# -- Programs -------------------------------------------------------------------


def idle(url: str, deed: str, leave: str, rounds: int) -> dict[str, Any]:
    """Fork with an idle connection, and go on.

    For ``removes`` the connection is in use.
    """
    parent = Parent(url)
    committed, ends = [], []
    for number in range(rounds):
        names = [f"{number} before", f"{number} after"]
        parent.registry.add(Item(name=names[0]))
        parent.registry.flush()
        if deed != "removes":
            parent.registry.commit()
        ends.append(in_copy(partial(DEEDS[deed], parent), leave))
        assert parent.registry.scalar(select(literal(number))) == number
        parent.registry.add(Item(name=names[1]))
        parent.registry.commit()
        committed += names
    return {"committed": committed, "ends": ends}


class OtherThread:
    """Another thread, which has a transaction in a session of its own."""

    def __init__(self, parent: Parent, names: list[str]) -> None:
        self._parent = parent
        self._names = names
        self._opened, self._goes_on = threading.Event(), threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run)

    def open(self) -> None:
        """Have it begin its transaction and write."""
        self._thread.start()
        assert self._opened.wait(SECONDS)

    def go_on(self) -> list[str]:
        """Have it write once more and commit; give what was committed."""
        self._goes_on.set()
        self._thread.join(SECONDS)
        if self._error is not None:
            raise self._error
        return self._names

    def _run(self) -> None:
        # No variable holds the session: in a copy, those of other threads live for ever.
        registry, (first, second) = self._parent.registry, self._names
        try:
            registry.add(Item(name=first))
            registry.flush()
            self._opened.set()
            assert self._goes_on.wait(SECONDS)
            registry.add(Item(name=second))
            registry.commit()
            registry.remove()
        except Exception as error:
            self._error = error
            self._opened.set()


def race(url: str, deed: str, rounds: int) -> dict[str, Any]:
    """Fork while another thread is in a transaction; it commits afterwards."""
    parent = Parent(url)
    committed, ends = [], []
    for number in range(rounds):
        other = OtherThread(parent, [f"{number} before", f"{number} after"])
        other.open()
        leave = "exit" if number % 2 else "_exit"
        ends.append(in_copy(partial(_then_collects, DEEDS[deed], parent), leave))
        committed += other.go_on()
    return {"committed": committed, "ends": ends}


def _then_collects(deed: Callable[[Parent], None], parent: Parent) -> None:
    try:
        deed(parent)
    finally:
        collects(parent)


def late(url: str, rounds: int, *, anew: bool) -> dict[str, Any]:
    """Have another thread open a transaction at the last moment before the fork.

    Args:
        url: Of the database.
        rounds: How often.
        anew: Whether on a connection that it opens then. Otherwise the copy allocates
            before the package's own hook can do anything there.
    """
    if not anew:
        _at_first_in_copy.append(allocates)
    committed, ends = [], []
    for number in range(rounds):
        parent = Parent(url)
        if not anew:
            parent.registry.execute(select(1))
            parent.registry.remove()
        other = OtherThread(parent, [f"{number} before", f"{number} after"])
        _at_last_before_fork.append(other.open)
        leave = "exit" if number % 2 else "_exit"
        ends.append(in_copy(partial(collects, parent), leave))
        _at_last_before_fork.clear()
        committed += other.go_on()
        parent.engine.dispose()
    return {"committed": committed, "ends": ends}


def measure(url: str, against: str, *, busy: bool, rounds: int) -> dict[str, Any]:
    """Take a measure, one of those that people take, and fork.

    Args:
        url: Of the database.
        against: The measure.
        busy: Whether a connection is in use by another thread; otherwise it is idle.
        rounds: How often.
    """
    options: dict[str, Any] = {"poolclass": NullPool} if against == "null_pool" else {}
    parent = Parent(url, **options)
    if against == "listener":
        _refuse_other_processes(parent.engine)
    elif against == "freeze":
        _at_first_in_copy.append(gc.freeze)
    elif against == "cover":
        # Collection may come before any hook; here it does.
        _at_first_in_copy.extend([gc.collect, partial(cover, parent)])
    elif against == "hold":
        _at_first_in_copy.append(gc.collect)
    deed = {
        "dispose_without_closing": disposes_without_closing,
        "close_sessions": closes_sessions,
    }.get(against, nothing)
    committed, ends = [], []
    for number in range(rounds):
        names = [f"{number} before", f"{number} after"]
        other = OtherThread(parent, names)
        if busy:
            other.open()
        else:
            parent.registry.execute(select(1))
            parent.registry.remove()
        if against == "dispose":
            parent.engine.dispose()
        ends.append(in_copy(partial(_then_collects, deed, parent), "exit"))
        if not busy:
            other.open()
        committed += other.go_on()
    return {"committed": committed, "ends": ends}


def _refuse_other_processes(engine: Engine) -> None:
    # SQLAlchemy's documentation, "Using Connection Pools with Multiprocessing".
    @event.listens_for(engine, "connect")
    def _note(_driver: object, entry: ConnectionPoolEntry) -> None:
        entry.info["pid"] = os.getpid()

    @event.listens_for(engine, "checkout")
    def _check(_driver: object, entry: Any, proxy: Any) -> None:
        if entry.info["pid"] != os.getpid():
            entry.dbapi_connection = proxy.dbapi_connection = None
            raise exc.DisconnectionError


def classic(url: str, rounds: int) -> dict[str, Any]:
    """Fork with the globals of ``inherited`` in use; the copy binds them anew."""
    inherited.init(url)
    committed, ends = [], []
    for number in range(rounds):
        work = inherited.Work(f"{number}")
        job = partial(inherited.rebind_and_write, url, f"{number} in copy")
        ends.append(in_copy(job, "exit" if number % 4 == 0 else "_exit"))
        committed += [f"{number} in copy", *work.go_on()]
    return {"committed": committed, "ends": ends}


def exhausted(url: str) -> dict[str, Any]:
    """Fork when the process has as many files open as it may."""
    parent = Parent(url)
    names = ["before", "after"]
    other = OtherThread(parent, names)
    other.open()
    files = [os.open(os.devnull, os.O_RDWR)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(files) + 10,) * 2)
    with contextlib.suppress(OSError):
        while True:
            files.append(os.open(os.devnull, os.O_RDWR))
    end = in_copy(partial(collects, parent), "_exit")
    for number in files:
        os.close(number)
    return {"committed": other.go_on(), "ends": [end]}


def event_loop(url: str, rounds: int) -> dict[str, Any]:
    """Fork inside a running event loop, with a transaction of an AsyncSession open."""
    return asyncio.run(_in_event_loop(url, rounds))


async def _in_event_loop(url: str, rounds: int) -> dict[str, Any]:
    engine = create_async_engine(url)
    numbers: set[int] = set()
    committed, ends = [], []
    for number in range(rounds):
        names = [f"{number} before", f"{number} after"]
        session = AsyncSession(engine)
        session.add(Item(name=names[0]))
        await session.flush()
        numbers.add((await session.execute(text("SELECT pg_backend_pid()"))).scalar())
        ends.append(in_copy(partial(_terminates, engine, numbers), "_exit"))
        session.add(Item(name=names[1]))
        await session.commit()
        await session.close()
        committed += names
    await engine.dispose()
    return {"committed": committed, "ends": ends}


def _terminates(engine: AsyncEngine, numbers: set[int]) -> None:
    """Do in a copy what SQLAlchemy does with connections of a loop that is gone."""
    for entry in [e for e in gc.get_objects() if isinstance(e, ConnectionPoolEntry)]:
        entry.invalidate()
    gc.collect()
    # The copy has a loop that runs, for ever in the middle of the fork.
    asyncio._set_running_loop(None)
    if asyncio.run(_ask_number(engine)) in numbers:
        os._exit(SHARED)


async def _ask_number(engine: AsyncEngine) -> Any:
    async with engine.connect() as connection:
        return (await connection.execute(text("SELECT pg_backend_pid()"))).scalar()


def preload(url: str, modules: list[str], factory: str, workers: int) -> dict[str, Any]:
    """Start workers from a forkserver that has a transaction open.

    Args:
        url: Of the database.
        modules: What the forkserver preloads.
        factory: Name of an engine factory in ``inherited``.
        workers: How many, one after the other.
    """
    package = defended_package()
    os.environ[inherited.PRELOADED] = url
    multiprocessing.set_forkserver_preload(modules)
    notes = Notes()
    context = multiprocessing.get_context("forkserver")
    executor = package.DBPoolExecutor(getattr(inherited, factory), 1, context)
    ends: list[str] = []
    error, is_open = None, False
    try:
        for _ in range(workers):
            number, end = executor.submit(inherited.use_preloaded).result(SECONDS)
            ends.append(end)
            is_open = inherited.is_in_transaction(url, number)
            with contextlib.suppress(package.WorkerDiedError):
                executor.submit(inherited.die).result(SECONDS)
    except package.WorkerStartError as exc_:
        error = str(exc_)
    executor.shutdown()
    return {"ends": ends, "is_open": is_open, "notes": notes.texts, "error": error}


class Notes(logging.Handler):
    """What the package has logged."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        logging.getLogger("dbpool_executor").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the text."""
        self.texts.append(record.getMessage())


def defended_package() -> Any:
    """Import the package, for programs that have an executor."""
    if defence.is_taken_away():
        defence.take_away()
    return importlib.import_module("dbpool_executor")


def reloaded(url: str) -> dict[str, Any]:
    """Reload what registers the hooks, and race."""
    registered: list[str] = []
    os.register_at_fork = lambda **hooks: registered.extend(hooks)  # type: ignore[assignment]
    event.listen = lambda *_args, **_options: registered.append("listener")  # type: ignore[assignment]
    for name in ("dbpool_executor._inheritance", "dbpool_executor") * 2:
        importlib.reload(importlib.import_module(name))
    event.listen = _listen
    return {**race(url, "collects", 2), "registered": registered}


_listen = event.listen


def forgotten(url: str) -> dict[str, Any]:
    """Use and drop engines, and tell what of them is still there, forks later."""
    things: list[weakref.ref[object]] = []
    for _ in range(3):
        engine = create_engine(url)
        connection = engine.raw_connection()
        things += map(weakref.ref, (engine, engine.pool, connection))
        things.append(weakref.ref(connection.driver_connection))
        ends = [in_copy(gc.collect, "_exit")]
        connection.close()
        ends.append(in_copy(gc.collect, "_exit"))
        del engine, connection
    gc.collect()
    left = [repr(thing()) for thing in things if thing() is not None]
    return {"left": left, "ends": ends}


def replaced(url: str, rounds: int) -> dict[str, Any]:
    """Replace workers while another thread is in a transaction; it commits afterwards.

    What its copies do in :func:`race`, jobs do here.
    """
    package = defended_package()
    global _inherited
    _inherited = Parent(url)
    deeds = [
        uses_engine,
        uses_session,
        disposes,
        disposes_without_closing,
        closes_sessions,
        rebinds,
    ]
    committed, ends = [], []
    factory = partial(create_engine, url)
    with package.DBPoolExecutor(factory, 1, _FORK) as executor:
        executor.submit(nothing, None).result(SECONDS)
        for number in range(rounds):
            other = OtherThread(_inherited, [f"{number} before", f"{number} after"])
            other.open()
            with contextlib.suppress(package.WorkerDiedError):
                executor.submit(inherited.die).result(SECONDS)
            deed = deeds[number % len(deeds)].__name__
            ends.append(executor.submit(do_as_job, deed).result(SECONDS))
            committed += other.go_on()
    return {"committed": committed, "ends": ends}


_inherited: Parent


def do_as_job(deed: str) -> str:
    """Do something to what was inherited."""
    try:
        DEEDS[deed](_inherited)
    except exc.DBAPIError:
        return _ENDS[REFUSED]
    finally:
        collects(_inherited)
    return _ENDS[FINE]


def copied(url: str, leave: str, *, locked: bool) -> dict[str, Any]:
    """Fork beside an executor that works, and have the copy try all it offers.

    Args:
        url: Of the database.
        leave: As for :func:`in_copy`.
        locked: Whether another thread is in the middle of a submit() at the fork.
    """
    package = defended_package()
    jobs = importlib.import_module("jobs")
    gate = Gate()
    factory = partial(create_engine, url)
    executor = package.DBPoolExecutor(factory, 1, _FORK)
    future = executor.submit(jobs.insert_at_gate, "before", gate.address)
    worker = gate.arrival()
    reader, writer = os.pipe()
    offers: dict[str, Callable[[], object]] = (
        {
            "submit": lambda: executor.submit(jobs.insert_item, "copy"),
            "map": lambda: executor.map(jobs.insert_item, ["copy"]),
            "map of nothing": lambda: executor.map(jobs.insert_item, []),
            "options": executor.options,
            "submit of a view": lambda: view.submit(jobs.insert_item, "copy"),
            "map of a view": lambda: view.map(jobs.insert_item, ["copy"]),
            "shutdown of a view": view.shutdown,
            "shutdown": executor.shutdown,
            "shutdown without waiting": lambda: executor.shutdown(wait=False),
            "shutdown that cancels": lambda: executor.shutdown(cancel_futures=True),
            "terminate_workers": executor.terminate_workers,
            "kill_workers": executor.kill_workers,
            "enter": executor.__enter__,
            "stats": executor.stats,
        }
        if (view := executor.options())
        else {}
    )

    def try_all() -> None:
        nonlocal executor, view
        told = {name: _raised(offer) for name, offer in offers.items()}
        os.write(writer, json.dumps(told).encode())
        offers.clear()
        del executor, view
        gc.collect()

    if locked:
        lock = executor._dispatcher._lock
        held = Lock(lock.acquire, lock.release)
        _at_last_before_fork.append(held.hold)
    end = in_copy(try_all, leave)
    if locked:
        held.let_go()
    told = json.loads(os.read(reader, 1 << 16))
    gate.open()
    future.result(SECONDS)
    executor.submit(jobs.insert_item, "after").result(SECONDS)
    is_same = executor.submit(os.getpid).result(SECONDS) == worker
    executor.shutdown()
    return {"told": told, "ends": [end], "is_same_worker": is_same}


def _raised(offer: Callable[[], object]) -> str:
    try:
        offer()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def beside_a_copy(url: str) -> dict[str, Any]:
    """Have copies of a program live on while its executor works and ends."""
    package = defended_package()
    jobs = importlib.import_module("jobs")
    gate = Gate()
    factory = partial(create_engine, url)
    executor = package.DBPoolExecutor(factory, 1, _FORK)
    copies = [_wait_in_copy(gate)]
    executor.submit(jobs.insert_item, "before").result(SECONDS)
    copies.append(_wait_in_copy(gate))
    try:
        executor.submit(inherited.die).result(SECONDS)
    except package.WorkerDiedError as error:
        died = str(error)
    executor.submit(jobs.insert_item, "after").result(SECONDS)
    executor.shutdown()
    gate.open()
    ends = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in copies]
    return {"died": died, "ends": ends}


def orphaned(url: str) -> dict[str, Any]:
    """Kill a program whose worker is at a job, and of which there is a copy."""
    package = defended_package()
    jobs = importlib.import_module("jobs")
    gate = Gate()
    program = os.fork()
    if program == 0:
        factory = partial(create_engine, url)
        executor = package.DBPoolExecutor(factory, 1, _FORK)
        executor.submit(jobs.insert_at_gate, "lost", gate.address)
        assert jobs.wait_at_gate(gate.address) is None
        _wait_in_copy_of(gate.address)
        signal.pause()
    first, second = gate.arrival(), gate.arrival()
    worker = second if first == program else first
    gate.open(program)
    copy = gate.arrival()
    os.kill(program, signal.SIGKILL)
    os.waitpid(program, 0)
    wait_until(lambda: has_ended(worker), "the worker ends")
    is_copy_left = not has_ended(copy)
    gate.open()
    return {"is_copy_left": is_copy_left}


def _wait_in_copy_of(address: tuple[str, int]) -> None:
    if os.fork() == 0:
        importlib.import_module("jobs").wait_at_gate(address)
        os._exit(0)


def has_ended(pid: int) -> bool:
    """Ask the system whether a process has ended; nobody may have waited for it yet."""
    try:
        status: str = psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return True
    return status == psutil.STATUS_ZOMBIE


def _wait_in_copy(gate: Gate) -> int:
    pid = os.fork()
    if pid == 0:
        importlib.import_module("jobs").wait_at_gate(gate.address)
        os._exit(0)
    assert gate.arrival() == pid
    return pid


class Lock:
    """A lock that another thread holds while this one forks.

    Args:
        take: Takes it.
        release: Lets it go.
        is_of_the_fork: Whether a fork itself takes it, as the last thing before. It is
            let go then, when all else that comes before a fork is over.
    """

    def __init__(
        self,
        take: Callable[[], object],
        release: Callable[[], object],
        *,
        is_of_the_fork: bool = False,
    ) -> None:
        self._take, self._release = take, release
        self._is_of_the_fork = is_of_the_fork

    def hold(self) -> None:
        """Have another thread take it."""
        held, self._over = threading.Event(), threading.Event()

        def run() -> None:
            self._take()
            held.set()
            if not self._is_of_the_fork:
                assert self._over.wait(SECONDS)
            self._release()

        self._thread = threading.Thread(target=run)
        self._thread.start()
        assert held.wait(SECONDS)

    def let_go(self) -> None:
        """Have it let go."""
        self._over.set()
        self._thread.join(SECONDS)


class Stream:
    """Standard output, which another thread writes to while this one forks."""

    def __init__(self) -> None:
        self._reader, writer = os.pipe()
        sys.stdout = os.fdopen(writer, "w")

    def hold(self) -> None:
        """Have another thread write more than anybody reads."""
        self._thread = threading.Thread(target=sys.stdout.buffer.write, args=(_MUCH,))
        self._thread.start()
        assert select_.select([self._reader], [], [], SECONDS)[0]

    def let_go(self) -> None:
        """Read it all."""
        left = len(_MUCH)
        while left:
            left -= len(os.read(self._reader, left))
        self._thread.join(SECONDS)


_MUCH = bytes(1 << 18)


def locks(url: str, kind: str, rounds: int) -> dict[str, Any]:
    """Start workers while another thread holds a lock that they inherit."""
    package = defended_package()
    notes = Notes()
    engine = create_engine(url)
    lock: Lock | Stream
    if kind == "pool":
        mutex = engine.pool._pool.mutex  # type: ignore[attr-defined]
        lock = Lock(mutex.acquire, mutex.release)
    elif kind == "logging":
        lock = Lock(notes.acquire, notes.release)
    elif kind == "import":
        lock = Lock(_imp.acquire_lock, _imp.release_lock, is_of_the_fork=True)
    else:
        lock = Stream()
    os.register_at_fork(after_in_parent=lambda: lock.let_go())  # noqa: PLW0108 - looked up when it is called
    answers = []
    for number in range(rounds):
        engine.connect().close()
        factory = partial(create_engine, url)
        with package.DBPoolExecutor(factory, 1, _FORK) as executor:
            _at_last_before_fork.append(lock.hold)
            future = executor.submit(inherited.import_and_log, number)
            _at_last_before_fork.clear()
            answers.append(future.result(SECONDS))
        engine.connect().close()
    return {"answers": answers, "notes": notes.texts}


_FORK = multiprocessing.get_context("fork")


PROGRAMS: dict[str, Callable[..., Any]] = {
    program.__name__: program
    for program in (
        idle,
        race,
        late,
        measure,
        classic,
        exhausted,
        event_loop,
        preload,
        replaced,
        copied,
        beside_a_copy,
        orphaned,
        locks,
        reloaded,
        forgotten,
    )
}


def serve() -> None:
    """Run programs, each in a fork, until no more are asked for."""
    for driver in ("psycopg", "psycopg2", "asyncpg", "pymysql", "mysqldb"):
        backend = "mysql" if "mysql" in driver else "postgresql"
        with contextlib.suppress(ImportError):
            create_engine(f"{backend}+{driver}://")
    # So that collection in a copy looks at what its program has, and at nothing else.
    gc.freeze()
    for line in sys.stdin:
        name, arguments, report, log = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.setsid()
            _redirect(log)
            result = PROGRAMS[name](**arguments)
            Path(report).write_text(json.dumps(result))
            return
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _redirect(log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


if __name__ == "__main__":
    serve()
