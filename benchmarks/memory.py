"""Measures the memory that jobs take, beside the standard pool's in the same run.

    python benchmarks/memory.py [--jobs N] [--scale N]

Each figure is of a program of its own. What is held to a goal, and what that is, stands
behind the figures; the exit status is 1 if one is missed.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import suppress
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import psutil
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.orm import Session

from dbpool_executor import DBPoolExecutor, session

BUFFER = 1000
WARM = 10_000  # jobs after which everything has been imported and allocated once
MEGABYTE = 1 << 20

engine: Engine  # of a worker of the standard pool


def make_engine(url: str) -> None:
    """Do in a worker of the standard pool what a careful user would."""
    global engine
    engine = create_engine(url)


def double(number: int) -> int:
    """Do next to nothing."""
    return 2 * number


def leave_a_cycle(megabytes: int) -> None:
    """Leave a cycle that holds much and has few objects."""
    cycle: list[object] = [bytearray(megabytes * MEGABYTE)]
    cycle.append(cycle)


def add_a_comment(number: int, statement: Callable[[str], object]) -> None:
    """Run a statement that is long, and like no other."""
    statement(f"SELECT {number} /* {'x' * MEGABYTE} */")


def query(number: int) -> None:
    """Run it in the job's session."""
    add_a_comment(number, lambda sql: session.execute(text(sql)).all())


def query_by_hand(number: int) -> None:
    """Run it in a worker of the standard pool."""
    with Session(engine) as own, own.begin():
        add_a_comment(number, lambda sql: own.execute(text(sql)).all())


def query_driver(number: int) -> None:
    """Run it as it stands, which SQLAlchemy keeps no copy of."""
    add_a_comment(number, lambda sql: session.connection().exec_driver_sql(sql).all())


def query_driver_by_hand(number: int) -> None:
    """Run it in a worker of the standard pool."""
    with Session(engine) as own, own.begin():
        add_a_comment(number, lambda sql: own.connection().exec_driver_sql(sql).all())


def give_back(data: bytes) -> bytes:
    """Return the argument."""
    return data


def fail(_: int) -> None:
    """Raise."""
    raise LookupError


def resident(process: psutil.Process) -> float:
    """Give the resident memory of a process, in MB."""
    return float(process.memory_info().rss) / 1e6


def peak(process: psutil.Process) -> float:
    """Give the most that a process has had, in MB."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024 / 1e6
    raise LookupError


def workers_peak() -> float:
    """Give the peak of the child that has had the most."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess, LookupError):
            found.append(peak(process))
    return max(found)


def cycles(executor: Executor, scale: int, _ours: bool) -> float:
    """Jobs that each leave a cycle with 5 MB."""
    for future in [executor.submit(leave_a_cycle, 5) for _ in range(scale)]:
        future.result()
    return workers_peak()


def cycles_in_chunks(executor: Executor, scale: int, _ours: bool) -> float:
    """The same in chunks of 100."""
    list(executor.map(leave_a_cycle, [5] * scale, chunksize=100))
    return workers_peak()


def statements(executor: Executor, scale: int, ours: bool) -> float:
    """Different statements of 1 MB, as text()."""
    list(executor.map(query if ours else query_by_hand, range(scale)))
    return workers_peak()


def driver_statements(executor: Executor, scale: int, ours: bool) -> float:
    """The same, as exec_driver_sql()."""
    list(executor.map(query_driver if ours else query_driver_by_hand, range(scale)))
    return workers_peak()


def large_values(executor: Executor, _scale: int, _ours: bool) -> float:
    """What 5 arguments and results of 100 MB leave in all processes together."""
    own = psutil.Process()

    def total() -> float:
        gc.collect()
        everyone = [own, *own.children(recursive=True)]
        return sum(resident(process) for process in everyone)

    data = bytes(100 * MEGABYTE)
    executor.submit(give_back, b"").result()
    before = total()
    for _ in range(5):
        assert len(executor.submit(give_back, data).result()) == len(data)
    time.sleep(1)
    return total() - before


