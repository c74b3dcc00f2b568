"""Measures the executor against what a user would take instead, in one run.

    python benchmarks/run.py [--rounds N] [--workers N] [--scenario NAME] [--json]

The contenders take turns round by round, so that a noisy minute hits all of them; what
counts are the ratios of their medians. Results are checked inside what is timed. The
scenarios with rows need PostgreSQL: DBPOOL_BENCH_URL says where.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, NamedTuple

from sqlalchemy import create_engine, text

import jobs
from dbpool_executor import DBPoolExecutor

ROWS = 1000


class Contender(NamedTuple):
    """Something that runs jobs: how it submits one, and which functions it is given."""

    submit: Callable[..., Callable[[], Any]]
    hand_written: bool = True


def of_executor(executor: Executor) -> Callable[..., Callable[[], Any]]:
    """Submit to an executor."""
    return lambda fn, *args: executor.submit(fn, *args).result


def of_pool(pool: Any) -> Callable[..., Callable[[], Any]]:
    """Submit to a multiprocessing.Pool."""
    return lambda fn, *args: pool.apply_async(fn, args).get


def bare(workers: int) -> Callable[[Callable[..., Any], list[int]], float]:
    """Give the same loop in as many processes with no executor: seconds for all."""

    def run(fn: Callable[..., Any], keys: list[int]) -> float:
        context = multiprocessing.get_context("fork")
        ready, go = context.Barrier(workers + 1), context.Barrier(workers + 1)
        done = context.Barrier(workers + 1)
        parts = [keys[i::workers] for i in range(workers)]
        args = (fn, ready, go, done)
        processes = [context.Process(target=_loop, args=(*args, p)) for p in parts]
        for process in processes:
            process.start()
        ready.wait()
        start = time.perf_counter()
        go.wait()
        done.wait()
        seconds = time.perf_counter() - start
        for process in processes:
            process.join()
        return seconds

    return run


def _loop(fn: Any, ready: Any, go: Any, done: Any, keys: list[int]) -> None:
    jobs.connect()
    fn(keys[0])
    ready.wait()
    go.wait()
    for key in keys:
        fn(key)
    done.wait()


@contextmanager
def contenders(workers: int) -> Iterator[dict[str, Contender]]:
    """Start every contender, with workers that are warm."""
    context = multiprocessing.get_context("forkserver")
    with (
        DBPoolExecutor(jobs.make_engine, workers) as ours,
        ProcessPoolExecutor(workers, context, jobs.connect) as standard,
        context.Pool(workers, jobs.connect) as pool,
    ):
        found = {
            "dbpool_executor": Contender(of_executor(ours), hand_written=False),
            "ProcessPoolExecutor": Contender(of_executor(standard)),
            "multiprocessing.Pool": Contender(of_pool(pool)),
        }
        for contender in found.values():
            _all_at_once(contender, jobs.trivial, list(range(200)))
        yield found


def _all_at_once(contender: Contender, fn: Any, keys: list[int]) -> float:
    start = time.perf_counter()
    results = [contender.submit(fn, key) for key in keys]
    got = [result() for result in results]
    seconds = time.perf_counter() - start
    assert len(got) == len(keys)
    return seconds


def _one_by_one(contender: Contender, fn: Any, keys: list[int]) -> float:
    start = time.perf_counter()
    for key in keys:
        contender.submit(fn, key)()
    return time.perf_counter() - start


class Scenario(NamedTuple):
    """What is measured: how, with which functions, and how many jobs."""

    measure: Callable[[Contender, Any, list[int]], float]
    ours: Any
    by_hand: Any
    keys: list[int]
    has_bare_loop: bool = False


SCENARIOS = {
    "trivial jobs, rate": Scenario(
        _all_at_once, jobs.trivial, jobs.trivial, list(range(10_000))
    ),
    "trivial jobs, round trip": Scenario(
        _one_by_one, jobs.trivial, jobs.trivial, list(range(2_000))
    ),
    "1 MB results, rate": Scenario(
        _all_at_once, jobs.data, jobs.data, [1_000_000] * 100
    ),
    "one-row read, rate": Scenario(
        _all_at_once, jobs.read_ours, jobs.read_by_hand, [*range(1, ROWS + 1)] * 3, True
    ),
    "one-row read, round trip": Scenario(
        _one_by_one, jobs.read_ours, jobs.read_by_hand, [*range(1, ROWS + 1)]
    ),
    "one-row update, rate": Scenario(
        _all_at_once, jobs.update_ours, jobs.update_by_hand, [*range(1, ROWS + 1)], True
    ),
}


def measure(names: list[str], rounds: int, workers: int) -> dict[str, Any]:
    """Run the scenarios and give all samples, in seconds."""
    samples: dict[str, dict[str, list[float]]] = {}
    for name in names:
        scenario = SCENARIOS[name]
        found = samples[name] = {}
        for _ in range(rounds):
            # The loop with no executor forks, so it runs while no other is there.
            if scenario.has_bare_loop:
                seconds = bare(workers)(scenario.by_hand, scenario.keys)
                found.setdefault("no executor", []).append(seconds)
        with contenders(workers) as running:
            for _ in range(rounds):
                for label, contender in running.items():
                    fn = scenario.by_hand if contender.hand_written else scenario.ours
                    seconds = scenario.measure(contender, fn, scenario.keys)
                    found.setdefault(label, []).append(seconds)
    return samples


def report(samples: dict[str, Any]) -> Iterator[str]:
    """Give the lines of a table: microseconds a job, and the ratio to ours."""
    for name, found in samples.items():
        count = len(SCENARIOS[name].keys)
        ours = statistics.median(found["dbpool_executor"])
        yield f"{name} ({count} jobs)"
        for label, seconds in found.items():
            median = statistics.median(seconds)
            each = median / count * 1e6
            yield f"  {label:22}{each:10.1f} us a job   {median / ours:6.2f} x ours"


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--scenario", action="append", choices=list(SCENARIOS))
    parser.add_argument("--json", action="store_true", help="print all samples")
    args = parser.parse_args()
    url = "postgresql+psycopg://postgres@127.0.0.1/test"
    os.environ.setdefault("DBPOOL_BENCH_URL", url)
    names = args.scenario or list(SCENARIOS)
    engine = create_engine(os.environ["DBPOOL_BENCH_URL"])
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE IF EXISTS bench_account"))
        connection.execute(
            text("CREATE TABLE bench_account (id integer PRIMARY KEY, balance integer)")
        )
        connection.execute(
            text("INSERT INTO bench_account VALUES (:id, 0)"),
            [{"id": i} for i in range(1, ROWS + 1)],
        )
    engine.dispose()
    try:
        samples = measure(names, args.rounds, args.workers)
    finally:
        with engine.begin() as connection:
            connection.execute(text("DROP TABLE bench_account"))
        engine.dispose()
    machine = (
        f"Python {platform.python_version()}, SQLAlchemy {version('sqlalchemy')}, "
        f"{platform.system()}, {os.cpu_count()} cores, {args.workers} workers, "
        f"{args.rounds} rounds"
    )
    if args.json:
        json.dump({"machine": machine, "seconds": samples}, sys.stdout, indent=1)
        return
    print(machine, *report(samples), sep="\n")


if __name__ == "__main__":
    main()
