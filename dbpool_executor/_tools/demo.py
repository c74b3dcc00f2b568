"""The demo: index the Python standard library, with many workers and with one.

Runs in the parent; what the workers do is in ``_demo_jobs``.
"""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import queue
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import URL, Engine, func, select

from .. import DBPoolExecutor
from . import demo_jobs as jobs

_TABLES = (jobs.Module, jobs.Definition, jobs.Import)


class DemoError(Exception):
    """Says in one line why the demo cannot go on."""


class Options(NamedTuple):
    """What the command line asks for."""

    url: URL | None
    workers: int
    start_method: str | None
    keep: bool
    root: Path


class Pass(NamedTuple):
    """One run over all files: what the database then holds, and how long it took."""

    workers: int
    rows: list[int]  # of each of _TABLES
    skipped: list[str]
    seconds: float


_Ended = queue.SimpleQueue[Future[jobs.Indexed] | None]  # None is a Ctrl-C


def run(options: Options) -> None:
    """Index all files, once with many workers and once with one; print what came of it.

    Raises:
        DemoError: There is nothing to index, or the numbers do not agree.
        SQLAlchemyError, DBPoolError, ModuleNotFoundError: The database cannot be used.
        KeyboardInterrupt: Ctrl-C. As in the other cases, no table is left.
    """
    files = jobs.python_files(options.root)
    if not files:
        raise DemoError(f"there is no Python file in {options.root}")
    ended: _Ended = queue.SimpleQueue()
    with _database(options) as engine, _interrupt_is_entry_of(ended):
        place = jobs.place_of(engine.url)
        print(f"indexing {len(files):,} files of {options.root}\ninto the {place}")
        sys.stdout.flush()
        passes = [_index(engine, options, files, options.workers, ended)]
        if options.workers > 1:
            passes.append(_index(engine, options, files, 1, ended))
        print("\n".join([*_table(passes), *_imported_most(engine), ""]))
        if skipped := passes[0].skipped:
            names = ", ".join(skipped[:3]) + (", …" if len(skipped) > 3 else "")
            print(f"rolled back, since not Python: {len(skipped)} ({names})")
        if options.keep:
            print(f"kept the tables dbpool_demo_* in the {place}")


def _index(
    engine: Engine, options: Options, files: list[str], workers: int, ended: _Ended
) -> Pass:
    jobs.Base.metadata.drop_all(engine)
    jobs.Base.metadata.create_all(engine)
    method = options.start_method
    stored, skipped = [], []
    file_of: dict[Future[jobs.Indexed], str] = {}
    started = time.monotonic()
    with DBPoolExecutor(
        partial(jobs.make_engine, engine.url),
        max_workers=workers,
        mp_context=None if method is None else multiprocessing.get_context(method),
        initializer=gc.set_threshold,
        initargs=(50_000,),  # syntax trees are large, and have no cycles
        parent_engine=engine,
    ) as executor:
        try:
            for file in files:
                job: Future[jobs.Indexed]
                job = executor.submit(jobs.index_file, str(options.root), file)
                job.add_done_callback(ended.put)
                file_of[job] = file
            with _progress(len(files), _count_of(workers)) as advance:
                for job in _taken_from(ended, len(files)):
                    try:
                        stored.append(job.result())
                    except (SyntaxError, OSError):
                        skipped.append(file_of[job])
                    advance()
        except BaseException:
            _leave_soon(executor)
            raise
        seconds = time.monotonic() - started
    told = [len(stored), *map(sum, zip((0, 0), *stored, strict=True))]
    with engine.connect() as connection:
        queries = [select(func.count()).select_from(table) for table in _TABLES]
        rows = [connection.scalar(query) for query in queries]
    if rows != told:
        raise DemoError(f"the jobs told of {told} rows, the database holds {rows}")
    return Pass(workers, told, sorted(skipped), seconds)