def callers_locals(executor: Executor, scale: int, _ours: bool) -> float:
    """The parent's peak over calls that each hold 20 MB, map and read a failure."""

    def call() -> None:
        held = bytearray(20 * MEGABYTE)
        assert len(list(executor.map(double, range(2)))) == 2
        with suppress(LookupError):
            executor.submit(fail, 1).result()
        with suppress(Exception):
            executor.submit(double, lambda: held).result()  # type: ignore[arg-type, return-value]

    for _ in range(scale // 3):
        call()
    return peak(psutil.Process())


# Name, what it measures, and the most that it may be: of the standard pool's, or in MB.
Measure = Callable[[Executor, int, bool], float]
COMPARED: list[tuple[Measure, float]] = [
    (cycles, 1.5),
    (cycles_in_chunks, 1.5),
    (statements, 1.5),
    (driver_statements, 1.5),
    (callers_locals, 2.0),
]
ALONE: list[tuple[Measure, float]] = [(large_values, 20.0)]


def sample(name: str, contender: str, scale: int) -> None:
    """Measure one thing of one contender, and print it."""
    measure: Measure = globals()[name]
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{Path(folder) / 'empty.db'}"
        executor: Executor
        if contender == "ours":
            executor = DBPoolExecutor(url, max_workers=2)
        else:
            executor = ProcessPoolExecutor(
                2, get_context("forkserver"), make_engine, (url,)
            )
        with executor:
            print(measure(executor, scale, contender == "ours"))


def measured(measure: Measure, contender: str, scale: int) -> float:
    """Measure in a program of its own."""
    command = [sys.executable, __file__, "--scale", str(scale)]
    done = subprocess.run(
        [*command, "--sample", measure.__name__, contender],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    return float(done.stdout)


def compare(scale: int) -> bool:
    """Print all that is compared, and say whether all goals are met."""
    met = True
    for measure, goal in COMPARED:
        ours = measured(measure, "ours", scale)
        theirs = measured(measure, "standard", scale)
        ratio = ours / theirs
        met &= ratio <= goal
        print(f"{measure.__doc__} ({scale} jobs)")
        print(
            f"    {ours:.0f} MB, standard pool {theirs:.0f} MB: {ratio:.2f} "
            f"(goal: {goal})"
        )
    for measure, goal in ALONE:
        ours = measured(measure, "ours", scale)
        met &= ours <= goal
        print(f"{measure.__doc__}")
        print(f"    {ours:+.0f} MB (goal: {goal:.0f} MB)")
    return met


def million(jobs: int) -> bool:
    """Run jobs through map(buffersize=...), and say whether memory stays flat.

    The inputs come from an endless generator, of which no more are ever held than
    ``buffersize``.
    """
    taken = 0

    def numbers() -> Iterator[int]:
        nonlocal taken
        for number in itertools.count():
            taken = number + 1
            yield number

    parent = psutil.Process()
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{Path(folder) / 'empty.db'}"
        with DBPoolExecutor(url, max_workers=2) as executor:
            results = executor.map(double, numbers(), buffersize=BUFFER)
            most_ahead = 0
            start = time.monotonic()
            for count, result in enumerate(itertools.islice(results, jobs), 1):
                assert result == 2 * (count - 1)
                most_ahead = max(most_ahead, taken - count)
                if count == WARM:
                    before = most = resident(parent)
                elif count % WARM == 0:
                    most = max(most, resident(parent))
            seconds = time.monotonic() - start
            workers = [round(resident(p)) for p in parent.children(recursive=True)]
            results.close()
    print(f"{jobs} jobs through map(buffersize={BUFFER}), {seconds:.0f} s.")
    print(f"    inputs held at most:          {most_ahead}")
    print(f"    parent after {WARM} jobs:      {before:.1f} MB")
    print(
        f"    parent, the most after that:  {most:.1f} MB, {most - before:+.1f} MB "
        "(goal: 20 MB)"
    )
    print(f"    its processes at the end:     {workers} MB")
    return most - before < 20


def main() -> int:
    """Measure all."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=1_000_000)
    parser.add_argument("--scale", type=int, default=600)
    parser.add_argument("--sample", nargs=2)
    options = parser.parse_args()
    if options.sample:
        sample(*options.sample, options.scale)
        return 0
    print(
        f"Python {platform.python_version()}, SQLAlchemy {version('sqlalchemy')}, "
        f"{platform.system()}"
    )
    met = [million(options.jobs), compare(options.scale)]
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
