"""Measures what it costs a job that its phase is noted, and its commits are watched.

    python benchmarks/phase.py

The shortest of some rounds of many jobs; the goal is at most 2 us a job. What watches
the commits runs inside the methods of SQLAlchemy's dialect, once for each BEGIN, each
statement and each COMMIT: here it is called as they call it, on a connection to SQLite
in memory.
"""

from __future__ import annotations

import multiprocessing
import platform
import time
from collections.abc import Callable
from importlib.metadata import version

from sqlalchemy import create_engine

from dbpool_executor._wire.phase import WORDS, Phase, PhaseRecord
from dbpool_executor._worker.commit_watch import CommitWatch
from dbpool_executor._worker.timeout import Alarm

JOBS = 100_000
ROUNDS = 9


def shortest(work: Callable[[int], object]) -> float:
    """Do some work for many jobs in some rounds; give the least microseconds of one."""
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for number in range(JOBS):
            work(number)
        times.append(time.perf_counter() - start)
    return min(times) / JOBS * 1e6


def main() -> None:
    """Measure, and print."""
    record = PhaseRecord(multiprocessing.get_context("spawn").RawArray("Q", WORDS))

    def note_all(number: int) -> None:
        record.begin(number)
        record.advance(Phase.COMMITTING)
        record.advance(Phase.COMMITTED)

    engine = create_engine("sqlite://")
    watch = CommitWatch(engine, record, Alarm(lambda: None))
    print(
        f"Python {platform.python_version()}, SQLAlchemy {version('sqlalchemy')}, "
        f"{platform.system()}, the shortest of {ROUNDS} rounds of {JOBS} jobs"
    )
    nothing = shortest(lambda _: None)
    print(
        f"{'running, committing, committed:':<36}{shortest(note_all) - nothing:.2f} us"
    )
    with engine.connect() as connection:
        connection.exec_driver_sql("SELECT 1")
        statement = "UPDATE account SET balance = balance + ? WHERE id = ?"
        lent = connection.connection
        cursor = lent.cursor()

        def note_statement(_number: int) -> None:
            watch._before_statement(cursor, statement)

        def note_elsewhere(_number: int) -> None:
            watch._is_sqlite = False
            watch._before_statement(cursor, statement)
            watch._is_sqlite = True

        def begin(_number: int) -> None:
            watch._before_begin(lent)
            watch._begun.clear()

        costs = {
            "a statement is looked at:": note_elsewhere,
            "a statement on SQLite is looked at:": note_statement,
            "a BEGIN is looked at:": begin,
            "a COMMIT is looked at and noted:": lambda _: watch._before_commit(lent),
        }
        for name, work in costs.items():
            print(f"{name:<36}{shortest(work) - nothing:.2f} us")


if __name__ == "__main__":
    main()
