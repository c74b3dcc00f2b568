"""Measures what it costs a program that its connections are kept out of its copies.

    python benchmarks/guard.py

Interpreters with the package and without it take turns, so that a noisy minute hits
both. What counts are the shortest times: the work is the same at each turn, and all
that comes on top is the machine's. The goals: at most 1 us a checkout, and an import of
at most 10 ms beyond SQLAlchemy's own.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROUNDS = 15
_ROOT = Path(__file__).parent.parent

_SQLALCHEMY = "import time, sqlalchemy, sqlalchemy.orm, sqlalchemy.ext.asyncio\n"

_CHECKOUT = """
engine = sqlalchemy.create_engine("sqlite://", poolclass=sqlalchemy.QueuePool)
engine.raw_connection().close()
times = []
for _ in range(20):
    start = time.perf_counter()
    for _ in range(1_000):
        engine.raw_connection().close()
    times.append(time.perf_counter() - start)
print(min(times) / 1_000 * 1e6)
"""

_CONNECT = """
engine = sqlalchemy.create_engine("sqlite://", poolclass=sqlalchemy.NullPool)
times = []
for _ in range(20):
    start = time.perf_counter()
    for _ in range(100):
        engine.raw_connection().close()
    times.append(time.perf_counter() - start)
print(min(times) / 100 * 1e6)
"""

# Five idle connections and 200 000 objects, as a program of some size has them.
_FORK = """
import os
engine = sqlalchemy.create_engine("sqlite://", poolclass=sqlalchemy.QueuePool)
connections = [engine.raw_connection() for _ in range(5)]
for connection in connections:
    connection.close()
objects = [[number] for number in range(200_000)]
pids = []
for number in range(21):
    if number == 1:  # the first one looks for what connected before the import
        start = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    pids.append(pid)
print((time.perf_counter() - start) / 20 * 1e6)
for pid in pids:
    os.waitpid(pid, 0)
"""

_IMPORT = """
start = time.perf_counter()
import dbpool_executor
print((time.perf_counter() - start) * 1e3)
"""
_IMPORT_ALL = _IMPORT.replace(
    "import dbpool_executor", "from dbpool_executor import DBPoolExecutor, session"
)

# What the executor needs of the standard library. And a collection of all that
# SQLAlchemy has made may fall into any import.
_STANDARD = """
import concurrent.futures.process, faulthandler, multiprocessing.context
import multiprocessing.forkserver, multiprocessing.resource_tracker, selectors
"""
_UNCOLLECTED = "import gc; gc.disable()\n"


def measure(program: str, environment: dict[str, str]) -> float:
    """Run a program in an interpreter of its own; give the number that it prints."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        cwd=_ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)


def shortest(*programs: str) -> list[float]:
    """Run programs in turns, and give the least number of each."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
        environment |= {"PYTHONPYCACHEPREFIX": folder}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        for program in programs:
            measure(program, environment)  # writes the bytecode
        rounds = [[measure(p, environment) for p in programs] for _ in range(ROUNDS)]
    return [min(column) for column in zip(*rounds, strict=True)]


def compare(name: str, work: str) -> None:
    """Print what some work costs with the package and without it."""
    package = "import dbpool_executor\n"
    without, with_it = shortest(_SQLALCHEMY + work, _SQLALCHEMY + package + work)
    print(
        f"{name:<26}{without:9.2f} us without, {with_it:9.2f} us with: "
        f"{with_it - without:+.2f} us, ratio {with_it / without:.3f}"
    )


def main() -> None:
    """Measure, and print."""
    print(
        f"Python {platform.python_version()}, SQLAlchemy {version('sqlalchemy')}, "
        f"{platform.system()}, {os.cpu_count()} cores, the shortest of {ROUNDS} rounds"
    )
    compare("checkout and check-in", _CHECKOUT)
    compare("connect and close", _CONNECT)
    compare("fork, 5 idle connections", _FORK)
    imports = {
        "the package": _UNCOLLECTED + _IMPORT,
        "the executor and the session": _UNCOLLECTED + _IMPORT_ALL,
        "the same, after the standard library": _UNCOLLECTED + _STANDARD + _IMPORT_ALL,
        "the executor and the session, collection on": _IMPORT_ALL,
    }
    costs = shortest(*(_SQLALCHEMY + program for program in imports.values()))
    for name, cost in zip(imports, costs, strict=True):
        print(f"import {name:<45}{cost:6.2f} ms")


if __name__ == "__main__":
    main()
