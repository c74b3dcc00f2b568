"""What is measured, how, with whom, and what is to be reached.

A measure starts one contender, warms its workers and gives figures, which are all costs:
less is better. Each result is compared with what it must be while the clock runs, big
ones by their size and their ends. What jobs wrote is counted from outside afterwards.
"""

from __future__ import annotations

import gc
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from contenders import (
    BARE,
    CONTENDERS,
    ONE_BY_ONE,
    OURS,
    PER_JOB,
    STANDARD,
    Contender,
    Runner,
)
from database import ROWS, execute
from fairness import Run, longest_unfair_wait

import jobs

Figures = dict[str, float]

LONGEST_START = 60.0
"""Seconds in which all workers of a contender must have run a job."""

LONGEST_ROUND_TRIPS = 3.0
"""Seconds after which no more round trips are made."""


class Work(NamedTuple):
    """Jobs of one kind.

    Attributes:
        job: The name of the function, in whichever module the contender takes it from.
        keys: Gives the arguments of so many jobs.
        is_right: Whether the result for a key is what it must be.
        count: Asks the database how many such jobs were ever committed.
    """

    job: str
    keys: Callable[[int], list[Any]]
    is_right: Callable[[Any, Any], bool]
    count: str | None = None


def _the_same(key: float, found: float) -> bool:
    return key == found


def _same_account(key: int, balance: int) -> bool:
    return balance == 100 + key


def _one_row(_key: int, rowcount: int) -> bool:
    return rowcount == 1


def _as_many_bytes(size: int, found: bytes) -> bool:
    return type(found) is bytes and len(found) == size


def _as_many_rows(count: int, found: list[tuple[int, str]]) -> bool:
    ends = [(0, "row 0"), (count - 1, f"row {count - 1}")]
    return len(found) == count and [found[0], found[-1]] == ends


def _as_long_an_array(count: int, found: Any) -> bool:
    return found.shape == (count,) and [found[0], found[-1]] == [0.0, count - 1.0]


def _accounts(count: int) -> list[int]:
    return [1 + number % ROWS for number in range(count)]


TRIVIAL = Work("trivial", lambda n: list(range(n)), _the_same)
READ = Work("read", _accounts, _same_account)
UPDATE = Work("update", _accounts, _one_row, "SELECT sum(updates) FROM bench_account")
BYTES = Work("data", lambda n: [1_000_000] * n, _as_many_bytes)
REPORT = Work("rows", lambda n: [100_000] * n, _as_many_rows)
ARRAY = Work("array", lambda n: [1_000_000] * n, _as_long_an_array)


