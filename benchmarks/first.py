"""Prints the seconds until the first result of two executors, one after the other.

    python benchmarks/first.py CONTENDER

The first time begins before anything is imported and ends with the one-row read that is
the first job's result; the second begins when the first executor was shut down.
"""

from __future__ import annotations

import sys
import time


def start(contender: str):
    """Import all that a program needs, and give what makes its executor, and the job."""
    if contender == "dbpool_executor":
        from functools import partial
        from multiprocessing import get_context

        from session_jobs import read

        from dbpool_executor import DBPoolExecutor
        from jobs import make_engine

        make = partial(DBPoolExecutor, make_engine, 2, get_context("forkserver"))
    else:
        from concurrent.futures import ProcessPoolExecutor
        from functools import partial
        from multiprocessing import get_context

        from jobs import connect, read

        make = partial(ProcessPoolExecutor, 2, get_context("forkserver"), connect)
    return make, read


def main(contender: str) -> None:
    """Measure, and print."""
    seconds = []
    begin = time.perf_counter()
    make, read = start(contender)
    for _ in range(2):
        with make() as executor:
            assert executor.submit(read, 1).result() == 101
            seconds.append(time.perf_counter() - begin)
        begin = time.perf_counter()
    print(seconds)


if __name__ == "__main__":
    main(sys.argv[1])
