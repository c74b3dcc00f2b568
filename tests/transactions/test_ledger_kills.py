"""Workers are killed at any moment, and each key has its effect once."""

from __future__ import annotations

import time
from collections import Counter

import pytest

import ledger_jobs as keyed
from dbpool_executor import Ledger, Outcome, WorkerDiedError
from killing import KILLS, Killer
from processes import MakeExecutor
from servers import Database

PATIENCE = 60.0
"""Seconds for a test that kills no worker."""

DATABASES = ["sqlite", "postgresql-psycopg", "mariadb-pymysql"]


@pytest.mark.parametrize("database", DATABASES, indirect=True)
def test_each_key_has_its_effect_once_while_workers_are_killed(
    database: Database, make_executor: MakeExecutor
) -> None:
    """No duplicate, no loss and nothing unknown; what was rolled back runs again."""
    ledger, engine = Ledger("kills"), database.make_engine()
    for table in (keyed.effects, ledger.table):
        table.drop(engine, checkfirst=True)
        table.create(engine)
    share = -(-KILLS // (len(DATABASES) * 3))
    executor = make_executor(database.make_engine, 2, ledger=ledger)
    once = executor.options(key=str)
    views = [once, once.options(retries=5)]
    outcomes: Counter[Outcome] = Counter()
    count = 0
    with Killer(share, 0.2) as killer:
        # Where all is slow, few jobs are done between two kills.
        patience = PATIENCE + 5 * share
        deadline = time.monotonic() + patience
        while not killer.is_done:
            assert time.monotonic() < deadline, f"{len(killer.killed)} kills of {share}"
            futures = {
                number: views[number % 2].submit(keyed.number, number)
                for number in range(count, count + 100)
            }
            count += len(futures)
            for number, future in futures.items():
                error = future.exception(patience)
                outcomes[future.outcome] += 1
                if error is None:
                    assert future.result() == number
                else:
                    assert isinstance(error, WorkerDiedError)
            found = effects(database)
            told = {
                str(number): int(future.outcome is Outcome.COMMITTED)
                for number, future in futures.items()
            }
            assert {name: found[name] for name in told} == told
    results = once.options(retries=5).map(keyed.number, range(count), chunksize=50)
    assert list(results) == list(range(count))
    assert effects(database) == {str(number): 1 for number in range(count)}
    told_counts = {outcome.value: times for outcome, times in outcomes.items()}
    print(database.name, told_counts, f"{len(killer.killed)} kills")
    assert outcomes[Outcome.UNKNOWN] == 0
    executor.shutdown()
    for table in (keyed.effects, ledger.table):
        table.drop(engine)
    engine.dispose()


def effects(database: Database) -> Counter[str]:
    """Count the effects of each name, from outside."""
    return Counter(name for (name,) in database.rows("SELECT name FROM effect"))
