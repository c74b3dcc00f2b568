"""Measures that a million jobs through ``map(buffersize=...)`` keep memory flat.

    python benchmarks/memory.py [JOBS]

The inputs come from an endless generator, of which no more are ever held than
``buffersize``. The goal: the parent grows by less than 20 MB.
"""

from __future__ import annotations

import itertools
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import psutil

from dbpool_executor import DBPoolExecutor

BUFFER = 1000
WARM = 10_000  # jobs after which everything has been imported and allocated once


def double(number: int) -> int:
    """Do next to nothing."""
    return 2 * number


def megabytes(process: psutil.Process) -> float:
    """Give the resident memory of a process."""
    return float(process.memory_info().rss) / 1e6


def main(jobs: int) -> None:
    """Run the jobs, and print what memory they took."""
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
                    before = most = megabytes(parent)
                elif count % WARM == 0:
                    most = max(most, megabytes(parent))
            seconds = time.monotonic() - start
            workers = [round(megabytes(p)) for p in parent.children(recursive=True)]
            results.close()
    print(
        f"Python {platform.python_version()}, SQLAlchemy {version('sqlalchemy')}, "
        f"{platform.system()}: {jobs} jobs, buffersize {BUFFER}, {seconds:.0f} s"
    )
    print(f"inputs held at most:          {most_ahead}")
    print(f"parent after {WARM} jobs:      {before:.1f} MB")
    print(f"parent, the most after that:  {most:.1f} MB, {most - before:+.1f} MB")
    print(f"its processes at the end:     {workers} MB")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