@contextmanager
def _interrupt_is_entry_of(ended: _Ended) -> Iterator[None]:
    """Have the first Ctrl-C put an entry into a queue, instead of raising just anywhere.

    Raised inside a lock's own code, it would leave the lock of a future taken for ever;
    inside SQLAlchemy's, a connection in a transaction that keeps tables from removal.
    """

    def handle(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        ended.put(None)

    previous = signal.getsignal(signal.SIGINT)
    if previous is signal.default_int_handler:  # else it is ignored, as under nohup
        signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if not ended.empty():
        raise KeyboardInterrupt


def _taken_from(ended: _Ended, count: int) -> Iterator[Future[jobs.Indexed]]:
    while count:
        # A Ctrl-C in the instant before a thread falls asleep does not wake it.
        with suppress(queue.Empty):
            job = ended.get(timeout=0.2)
            if job is None:
                raise KeyboardInterrupt
            yield job
            count -= 1


def _leave_soon(executor: DBPoolExecutor) -> None:
    """Cancel what waits; leaving the executor's block waits for what runs."""
    executor.shutdown(wait=False, cancel_futures=True)
    # But not longer than a user likes: a worker may still be importing.
    killer = threading.Timer(0.7, executor.kill_workers)
    killer.daemon = True
    killer.start()


@contextmanager
def _database(options: Options) -> Iterator[Engine]:
    """Give an engine for the parent, and remove what the demo made."""
    url, folder = options.url, None
    if url is None:
        folder = tempfile.mkdtemp(prefix="dbpool_demo_")
        url = URL.create("sqlite", database=str(Path(folder, "demo.db")))
    is_kept = False
    try:
        engine = jobs.make_engine(url)
        engine.connect().close()  # before anything else can fail for want of it
        try:
            yield engine
            is_kept = options.keep
        finally:
            if not is_kept:
                jobs.Base.metadata.drop_all(engine)
            engine.dispose()
    finally:
        if folder is not None and not is_kept:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _progress(total: int, title: str) -> Iterator[Callable[[], object]]:
    """Show a bar, or four plain lines; give what to call after each file."""
    columns = sys.stderr.isatty() and os.get_terminal_size(2).columns  # 0: not told
    if columns and (tqdm := _tqdm()):
        with tqdm(total=total, desc=title, unit=" files", dynamic_ncols=True) as bar:
            yield bar.update
        return
    told = {total * quarter // 4 for quarter in (1, 2, 3, 4)}
    done = itertools.count(1)

    def tell() -> None:
        if (number := next(done)) in told:
            print(f"{title}: {number:,} of {total:,} files", file=sys.stderr)

    yield tell


def _tqdm() -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    # Neither a thread nor a lock that processes share: workers may be forked.
    tqdm.monitor_interval = 0
    tqdm.set_lock(threading.RLock())
    return tqdm


def _table(passes: Sequence[Pass]) -> Iterator[str]:
    def row(name: str, cells: Sequence[str]) -> str:
        return f"{name:<16}" + "".join(f"{cell:>14}" for cell in cells)

    yield "\n" + row("", [_count_of(p.workers) for p in passes])
    for number, name in enumerate(("files stored", "definitions", "imports")):
        yield row(name, [f"{p.rows[number]:,}" for p in passes])
    yield row("seconds", [f"{p.seconds:.1f}" for p in passes])
    rates = [(p.rows[0] + len(p.skipped)) / p.seconds for p in passes]
    yield row("jobs per second", [f"{rate:,.0f}" for rate in rates])
    if len(passes) > 1:
        ratio, many = rates[0] / rates[1], _count_of(passes[0].workers)
        yield f"{many} did {ratio:.2f} times the work of one in the same time"


def _imported_most(engine: Engine) -> Iterator[str]:
    yield "\nimported by most files"
    query = select(jobs.Import.name, func.count()).group_by(jobs.Import.name)
    with engine.connect() as connection:
        most = query.order_by(func.count().desc(), jobs.Import.name).limit(10)
        for name, count in connection.execute(most):
            yield f"  {name:<21} {count:>6,}"


def _count_of(workers: int) -> str:
    return f"{workers} worker{'s' * (workers > 1)}"
