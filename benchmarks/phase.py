"""Measures what it costs a job that its phase is noted in shared memory.

    python benchmarks/phase.py

The median over rounds of many jobs; the goal is at most 2 us a job.
"""

from __future__ import annotations

import multiprocessing
import platform
import statistics
import time

from dbpool_executor._phase import WORDS, Phase, PhaseRecord

JOBS = 100_000
ROUNDS = 9


def note_all(record: PhaseRecord) -> float:
    """Note the phases of many jobs, and give the seconds for one."""
    start = time.perf_counter()
    for number in range(JOBS):
        record.begin(number)
        record.advance(Phase.COMMITTING)
        record.advance(Phase.COMMITTED)
    return (time.perf_counter() - start) / JOBS


def main() -> None:
    """Measure, and print the median."""
    record = PhaseRecord(multiprocessing.get_context("spawn").RawArray("Q", WORDS))
    median = statistics.median(note_all(record) for _ in range(ROUNDS))
    print(f"Python {platform.python_version()}, {platform.system()}, {ROUNDS} rounds")
    print(f"running, committing, committed: {median * 1e6:.2f} us a job")


if __name__ == "__main__":
    main()
