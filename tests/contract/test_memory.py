"""The memory of workers."""

from __future__ import annotations

import sys

import pytest
from sqlalchemy import create_engine, text

import memory_jobs
from dbpool_executor._worker.statement_cache import _MOST, bound_statement_cache
from memory_jobs import MEGABYTE
from processes import MakeExecutor
from servers import Database
from waiting import LONGEST


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("chunksize", [1, 50])
def test_cycles_of_few_objects_are_collected(
    sqlite_database: Database, make_executor: MakeExecutor, chunksize: int
) -> None:
    """Between jobs, and between the calls of one; they hold a gigabyte together."""
    executor = make_executor(sqlite_database.make_engine, 1)
    before = executor.submit(memory_jobs.peak).result(LONGEST)
    sizes = [10] * 100
    list(executor.map(memory_jobs.leave_a_cycle, sizes, chunksize=chunksize))
    grown = executor.submit(memory_jobs.peak).result(LONGEST) - before
    assert grown < 150 * MEGABYTE


def test_statements_are_kept_up_to_a_size() -> None:
    """Short ones all, of long ones the last."""
    engine = create_engine("sqlite://")
    bound_statement_cache(engine)
    kept = engine._compiled_cache
    assert kept is not None
    length = _MOST // 10
    with engine.connect() as connection:
        for number in range(30):
            connection.execute(text(f"SELECT {number}"))
        assert len(kept) == 30
        for number in range(100):
            connection.execute(text(f"SELECT {number} /* {'x' * length} */"))
            sizes = [len(compiled.string) for compiled in kept.values()]
            assert max(sizes) > length
            assert sum(sizes) <= _MOST
    assert len(sizes) > 3
