"""Programs with an executor whose workers are forks.

Imported by ``warm.py``, which runs them; it imports no pytest.
"""

from __future__ import annotations

import _imp
import contextlib
import gc
import importlib
import json
import logging
import multiprocessing
import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import psutil
from sqlalchemy import create_engine, exc

import defence
import inherited
from copies import (
    DEEDS,
    ENDS,
    FINE,
    REFUSED,
    SECONDS,
    Parent,
    at_first_in_copy,
    at_last_before_fork,
    closes_sessions,
    collects,
    disposes,
    disposes_without_closing,
    in_copy,
    nothing,
    rebinds,
    uses_engine,
    uses_session,
)
from forking import OtherThread
from waiting import Gate, wait_until

_FORK = multiprocessing.get_context("fork")


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
    except package.WorkerStartError as failed:
        error = str(failed)
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
        return ENDS[REFUSED]
    finally:
        collects(_inherited)
    return ENDS[FINE]


def copied(url: str, leave: str, *, locked: bool, early: bool) -> dict[str, Any]:
    """Fork beside an executor that works, and have the copy try all it offers.

    Args:
        url: Of the database.
        leave: As for :func:`in_copy`.
        locked: Whether another thread is in the middle of a submit() at the fork.
        early: Whether the copy does so before the package's own hooks are called.
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
        at_last_before_fork.append(held.hold)
    if early:
        at_first_in_copy.append(try_all)
    end = in_copy((lambda: None) if early else try_all, leave)
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
        assert select.select([self._reader], [], [], SECONDS)[0]

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
    os.register_at_fork(after_in_parent=lock.let_go)
    answers = []
    for number in range(rounds):
        engine.connect().close()
        factory = partial(create_engine, url)
        with package.DBPoolExecutor(factory, 1, _FORK) as executor:
            at_last_before_fork.append(lock.hold)
            future = executor.submit(inherited.import_and_log, number)
            at_last_before_fork.clear()
            answers.append(future.result(SECONDS))
        engine.connect().close()
    return {"answers": answers, "notes": notes.texts}


PROGRAMS = (preload, replaced, copied, beside_a_copy, orphaned, locks)
