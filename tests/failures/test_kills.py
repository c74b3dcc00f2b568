"""Workers are killed at any moment, and no future ever disagrees with the database."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from concurrent.futures import Future
from functools import partial
from multiprocessing.context import BaseContext

import pytest

import failures
from dbpool_executor import (
    Outcome,
    OutcomeUnknownError,
    ResultLostError,
    WorkerDiedError,
)
from killing import KILLS, Killer
from processes import MakeExecutor
from servers import Database
from waiting import LONGEST

LARGE = int(os.environ.get("DBPOOL_TEST_LARGE", "20000000"))
"""Bytes of a result in whose middle workers are killed."""

PATIENCE = 60.0
"""Seconds for a future of a test that kills many workers."""


@pytest.mark.parametrize("kills", [0, 20], ids=["unharmed", "killed"])
def test_no_job_runs_twice_and_none_is_lost(
    sqlite_database: Database, make_executor: MakeExecutor, kills: int
) -> None:
    """Short jobs are sent ahead and taken back from long ones, each with its own key."""
    failures.create_accounts(sqlite_database, 1, 0)
    chance = random.Random(4)
    # Mostly so short that they are sent ahead, and behind them one that is long.
    times = [
        chance.uniform(0.005, 0.012) if chance.random() < 0.01 else 0.0
        for _ in range(6000)
    ]
    factory = partial(failures.careless_engine, str(sqlite_database.url))
    with Killer(kills, 0.1) as killer:
        executor = make_executor(factory, 3)
        futures = {
            number: executor.submit(failures.note_number, number, seconds)
            for number, seconds in enumerate(times)
        }
        errors = {n: future.exception(PATIENCE) for n, future in futures.items()}
    failed = {n: error for n, error in errors.items() if error is not None}
    assert {type(error) for error in failed.values()} <= {
        WorkerDiedError,
        ResultLostError,
        OutcomeUnknownError,
    }
    assert len(failed) <= len(killer.killed) == kills
    stored = {row.id for row in sqlite_database.rows("SELECT id FROM transfer_log")}
    assert stored >= set(futures) - set(failed)
    assert all(futures[n].result() == n for n in set(futures) - set(failed))


# -- Transfers between accounts ------------------------------------------------------

ACCOUNTS, BALANCE = 8, 1000
totals: Counter[str] = Counter()  # over all that follows
KILLED_AT = ["sqlite", "postgresql-psycopg", "mariadb-pymysql"]


@pytest.mark.parametrize("database", KILLED_AT, indirect=True)
def test_transfers_are_told_exactly_while_workers_are_killed(
    database: Database, context: BaseContext, make_executor: MakeExecutor
) -> None:
    """No future disagrees with the database, no job runs twice, no money is made."""
    failures.create_accounts(database, ACCOUNTS, BALANCE)
    chance = random.Random(4)
    executor = make_executor(database.make_engine, 2, context)
    futures: dict[int, Future[int]] = {}
    share = -(-KILLS // (len(KILLED_AT) * 3))
    with Killer(share, 0.2) as killer:
        deadline = time.monotonic() + PATIENCE + 5 * share
        while not killer.is_done:
            assert time.monotonic() < deadline, f"{len(killer.killed)} kills of {share}"
            waiting = []
            for number in range(len(futures), len(futures) + 100):
                source, target = chance.sample(range(1, ACCOUNTS + 1), 2)
                job = failures.transfer
                futures[number] = executor.submit(job, number, source, target, 1)
                waiting.append(futures[number])
            for future in waiting:
                future.exception(PATIENCE)
    outcomes = {n: outcome_of(future) for n, future in futures.items()}
    stored = {row.id for row in database.rows("SELECT id FROM transfer_log")}
    for number, outcome in outcomes.items():
        if outcome is Outcome.COMMITTED:
            assert number in stored
        elif outcome is not Outcome.UNKNOWN:
            assert number not in stored
    counts = Counter(outcome.value for outcome in outcomes.values())
    failed = sum(future.exception() is not None for future in futures.values())
    counts.update(jobs=len(futures), kills=len(killer.killed), failed=failed)
    print(database.name, context.get_start_method(), dict(counts))
    assert failed <= len(killer.killed)
    totals.update(counts)
    # Those that were killed in COMMIT: a quarter of the time of a job, or more where
    # the disk is slow.
    assert totals["unknown"] <= max(totals["kills"] / 2, 12)
    # Twice would have broken the primary key, and failed with another error than these.
    total = database.rows("SELECT sum(balance) AS total FROM account")[0].total
    assert total == ACCOUNTS * BALANCE
    moved = database.rows("SELECT sum(amount) AS moved FROM transfer_log")[0].moved
    assert moved == len(stored)


def outcome_of(future: Future[int]) -> Outcome:
    """Give what a future says of its transaction, and its error with it."""
    error = future.exception(LONGEST)
    outcome = future.outcome
    assert outcome is not None
    if error is not None:
        assert isinstance(
            error, (WorkerDiedError, ResultLostError, OutcomeUnknownError)
        )
        assert error.outcome is outcome
    return outcome
