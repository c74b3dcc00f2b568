"""What a user could take to run jobs in processes: how it starts, how it is given jobs.

Every peer is started as its documentation does, with forkserver where it leaves the
choice. Its package is imported when it starts, so that whoever measures one contender
has none of the others in the process.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from operator import methodcaller
from types import ModuleType
from typing import Any, NamedTuple

import jobs

BATCH = 100
"""Jobs in one message, for those who are told how many."""

Result = Callable[[], Any]
"""Waits for the result of a job and gives it."""


class Runner(NamedTuple):
    """Something with workers that takes jobs.

    Attributes:
        submit: Takes one.
        run_all: Takes a job for each key, and gives the results in order.
        map: Takes calls of which a chunk is one transaction, where there is such a thing.
        run_batches: Does as run_all does, with many jobs in one message, where there is
            a call for that.
    """

    submit: Callable[..., Result]
    run_all: Callable[[Callable[[Any], Any], Sequence[Any]], list[Any]]
    map: Callable[..., Iterator[Any]] | None = None
    run_batches: Callable[[Callable[[Any], Any], Sequence[Any]], list[Any]] | None = (
        None
    )


@dataclass(frozen=True)
class Contender:
    """One way to run jobs.

    Attributes:
        start: Starts it with a number of workers.
        package: The distribution that must be installed; None for what Python has.
        jobs: The module with the functions that it runs.
        slowness: By how much its job counts are cut, which would take minutes.
    """

    start: Callable[[int], AbstractContextManager[Runner]]
    package: str | None = None
    jobs: str = "jobs"
    slowness: int = 1

    @property
    def is_installed(self) -> bool:
        """Whether it can start here."""
        try:
            return self.package is None or bool(version(self.package))
        except PackageNotFoundError:
            return False


def runner(
    submit: Callable[..., Any],
    result: str = "result",
    in_batches: Callable[..., Any] | None = None,
) -> Runner:
    """Make a runner of what takes jobs one by one.

    Args:
        submit: Takes one, and gives what stands for its result, such as a future.
        result: The method of that, which waits.
        in_batches: Takes jobs in batches of some size.
    """
    wait = methodcaller(result)

    def run_all(fn: Callable[[Any], Any], keys: Sequence[Any]) -> list[Any]:
        # What a user would write, and nothing of ours for each job.
        futures = [submit(fn, key) for key in keys]
        return [wait(future) for future in futures]

    return Runner(
        lambda fn, *args: partial(wait, submit(fn, *args)),
        run_all,
        run_batches=in_batches and (lambda fn, keys: list(in_batches(fn, keys, BATCH))),
    )


@contextmanager
def _ours(workers: int) -> Iterator[Runner]:
    from dbpool_executor import DBPoolExecutor

    with DBPoolExecutor(jobs.make_engine, workers) as executor:
        found = runner(
            executor.submit,
            in_batches=lambda fn, keys, size: executor.map(fn, keys, chunksize=size),
        )
        yield found._replace(map=executor.map)


@contextmanager
def _standard(
    workers: int, initializer: Callable[[], None] | None = jobs.connect
) -> Iterator[Runner]:
    from concurrent.futures import ProcessPoolExecutor

    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(workers, context, initializer) as executor:
        yield runner(
            executor.submit,
            in_batches=lambda fn, keys, size: executor.map(fn, keys, chunksize=size),
        )


def _joblib_one_by_one(workers: int) -> AbstractContextManager[Runner]:
    return _joblib(workers, batch=1)


def _engine_per_job(workers: int) -> AbstractContextManager[Runner]:
    return _standard(workers, initializer=None)


@contextmanager
def _multiprocessing(
    workers: int, package: ModuleType = multiprocessing
) -> Iterator[Runner]:
    with package.get_context("forkserver").Pool(workers, jobs.connect) as pool:
        yield runner(lambda fn, *args: pool.apply_async(fn, args), "get", pool.map)
        pool.close()
        pool.join()


@contextmanager
def _billiard(workers: int) -> Iterator[Runner]:
    import billiard

    with _multiprocessing(workers, billiard) as found:
        yield found


@contextmanager
def _loky(workers: int) -> Iterator[Runner]:
    from loky import get_reusable_executor

    with get_reusable_executor(workers, initializer=jobs.connect) as executor:
        yield runner(
            executor.submit,
            in_batches=lambda fn, keys, size: executor.map(fn, keys, chunksize=size),
        )


@contextmanager
def _pebble(workers: int) -> Iterator[Runner]:
    from pebble import ProcessPool

    context = multiprocessing.get_context("forkserver")
    with ProcessPool(workers, initializer=jobs.connect, context=context) as pool:
        yield runner(
            lambda fn, *args: pool.schedule(fn, args),
            in_batches=lambda fn, keys, size: pool.map(
                fn, keys, chunksize=size
            ).result(),
        )


@contextmanager
def _mpire(workers: int) -> Iterator[Runner]:
    from mpire import WorkerPool

    with WorkerPool(workers, start_method="forkserver", keep_alive=True) as pool:

        def submit(fn: Callable[..., Any], *args: Any) -> Any:
            return pool.apply_async(fn, args, worker_init=jobs.connect)

        def in_batches(fn: Callable[..., Any], keys: Sequence[Any], size: int) -> Any:
            return pool.map(fn, keys, chunk_size=size, worker_init=jobs.connect)

        yield runner(submit, "get", in_batches)


@contextmanager
def _joblib(workers: int, batch: int | str = "auto") -> Iterator[Runner]:
    from joblib import Parallel, delayed
    from joblib.externals.loky import get_reusable_executor

    with Parallel(
        workers, backend="loky", batch_size=batch, initializer=jobs.connect
    ) as parallel:

        def submit(fn: Callable[..., Any], *args: Any) -> Result:
            return lambda: parallel([delayed(fn)(*args)])[0]

        def run_all(fn: Callable[[Any], Any], keys: Sequence[Any]) -> list[Any]:
            return parallel(delayed(fn)(key) for key in keys)

        yield Runner(submit, run_all, run_batches=run_all)
    get_reusable_executor().shutdown()


@contextmanager
def _no_executor(workers: int) -> Iterator[Runner]:
    """Run the bare loop in as many processes.

    Each gets its share of the keys in one message and sends its results in one.
    """
    context = multiprocessing.get_context("forkserver")
    pipes, processes = [], []
    for _ in range(workers):
        mine, theirs = context.Pipe()
        process = context.Process(target=_loop, args=(theirs,))
        process.start()
        theirs.close()
        pipes.append(mine)
        processes.append(process)

    def run_all(fn: Callable[[Any], Any], keys: Sequence[Any]) -> list[Any]:
        for number, pipe in enumerate(pipes):
            pipe.send((fn, keys[number::workers]))
        results: list[Any] = [None] * len(keys)
        for number, pipe in enumerate(pipes):
            results[number::workers] = pipe.recv()
        return results

    def submit(fn: Callable[..., Any], *args: Any) -> Result:
        raise NotImplementedError("no executor, no submit()")

    try:
        yield Runner(submit, run_all)
    finally:
        for pipe, process in zip(pipes, processes, strict=True):
            pipe.close()
            process.join()


def _loop(pipe: Connection) -> None:
    jobs.connect()
    while True:
        try:
            fn, keys = pipe.recv()
        except EOFError:
            return
        pipe.send([fn(key) for key in keys])


OURS = "dbpool_executor"
STANDARD = "ProcessPoolExecutor"
BARE = "no executor"
PER_JOB = "engine per job"
ONE_BY_ONE = "joblib, batch_size=1"

CONTENDERS = {
    OURS: Contender(_ours, jobs="session_jobs"),
    STANDARD: Contender(_standard),
    "multiprocessing.Pool": Contender(_multiprocessing),
    "loky": Contender(_loky, "loky"),
    "pebble": Contender(_pebble, "pebble"),
    "mpire": Contender(_mpire, "mpire"),
    "billiard": Contender(_billiard, "billiard"),
    "joblib": Contender(_joblib, "joblib"),
    ONE_BY_ONE: Contender(_joblib_one_by_one, "joblib"),
    PER_JOB: Contender(_engine_per_job, jobs="engine_jobs", slowness=10),
    BARE: Contender(_no_executor),
}