def rate(
    work: Work, contender: Contender, workers: int, size: int, bursts: int = 1
) -> Figures:
    """Submit all jobs, then take all results; so many times, and the median counts."""
    keys = work.keys(max(workers, size // contender.slowness))
    job = getattr(import_module(contender.jobs), work.job)
    with contender.start(workers) as runner:
        warm(runner, workers)
        runner.run_all(job, keys[: 20 * workers])
        before = execute(work.count) if work.count else 0
        times = [_timed(work.is_right, runner, job, keys) for _ in range(bursts)]
        seconds = statistics.median(times)
        if work.count:
            assert execute(work.count) - before == bursts * len(keys)
    return {"us a job": seconds / len(keys) * 1e6}


def trivial_bursts(contender: Contender, workers: int, size: int) -> Figures:
    """Submit a hundredth, a tenth and all of some number of trivial jobs."""
    figures = {}
    with contender.start(workers) as runner:
        warm(runner, workers)
        runner.run_all(jobs.trivial, TRIVIAL.keys(20 * workers))
        for count in (size // 100, size // 10, size):
            keys = TRIVIAL.keys(count)
            seconds = _timed(TRIVIAL.is_right, runner, jobs.trivial, keys)
            figures[f"us a job of {count}"] = seconds / count * 1e6
    return figures


def batches(contender: Contender, workers: int, size: int) -> Figures:
    """Have trivial jobs run, many of them in one message."""
    keys = TRIVIAL.keys(size)
    with contender.start(workers) as runner:
        assert runner.run_batches is not None
        warm(runner, workers)
        in_batches = runner._replace(run_all=runner.run_batches)
        in_batches.run_all(jobs.trivial, keys)
        seconds = _timed(TRIVIAL.is_right, in_batches, jobs.trivial, keys)
    return {"us a job": seconds / len(keys) * 1e6}


def round_trip(work: Work, contender: Contender, workers: int, size: int) -> Figures:
    """Submit a job when the result of the last one is there."""
    keys = work.keys(size)
    job = getattr(import_module(contender.jobs), work.job)
    with contender.start(workers) as runner:
        warm(runner, workers)
        runner.run_all(job, keys[: 20 * workers])
        gc.collect()
        start = time.perf_counter()
        done, seconds = 0, 0.0
        while done < len(keys) and seconds < LONGEST_ROUND_TRIPS:
            assert work.is_right(keys[done], runner.submit(job, keys[done])())
            done += 1
            seconds = time.perf_counter() - start
    return {"us a job": seconds / done * 1e6}


def inserts(contender: Contender, workers: int, size: int) -> Figures:
    """Add rows to sessions, in 100 transactions; then fewer, one in each.

    The latter only through a ``map`` that makes transactions of chunks; others are given
    the chunks.
    """
    chunk = size // 100
    chunks = [list(range(start, start + chunk)) for start in range(0, size, chunk)]
    with contender.start(workers) as runner:
        warm(runner, workers)
        if runner.map is None:
            runner.run_all(jobs.insert_all, chunks[:workers])

            def insert() -> list[int]:
                parts = runner.run_all(jobs.insert_all, chunks)
                return [key for part in parts for key in part]

            return {CHUNKS: _insert(insert, size)}
        from session_jobs import insert as job

        list(runner.map(job, range(20 * workers)))
        few = range(size // 20)
        in_chunks = partial(runner.map, job, range(size), chunksize=chunk)
        return {
            CHUNKS: _insert(lambda: list(in_chunks()), size),
            SINGLE: _insert(lambda: list(runner.map(job, few)), len(few)),
        }


CHUNKS = "us a row, 100 transactions"
SINGLE = "us a row, a transaction each"


def _insert(insert: Callable[[], list[int]], size: int) -> float:
    execute("TRUNCATE bench_entry")
    gc.collect()
    start = time.perf_counter()
    assert insert() == list(range(size))
    seconds = time.perf_counter() - start
    assert execute("SELECT count(DISTINCT number) FROM bench_entry") == size
    assert execute("SELECT count(*) FROM bench_entry") == size
    return seconds / size * 1e6


def first_result(contender: Contender, _workers: int, size: int) -> Figures:
    """Let a fresh interpreter make an executor, and then another one.

    Once more than is asked for, and the medians of all but the first count: what is
    installed has its bytecode, of a checkout it may have to be written first.
    """
    name = next(name for name, other in CONTENDERS.items() if other is contender)
    command = [sys.executable, Path(__file__).with_name("first.py"), name]
    environment = {
        k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"
    }
    times = []
    for _ in range(size + 1):
        done = subprocess.run(
            command, stdout=subprocess.PIPE, env=environment, check=True
        )
        times.append(json.loads(done.stdout))
    first, second = map(statistics.median, zip(*times[1:], strict=True))
    return {FIRST: first * 1e3, SECOND: second * 1e3}


FIRST = "ms, the first executor"
SECOND = "ms, the second executor"


def idle(contender: Contender, workers: int, size: int) -> Figures:
    """Leave warm workers alone for some seconds.

    Counted are all threads of this program but the main one, which sleeps, and all
    processes that it has started.
    """
    with contender.start(workers) as runner:
        warm(runner, workers)
        time.sleep(0.5)  # whoever handled the last results goes to sleep
        before = _activity()
        time.sleep(size)
        after = _activity()
    return {
        SWITCHES: after[0] - before[0],
        "ms of CPU": (after[1] - before[1]) / 1e6,
    }


SWITCHES = "context switches"


def _activity() -> tuple[int, int]:
    # Context switches, and nanoseconds on a processor.
    switches = nanoseconds = 0
    pids = [process.pid for process in psutil.Process().children(recursive=True)]
    for pid in [os.getpid(), *pids]:
        for task in Path(f"/proc/{pid}/task").iterdir():
            if task.name == str(os.getpid()):
                continue  # the main thread
            for line in (task / "status").read_text().splitlines():
                if "ctxt_switches" in line:
                    switches += int(line.split()[-1])
            nanoseconds += int((task / "schedstat").read_text().split()[0])
    return switches, nanoseconds


def parent_cpu(contender: Contender, _workers: int, size: int) -> Figures:
    """Let more and more workers run trivial jobs, up to some number of workers.

    Five times, and the median counts.
    """
    figures = {}
    keys = TRIVIAL.keys(3_000)
    for workers in [number for number in (1, 2, 8, 64) if number <= size]:
        with contender.start(workers) as runner:
            warm(runner, workers)
            times = []
            for _ in range(5):
                gc.collect()  # what others have left is no cost of a job
                start = time.process_time()
                results = runner.run_all(jobs.trivial, keys)
                times.append(time.process_time() - start)
                assert results == keys
        seconds = statistics.median(times)
        figures[PARENT_CPU.format(workers)] = seconds / len(keys) * 1e6
    return figures


PARENT_CPU = "us of the parent's CPU a job, workers: {}"


def mixed_load(contender: Contender, workers: int, size: int) -> Figures:
    """Submit short jobs of 1 ms and a few long ones of 1 s, in random order, in bursts.

    A burst comes when the last short job of the burst before is done, so that workers
    are now and then idle while others are not. See :func:`longest_unfair_wait`.
    """
    chance = random.Random(6)
    short, long = 0.001, 1.0
    lengths = [short] * size + [long] * max(1, size // 330)
    chance.shuffle(lengths)
    jobs_done: list[tuple[float, Any, float]] = []
    with contender.start(workers) as runner:
        pids = warm(runner, workers)
        while lengths:
            number = chance.randint(1, 200)
            burst, lengths = lengths[:number], lengths[number:]
            first = len(jobs_done)
            for length in burst:
                submitted = time.monotonic()
                result = runner.submit(jobs.sleep, length)
                jobs_done.append((submitted, result, length))
            for _, result, length in reversed(jobs_done[first:]):
                if length == short:
                    result()
                    break
        runs = [Run(s, *result(), length == short) for s, result, length in jobs_done]
    return {UNFAIR: longest_unfair_wait(runs, pids) * 1e3}


UNFAIR = "ms waited at most, beside an idle worker"


def job_length(contender: Contender, workers: int, size: int) -> Figures:
    """Let jobs compute for a time, as many as take so many milliseconds together."""
    figures = {}
    with contender.start(workers) as runner:
        warm(runner, workers)
        for milliseconds in (0.1, 0.3, 1, 3, 10, 30, 100):
            seconds = milliseconds / 1e3
            each = (seconds + 0.0003) / workers  # with what an executor may add
            count = max(2 * workers, int(size / 1e3 / each))
            taken = _timed(_the_same, runner, jobs.burn, [seconds] * count)
            figures[f"us a job of {milliseconds:g} ms"] = taken / count * 1e6
    return figures


def warm(runner: Runner, workers: int) -> set[int]:
    """Give jobs until every worker has run one; tell their process ids."""
    seen: set[int] = set()
    deadline = time.monotonic() + LONGEST_START
    while len(seen) < workers:
        assert time.monotonic() < deadline, f"only {len(seen)} workers came to work"
        seen |= {pid for pid, *_ in runner.run_all(jobs.sleep, [0.001] * 10 * workers)}
    return seen


def _timed(
    is_right: Callable[[Any, Any], bool], runner: Runner, job: Any, keys: list[Any]
) -> float:
    gc.collect()
    start = time.perf_counter()
    results = runner.run_all(job, keys)
    assert all(map(is_right, keys, results))
    assert len(results) == len(keys)
    return time.perf_counter() - start


@dataclass(frozen=True)
class Scenario:
    """What is measured.

    Attributes:
        measure: Takes the contender, the number of workers and the size.
        size: How much: jobs, mostly; the docstring of the measure says what else.
        quick: The size that shows that it works.
        contenders: The names of those that take part.
        has_tables: Whether jobs need the tables.
    """

    measure: Callable[[Contender, int, int], Figures]
    size: int
    quick: int
    contenders: tuple[str, ...]
    has_tables: bool = False


EXECUTORS = tuple(n for n in CONTENDERS if n not in (PER_JOB, BARE, ONE_BY_ONE))
ALL = tuple(name for name in CONTENDERS if name != ONE_BY_ONE)
FEW = (OURS, STANDARD, "multiprocessing.Pool")

SCENARIOS = {
    "trivial-rate": Scenario(
        partial(rate, TRIVIAL, bursts=3), 10_000, 50, (*EXECUTORS, ONE_BY_ONE)
    ),
    "trivial-bursts": Scenario(
        trivial_bursts, 100_000, 1_000, (OURS, STANDARD, "joblib")
    ),
    "trivial-batches": Scenario(batches, 100_000, 400, EXECUTORS),
    "trivial-round-trip": Scenario(partial(round_trip, TRIVIAL), 2_000, 20, EXECUTORS),
    "read-rate": Scenario(partial(rate, READ), 10_000, 40, ALL, True),
    "read-round-trip": Scenario(partial(round_trip, READ), 1_000, 20, EXECUTORS, True),
    "update-rate": Scenario(partial(rate, UPDATE), 2_000, 40, ALL, True),
    "insert-chunks": Scenario(inserts, 100_000, 400, (OURS, STANDARD, BARE), True),
    "bytes-1mb": Scenario(partial(rate, BYTES), 100, 4, EXECUTORS),
    "rows-100k": Scenario(partial(rate, REPORT), 10, 2, EXECUTORS),
    "numpy-8mb": Scenario(partial(rate, ARRAY), 40, 4, EXECUTORS),
    "first-result": Scenario(first_result, 3, 1, (OURS, STANDARD), True),
    "idle": Scenario(idle, 10, 1, FEW),
    "workers-1-to-64": Scenario(parent_cpu, 64, 2, FEW),
    "mixed-load": Scenario(mixed_load, 2_000, 100, FEW),
    "job-length": Scenario(job_length, 500, 10, (*EXECUTORS, BARE)),
}


class Goal(NamedTuple):
    """A bound on what our figure is.

    Attributes:
        scenario: Where it is measured.
        figure: Which of its figures.
        sign: "<=": our figure, divided by the other's if there is one, is at most the
            bound. ">=": we are at least as many times as fast as the other.
        bound: The number.
        than: The other contender, if the bound is a ratio.
        than_figure: The other figure, if it is not the same.
    """

    scenario: str
    figure: str
    sign: str
    bound: float
    than: str | None = None
    than_figure: str | None = None

    def value(self, medians: dict[str, dict[str, float]]) -> float | None:
        """Give what was reached; None if it was not measured.

        Args:
            medians: Of the scenario, by figure and contender.
        """
        ours = medians.get(self.figure, {}).get(OURS)
        if self.than is None:
            return ours
        other = medians.get(self.than_figure or self.figure, {}).get(self.than)
        if ours is None or other is None:
            return None
        return ours / other if self.sign == "<=" else other / ours

    def is_met_by(self, value: float) -> bool:
        """Whether it was reached."""
        return value <= self.bound if self.sign == "<=" else value >= self.bound

    def __str__(self) -> str:
        """Say the bound, such as ``>= 5 x ProcessPoolExecutor``."""
        if self.than is None:
            return f"{self.sign} {self.bound:g} {self.figure}"
        other = self.than
        if self.than_figure is not None:
            other = f"{other} ({self.than_figure})"
        return f"{self.sign} {self.bound:g} x {other}"


_JOB = "us a job"
_PEERS = ("multiprocessing.Pool", "loky", "pebble", "mpire", "billiard", "joblib")

GOALS = [
    Goal("trivial-rate", _JOB, ">=", 5.0, STANDARD),
    Goal("trivial-rate", _JOB, ">=", 1.2, "multiprocessing.Pool"),
    *(
        Goal("trivial-rate", _JOB, ">=", 1.0, peer)
        for peer in (*_PEERS[1:], ONE_BY_ONE)
    ),
    Goal("trivial-batches", _JOB, ">=", 1.0, "joblib"),
    Goal("trivial-round-trip", _JOB, "<=", 0.4, STANDARD),
    *(Goal("trivial-round-trip", _JOB, "<=", 1.0, peer) for peer in _PEERS),
    Goal("read-rate", _JOB, ">=", 0.9, BARE),
    Goal("read-rate", _JOB, ">=", 1.3, STANDARD),
    Goal("read-rate", _JOB, ">=", 15.0, PER_JOB),
    Goal("read-round-trip", _JOB, "<=", 0.85, STANDARD),
    Goal("update-rate", _JOB, ">=", 0.9, BARE),
    Goal("update-rate", _JOB, ">=", 1.05, STANDARD),
    Goal("insert-chunks", CHUNKS, ">=", 20.0, OURS, SINGLE),
    Goal("insert-chunks", CHUNKS, "<=", 1.2, BARE),
    Goal("bytes-1mb", _JOB, ">=", 1.5, STANDARD),
    Goal("rows-100k", _JOB, ">=", 1.0, STANDARD),
    Goal("numpy-8mb", _JOB, ">=", 1.5, STANDARD),
    Goal("first-result", FIRST, "<=", 1.0, STANDARD),
    Goal("first-result", SECOND, "<=", 0.5, OURS, FIRST),
    Goal("idle", SWITCHES, "<=", 0.0),
    Goal("idle", "ms of CPU", "<=", 0.0),
    Goal(
        "workers-1-to-64", PARENT_CPU.format(64), "<=", 1.5, OURS, PARENT_CPU.format(1)
    ),
    Goal("mixed-load", UNFAIR, "<=", 20.0),
]
