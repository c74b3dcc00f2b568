"""Measures what a key costs: a job with a row in the ledger beside the same one without.

    python benchmarks/ledger.py [ROUNDS [ROWS]]

The database is the one of ``DBPOOL_BENCH_URL``. Both take turns, round by round, on the
same workers; what counts is the median of the ratios. Then a batch that is complete is run
again, and the ledger is filled up with ROWS rows to see whether that slows anything down.
"""

from __future__ import annotations

import itertools
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version

from database import ROWS, tables
from sqlalchemy import create_engine, func, insert, select, text

from dbpool_executor import DBPoolExecutor, Ledger, session
from jobs import make_engine

JOBS, CHUNK, BATCH = 1000, 100, 10_000
UPDATE = text("UPDATE bench_account SET updates = updates + 1 WHERE id = :id")

_numbers = itertools.count()


def update(number: int) -> None:
    """Change one row."""
    session.execute(UPDATE, {"id": number % ROWS + 1})


def update_and_give(number: int) -> int:
    """Change one row and give a result, which the ledger keeps."""
    update(number)
    return number


def key_of(number: int) -> str:
    """Give the key of a job."""
    return f"bench-{number}"


def fresh(count: int) -> list[int]:
    """Give numbers that no job had before."""
    return list(itertools.islice(_numbers, count))


def seconds(run: Callable[[], Iterator[object]]) -> float:
    """Time a batch, all of whose results are taken."""
    start = time.perf_counter()
    for _ in run():
        pass
    return time.perf_counter() - start


def ratios(executor: DBPoolExecutor, rounds: int) -> Iterator[tuple[str, list[float]]]:
    """Compare jobs with keys and without, in turns."""
    once = executor.options(key=key_of)
    for name, job, chunksize in (
        ("an update, no result", update, 1),
        ("an update with a result", update_and_give, 1),
        ("chunks of 100, no result", update, CHUNK),
        ("chunks of 100 with results", update_and_give, CHUNK),
    ):
        found = []
        count = JOBS if chunksize == 1 else BATCH
        for number in range(rounds + 1):
            plain, keyed = (
                seconds(partial(on.map, job, fresh(count), chunksize=chunksize))
                for on in (executor, once)
            )
            if number:  # the first is to warm up
                found.append(keyed / plain)
        yield name, found


def main(rounds: int, rows: int) -> None:
    """Measure, and print."""
    ledger = Ledger("bench", table="bench_ledger")
    engine = create_engine(make_engine().url)
    print(
        f"Python {platform.python_version()}, SQLAlchemy {version('sqlalchemy')}, "
        f"{engine.dialect.name}: {rounds} rounds"
    )
    with tables():
        ledger.table.drop(engine, checkfirst=True)
        ledger.create(engine)
        with DBPoolExecutor(make_engine, 2, ledger=ledger) as executor:
            for name, found in ratios(executor, rounds):
                middle, low, high = statistics.median(found), min(found), max(found)
                print(f"{name:28} {middle:.2f} x ({low:.2f} to {high:.2f})")
            once = executor.options(key=key_of)
            batch = fresh(BATCH)
            run = partial(once.map, update_and_give, chunksize=CHUNK)
            first, again = seconds(partial(run, batch)), seconds(partial(run, batch))
            print(f"{BATCH} jobs {first:.2f} s, skipped {BATCH / again:,.0f} a second")
            if rows:
                fill(ledger, engine, rows)
                batch = fresh(BATCH)
                full = seconds(
                    lambda: once.map(update_and_give, batch, chunksize=CHUNK)
                )
                again = seconds(
                    lambda: once.map(update_and_give, batch, chunksize=CHUNK)
                )
                with engine.connect() as connection:
                    count = connection.scalar(
                        select(func.count()).select_from(ledger.table)
                    )
                print(
                    f"with {count:,} rows: {BATCH} jobs {full / first:.2f} x that time, "
                    f"skipped {BATCH / again:,.0f} a second"
                )
        ledger.table.drop(engine)
    engine.dispose()


def fill(ledger: Ledger, engine: object, rows: int) -> None:
    """Add rows as jobs would have left them."""
    from dbpool_executor._ledger.ledger import COMMITTED, now

    with engine.begin() as connection:  # type: ignore[attr-defined]
        for first in range(0, rows, 10_000):
            connection.execute(
                insert(ledger.table),
                [
                    {
                        "digest": ledger.digest(f"old-{number}"),
                        "ledger": ledger.name,
                        "key": f"old-{number}",
                        "state": COMMITTED,
                        "attempt": 1,
                        "job": "jobs.update",
                        "result": str(number),
                        "committed_at": now(),
                    }
                    for number in range(first, min(first + 10_000, rows))
                ],
            )


if __name__ == "__main__":
    main(*(int(each) for each in [*sys.argv[1:], "7", "1000000"][:2]))
