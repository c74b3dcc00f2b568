"""Jobs with keys: each effect once, whatever dies, and a rerun skips what is committed."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from alembic import autogenerate
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import Column, MetaData, Table, create_engine, select
from sqlalchemy.exc import DBAPIError, IntegrityError

import faults
import ledger_jobs as keyed
from dbpool_executor import (
    STORED,
    JobTimeoutError,
    KeyReusedError,
    Ledger,
    LedgerError,
    NotStorableError,
    Outcome,
    OutcomeUnknownError,
    WorkerDiedError,
    outcome_of,
)
from dbpool_executor.testing import InlineExecutor
from processes import MakeExecutor
from proxy import Proxy, between
from servers import Database
from waiting import LONGEST, Gate, wait_until

ROUNDS = int(os.environ.get("DBPOOL_TEST_ROUNDS", "1"))

three = pytest.mark.parametrize(
    "database", ["sqlite", "postgresql-psycopg", "mariadb-pymysql"], indirect=True
)
Make = Callable[..., Any]


def by_name(name: str, *_: object) -> str:
    """Give the key of most jobs here: that of their first argument."""
    return f"key of {name}"


@pytest.fixture
def ledger(database: Database) -> Iterator[Ledger]:
    """A ledger whose table is there, with the table of effects."""
    ledger = Ledger("test")
    engine = database.make_engine()
    keyed.effects.drop(engine, checkfirst=True)
    keyed.effects.create(engine)
    ledger.table.drop(engine, checkfirst=True)
    ledger.create(engine)
    engine.dispose()
    yield ledger
    ledger.table.drop(engine, checkfirst=True)
    keyed.effects.drop(engine, checkfirst=True)
    engine.dispose()


@pytest.fixture
def engine(database: Database) -> Iterator[Any]:
    """An engine of the program's own."""
    engine = database.make_engine()
    yield engine
    engine.dispose()


@pytest.fixture
def make_once(
    database: Database, ledger: Ledger, make_executor: MakeExecutor
) -> Iterator[Make]:
    """Makes a view whose jobs have keys, on an executor with a ledger."""

    def make(workers: int = 1, *, key: Any = by_name, **options: Any) -> Any:
        factory = options.pop("factory", database.make_engine)
        executor = make_executor(
            factory, workers, ledger=options.pop("ledger", ledger), **options
        )
        return executor.options(key=key)

    yield make


def effects(database: Database) -> Counter[str]:
    """Count the effects of each name, from outside."""
    return Counter(name for (name,) in database.rows("SELECT name FROM effect"))


# -- Once -------------------------------------------------------------------------------


@three
def test_second_job_with_a_key_is_not_run_and_gets_the_stored_result(
    database: Database, ledger: Ledger, engine: Any, make_once: Make
) -> None:
    """Also from another executor; the number of those is in the statistics."""
    once = make_once()
    assert once.submit(keyed.happen, "a", {"n": (1, 2)}).result(LONGEST) == {
        "n": [1, 2]
    }
    assert once.submit(keyed.happen, "a", "other").result(LONGEST) == {"n": [1, 2]}
    assert once.stats().stored == 1
    again = make_once()
    assert again.submit(keyed.happen, "a").result(LONGEST) == {"n": [1, 2]}
    assert effects(database) == {"a": 1}
    assert ledger.outcome(engine, "key of a") is Outcome.COMMITTED
    assert ledger.result(engine, "key of a") == {"n": [1, 2]}
    assert ledger.outcome(engine, "key of b") is None
    with pytest.raises(LookupError, match="key of b"):
        ledger.result(engine, "key of b")


@three
def test_failed_job_leaves_no_row_and_runs_again(
    database: Database, ledger: Ledger, engine: Any, make_once: Make
) -> None:
    """Whether it raises, dies, returns what is not JSON, or breaks a rule of its own."""
    once = make_once()
    with pytest.raises(LookupError):
        once.submit(keyed.happen_and_raise, "a").result(LONGEST)
    died = once.submit(keyed.happen_and_die, "b").exception(LONGEST)
    assert isinstance(died, WorkerDiedError)
    assert died.outcome is Outcome.ROLLED_BACK
    refused = once.submit(keyed.happen, "c", [1, {"x": b""}]).exception(LONGEST)
    assert isinstance(refused, NotStorableError)
    assert (refused.place, refused.key) == ("result[1]['x']", "key of c")
    with pytest.raises(IntegrityError):
        once.submit(keyed.happen_and_break_a_rule, "d").result(LONGEST)
    assert effects(database) == {}
    for name in "abcd":
        assert ledger.outcome(engine, f"key of {name}") is None
        once.submit(keyed.happen, name).result(LONGEST)
    assert effects(database) == {"a": 1, "b": 1, "c": 1, "d": 1}


@three
def test_job_waits_for_the_one_that_has_its_key(
    database: Database, make_once: Make, gate: Gate
) -> None:
    """In two executors at once: one runs, the other gets its result."""
    first, second = make_once(), make_once(1, retries=2)
    running = first.submit(keyed.happen_at_gate, "a", gate.address)
    gate.arrival()
    waiting = second.submit(keyed.happen_at_gate, "a", gate.address)
    gate.open()
    assert running.result(LONGEST) == waiting.result(LONGEST) == "a"
    assert effects(database) == {"a": 1}


@three
def test_many_at_the_same_moment_run_once(database: Database, make_once: Make) -> None:
    """Four executors, each with the same keys in another order."""
    names = [f"n{number}" for number in range(12)]

    def run(seed: int) -> list[str]:
        mine = names[:]
        random.Random(seed).shuffle(mine)
        once = make_once(2)
        results = once.map(keyed.happen, mine, mine, chunksize=3)
        return sorted(results)

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(run, range(4)))
    assert found == [sorted(names)] * 4
    assert effects(database) == dict.fromkeys(names, 1)


@three
def test_job_that_waits_for_a_key_has_its_timeout(
    database: Database, make_once: Make, gate: Gate
) -> None:
    """The wait for the other transaction is a part of its time."""
    first, second = make_once(), make_once()
    running = first.submit(keyed.happen_at_gate, "a", gate.address)
    gate.arrival()
    waiting = second.options(timeout=0.3, kill_after=1.0)
    with pytest.raises(JobTimeoutError) as raised:
        waiting.submit(keyed.happen, "a").result(LONGEST)
    assert raised.value.outcome is Outcome.ROLLED_BACK
    gate.open()
    running.result(LONGEST)
    assert effects(database) == {"a": 1}


def commit_of(database: Database) -> bytes:
    """Give what COMMIT is on the wire, and the name of a column is not."""
    return b"COMMIT\0" if database.is_postgresql else b"\3COMMIT"


# -- Settling ---------------------------------------------------------------------------

moments = pytest.mark.parametrize(
    ("moment", "is_stored"),
    [("commit", False), ("commit returned", True), ("after commit", True)],
)


@three
@moments
@pytest.mark.parametrize("retries", [0, 2])
def test_worker_that_dies_around_commit_is_settled(
    database: Database,
    ledger: Ledger,
    engine: Any,
    make_once: Make,
    moment: str,
    is_stored: bool,
    retries: int,
) -> None:
    """The stored result, or rolled back; with retries it is run again."""
    factory = faults.obedient(database.make_engine)
    once = make_once(factory=factory, retries=retries)
    is_event = moment == "after commit"
    job = keyed.happen_and_have_after if is_event else keyed.happen_and_have
    future = once.submit(job, "a", moment, faults.die)
    error = future.exception(LONGEST)
    if is_stored:
        assert future.result(LONGEST) == "a"
        assert effects(database) == {"a": 1}
    else:
        assert isinstance(error, WorkerDiedError)
        assert error.outcome is Outcome.ROLLED_BACK
        assert effects(database) == {}
    # Whoever comes next has the same answer, or the key is free.
    again = once.submit(keyed.happen, "b" if is_stored else "a", "again")
    assert again.result(LONGEST) == "again"


@pytest.mark.parametrize(
    "database",
    ["postgresql-psycopg", "postgresql-psycopg2", "mariadb-pymysql"],
    indirect=True,
)
@pytest.mark.parametrize(
    ("cut", "is_stored"),
    [(Proxy.cut_before, False), (Proxy.cut_after, True)],
    ids=["before", "after"],
)
@pytest.mark.parametrize("retries", [0, 2])
def test_commit_that_is_cut_is_settled(
    database: Database,
    ledger: Ledger,
    make_once: Make,
    cut: Callable[[Proxy, bytes], None],
    is_stored: bool,
    retries: int,
) -> None:
    """The driver's error is the same in both cases; the ledger is asked."""
    with between(database) as (proxy, make_engine):
        once = make_once(factory=make_engine, retries=retries)
        once.submit(keyed.happen, "before").result(LONGEST)
        cut(proxy, commit_of(database))
        future = once.submit(keyed.happen, "a", 7)
        error = future.exception(LONGEST)
        if is_stored or retries:
            assert future.result(LONGEST) == 7
        else:
            assert isinstance(error, DBAPIError)
    stored = {"before": 1, **({"a": 1} if is_stored or retries else {})}
    assert effects(database) == stored


@pytest.mark.parametrize("database", ["postgresql-psycopg"], indirect=True)
def test_commit_is_unknown_with_its_key_while_the_database_does_not_answer(
    database: Database, make_once: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the key, for whoever looks later."""
    from dbpool_executor._dispatch import dispatcher
    from dbpool_executor._wire.options import DEFAULTS

    brief = DEFAULTS.with_(timeout=0.5, kill_after=0.5)
    monkeypatch.setattr(dispatcher, "_ASKS_LEDGER", brief)
    with between(database) as (proxy, make_engine):
        once = make_once(factory=make_engine)
        once.submit(keyed.happen, "before").result(LONGEST)
        proxy.cut_before(commit_of(database))
        future = once.submit(keyed.happen, "a")
        wait_until(lambda: proxy._word is None, "the cut")
        proxy.go_down()
        error = future.exception(LONGEST)
        assert isinstance(error, OutcomeUnknownError)
        assert error.key == "key of a"
        proxy.come_back()


# -- Batches ------------------------------------------------------------------------------


@three
def test_rerun_skips_what_is_committed_with_another_chunksize(
    database: Database, make_once: Make
) -> None:
    """Results are complete and in order; keys are of items and not of chunks."""
    once = make_once(2, key=str)
    some = [*range(10, 30), *range(45, 50)]
    assert list(once.map(keyed.number, some, chunksize=4)) == some
    again = make_once(2, key=str)
    assert list(again.map(keyed.number, range(60), chunksize=7)) == list(range(60))
    assert again.stats().stored == len(some)
    last = make_once(2, key=str)
    results = last.map(keyed.number, range(60), chunksize=3, buffersize=2)
    assert list(results) == list(range(60))
    assert last.stats().stored == 60
    assert effects(database) == {str(n): 1 for n in range(60)}


@three
def test_same_key_twice_in_a_chunk_runs_once(
    database: Database, make_once: Make
) -> None:
    """Both calls get the one result."""
    once = make_once()
    results = list(once.map(keyed.happen, ["a", "b", "a"], [1, 2, 3], chunksize=3))
    assert results == [1, 2, 1]
    assert effects(database) == {"a": 1, "b": 1}


@three
def test_chunk_that_fails_leaves_all_its_keys_free(
    database: Database, ledger: Ledger, engine: Any, make_once: Make
) -> None:
    """One that another had stored stays stored."""
    once = make_once()
    once.submit(keyed.happen, "a", 1).result(LONGEST)
    with pytest.raises(NotStorableError):
        list(once.map(keyed.happen, ["a", "b", "c"], [1, 2, object], chunksize=3))
    assert ledger.outcome(engine, "key of a") is Outcome.COMMITTED
    assert ledger.outcome(engine, "key of b") is None
    assert effects(database) == {"a": 1}


@three
def test_batch_that_is_killed_and_run_again_has_each_effect_once(
    database: Database, tmp_path: Path
) -> None:
    """The parent is killed at random, again and again, and the last run ends it."""
    ledger = Ledger("batch")
    engine = database.make_engine()
    for table in (keyed.effects, ledger.table):
        table.drop(engine, checkfirst=True)
        table.create(engine)
    count, kills = 300 * ROUNDS, 3 * ROUNDS
    url = database.url.render_as_string(hide_password=False)
    command = [sys.executable, keyed.__file__, url, "0", str(count), "10"]
    chance = random.Random(4)
    for run in range(kills + 1):
        program = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        if run < kills:
            before = sum(effects(database).values())
            most = before + chance.randint(1, count // (kills + 1))
            wait_until(
                lambda most=most, program=program: (
                    sum(effects(database).values()) >= most
                    or program.poll() is not None
                ),
                "some effects",
                60,
            )
            program.kill()
        output, _ = program.communicate(timeout=100)
    assert program.returncode == 0
    total, stored = map(int, output.split())
    assert total == sum(range(count))
    assert stored > 0
    assert effects(database) == {str(n): 1 for n in range(count)}
    for table in (keyed.effects, ledger.table):
        table.drop(engine)
    engine.dispose()


# -- Ways in ----------------------------------------------------------------------------


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_asyncio_and_the_inline_executor_have_keys(
    database: Database, ledger: Ledger, make_once: Make
) -> None:
    """The same code, whoever runs it."""
    once = make_once()

    async def two() -> list[Any]:
        jobs = [once.submit(keyed.happen, "a", n) for n in (1, 2)]
        return await asyncio.gather(*map(asyncio.wrap_future, jobs))

    assert asyncio.run(two()) == [1, 1]
    with InlineExecutor(database.make_engine, ledger=ledger) as executor:
        inline = executor.options(key=by_name)
        assert inline.submit(keyed.happen, "a", 3).result(LONGEST) == 1
        assert list(inline.map(keyed.happen, ["b", "a", "b"], [4, 5, 6])) == [4, 1, 4]
        assert executor.stats().stored == 3
        with pytest.raises(NotStorableError):
            inline.submit(keyed.happen, "c", object()).result(LONGEST)
    assert effects(database) == {"a": 1, "b": 1}


@three
@pytest.mark.parametrize("results", ["pickle", None])
def test_results_are_kept_as_the_ledger_says(
    database: Database, make_once: Make, results: Any
) -> None:
    """As pickles, or not at all."""
    once = make_once(ledger=Ledger("test", results=results))
    value = {"n": (1, b"\0"), 2: None}
    assert once.submit(keyed.happen, "a", value).result(LONGEST) == value
    second = once.submit(keyed.happen, "a", value).result(LONGEST)
    assert second == (value if results else STORED)
    assert list(once.map(keyed.happen, ["a"])) == [value if results else STORED]


@three
def test_large_results_are_kept(database: Database, make_once: Make) -> None:
    """More than a TEXT of MySQL holds."""
    once = make_once()
    value = "x" * 200_000
    for _ in range(2):
        assert once.submit(keyed.happen, "a", value).result(LONGEST) == value


@three
def test_keys_are_told_apart_whatever_collations_fold(
    database: Database, ledger: Ledger, engine: Any, make_once: Make
) -> None:
    """Empty, long, of other case, with accents or spaces behind them, from other planes."""
    keys = [
        "",
        " ",
        "a",
        "A",
        "a ",
        "á",
        "a\u0301",
        "ß",
        "ss",
        "\U0001f600",
        "k" * 1000,
    ]
    once = make_once(key=lambda number: keys[number])
    results = once.map(keyed.number, range(len(keys)), chunksize=4)
    assert list(results) == list(range(len(keys)))
    assert sum(effects(database).values()) == len(keys)
    assert [ledger.result(engine, key) for key in keys] == list(range(len(keys)))


def test_two_ledgers_share_a_table_and_no_keys(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """A name and a key are not run together."""
    first, second = Ledger("a"), Ledger("ab")
    assert first.digest("bc") != second.digest("c")


# -- Refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
def test_key_of_another_function_is_refused_unless_it_was_renamed(
    database: Database, ledger: Ledger, make_once: Make
) -> None:
    """By submit and by map, in the place of the call."""
    once = make_once()
    once.submit(keyed.happen, "a", 1).result(LONGEST)
    error = once.submit(keyed.happen_slowly, "a", 0).exception(LONGEST)
    assert isinstance(error, KeyReusedError)
    assert error.outcome is Outcome.NEVER_STARTED
    assert "ledger_jobs.happen" in str(error)
    results = once.map(keyed.happen_slowly, ["b", "a"], [0, 0])
    assert next(results) == "b"
    with pytest.raises(KeyReusedError):
        next(results)
    names = {"ledger_jobs.happen": "ledger_jobs.happen_slowly"}
    renamed = make_once(ledger=Ledger("test", names=names))
    assert renamed.submit(keyed.happen_slowly, "a", 0).result(LONGEST) == 1


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    "options",
    [{"commit": False}, {"read_only": True}, {"isolation_level": "AUTOCOMMIT"}],
    ids=str,
)
def test_options_that_would_part_the_row_from_the_work_are_refused(
    make_once: Make, options: dict[str, Any]
) -> None:
    """At once, in either order."""
    once = make_once()
    with pytest.raises(ValueError, match="key="):
        once.options(**options)
    with pytest.raises(ValueError, match="key="):
        once._owner().options(**options).options(key="a")


def test_key_without_a_ledger_is_refused(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """By an error that says what to pass."""
    executor = make_executor(sqlite_database.make_engine, 1)
    with pytest.raises(ValueError, match="ledger="):
        executor.options(key="a")
    with pytest.raises(TypeError, match="ledger is a str"):
        make_executor(sqlite_database.make_engine, 1, ledger="test")


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    ("key", "error"),
    [
        (7, TypeError),
        (None, TypeError),
        ("\0", ValueError),
        ("\ud800", ValueError),
        ("k" * 5000, ValueError),
    ],
)
def test_what_is_no_key_is_refused_by_submit(
    make_once: Make, key: Any, error: type[Exception]
) -> None:
    """Nothing is lost: the job was never queued."""
    once = make_once(key=lambda *_: key)
    with pytest.raises(error, match="key"):
        once.submit(keyed.happen, "a")


@three
def test_table_that_cannot_keep_the_promise_is_refused_before_the_first_job(
    database: Database, ledger: Ledger, engine: Any, make_once: Make
) -> None:
    """Missing, of another shape, without its primary key, without transactions."""

    def refusal(words: str) -> None:
        error = make_once().submit(keyed.happen, "a").exception(LONGEST)
        assert isinstance(error, LedgerError)
        assert words in str(error)
        assert error.outcome is Outcome.NEVER_STARTED

    ledger.table.drop(engine)
    refusal("ledger.create(engine)")
    database.execute("CREATE TABLE dbpool_ledger (digest char(64) primary key)")
    refusal("committed_at")
    database.execute("DROP TABLE dbpool_ledger")
    unkeyed = Table(
        "dbpool_ledger",
        MetaData(),
        *(Column(c.name, c.type) for c in ledger.table.columns),
    )
    unkeyed.create(engine)
    refusal("primary key")
    unkeyed.drop(engine)
    if database.is_mariadb:
        ledger.create(engine)
        database.execute("ALTER TABLE dbpool_ledger ENGINE=MyISAM")
        refusal("no transactions")
        ledger.table.drop(engine)
    ledger.create(engine)
    make_once().submit(keyed.happen, "a").result(LONGEST)
    assert effects(database) == {"a": 1}


@three
@pytest.mark.parametrize(
    ("job", "words"),
    [
        (keyed.happen_and_commit, "commits by itself"),
        (keyed.happen_and_commit_boldly, "ended its transaction"),
        (keyed.happen_and_roll_back, "ended its transaction"),
        (keyed.happen_and_roll_back_unseen, "ended its transaction"),
    ],
)
def test_job_that_ends_its_transaction_is_rolled_back(
    database: Database,
    ledger: Ledger,
    engine: Any,
    make_once: Make,
    job: Callable[..., Any],
    words: str,
) -> None:
    """Else its claim would be committed without its result, or its work without a claim."""
    once = make_once()
    future = once.submit(job, "a")
    error = future.exception(LONGEST)
    assert isinstance(error, LedgerError)
    assert words in str(error)
    assert error.key == "key of a"
    if job is not keyed.happen_and_roll_back_unseen:
        assert future.outcome is outcome_of(error) is Outcome.ROLLED_BACK
        assert "is rolled back" in str(error)
    assert effects(database) == {}
    assert ledger.outcome(engine, "key of a") is None
    assert once.submit(keyed.happen, "a", 1).result(LONGEST) == 1


@pytest.mark.parametrize(
    "database", ["postgresql-psycopg", "mariadb-pymysql"], indirect=True
)
def test_job_that_commits_apart_is_refused_unless_it_has_only_read(
    database: Database, make_once: Make
) -> None:
    """Over another connection of the worker's engine; SQLite has but one writer."""
    once = make_once()
    error = once.submit(keyed.happen_and_commit_apart, "a").exception(LONGEST)
    assert isinstance(error, LedgerError)
    assert effects(database) == {}
    assert once.submit(keyed.happen_and_read_apart, "a").result(LONGEST) == []
    assert effects(database) == {"a": 1}


@three
def test_job_that_writes_to_another_database_is_rolled_back_on_both(
    database: Database, engine: Any, make_once: Make, tmp_path: Path
) -> None:
    """To read there is allowed."""
    other = f"sqlite:///{tmp_path / 'other.db'}"
    other_engine = create_engine(other)
    keyed.effects.create(other_engine)
    once = make_once()
    future = once.submit(keyed.happen_elsewhere, "a", other)
    error = future.exception(LONGEST)
    assert isinstance(error, LedgerError)
    assert "another database" in str(error)
    assert future.outcome is outcome_of(error) is Outcome.ROLLED_BACK
    with other_engine.connect() as connection:
        assert connection.execute(select(keyed.effects)).all() == []
    other_engine.dispose()
    assert effects(database) == {}
    assert once.submit(keyed.read_elsewhere, "a", other).result(LONGEST) == []
    assert effects(database) == {"a": 1}


@three
@pytest.mark.parametrize("end", ["die", "raise"])
def test_claim_that_may_have_been_committed_unseen_settles_nothing(
    database: Database, make_once: Make, end: str
) -> None:
    """The claim is in the table, but not by the COMMIT at the end of the job."""
    once = make_once()
    future = once.submit(keyed.happen_and_commit_unseen, "a", end)
    error = future.exception(LONGEST)
    assert future.outcome is outcome_of(error) is Outcome.UNKNOWN
    if end == "die":
        assert isinstance(error, OutcomeUnknownError)
        assert error.key == "key of a"


@three
def test_outcomes_of_jobs_with_keys(
    database: Database, ledger: Ledger, engine: Any, make_once: Make
) -> None:
    """Whether they were run, skipped, settled or refused; notes name the job."""
    once = make_once(factory=faults.obedient(database.make_engine))
    for _ in range(2):
        future = once.submit(keyed.happen, "a", 1)
        assert future.result(LONGEST) == 1
        assert future.outcome is Outcome.COMMITTED
    future = once.submit(keyed.happen_and_have, "b", "commit returned", faults.die)
    assert future.result(LONGEST) == "b"
    assert future.outcome is Outcome.COMMITTED
    refused = [
        (once.submit(keyed.happen_and_have, "c", "commit", faults.die), "rolled back"),
        (once.submit(keyed.happen_and_die, "a"), "never started"),
    ]
    for future, outcome in refused:
        error = future.exception(LONGEST)
        assert error is not None
        assert future.outcome is outcome_of(error) is Outcome(outcome)
        assert f": {outcome}" in error.__notes__[-1]
        assert "ledger_jobs.happen_and_" in error.__notes__[-1]
        assert error.key in ("key of a", "key of c")
    ledger.table.drop(engine)
    future = make_once().submit(keyed.happen, "a")
    error = future.exception(LONGEST)
    assert isinstance(error, LedgerError)
    assert future.outcome is outcome_of(error) is Outcome.NEVER_STARTED
    ledger.create(engine)


# -- The table ----------------------------------------------------------------------------


@three
def test_old_rows_are_pruned_and_no_others(
    database: Database, ledger: Ledger, engine: Any, make_once: Make
) -> None:
    """Those of this ledger, by their age."""
    once = make_once()
    list(once.map(keyed.happen, ["a", "b"]))
    make_once(ledger=Ledger("another")).submit(keyed.happen, "a").result(LONGEST)
    assert ledger.prune(engine, timedelta(hours=1)) == 0
    assert ledger.prune(engine, timedelta(seconds=-1)) == 2
    assert ledger.outcome(engine, "key of a") is None
    assert Ledger("another").outcome(engine, "key of a") is Outcome.COMMITTED


@pytest.mark.parametrize("database", ["sqlite", "postgresql-psycopg"], indirect=True)
def test_alembic_makes_the_table_from_the_metadata(
    database: Database, engine: Any, make_once: Make, ledger: Ledger
) -> None:
    """Once: after the upgrade there is nothing left to do. Jobs find it as it has to be."""
    metadata = [keyed.effects.metadata, ledger.metadata]

    def only_ours(_item: object, name: str, kind: str, *_: object) -> bool:
        return kind != "table" or name in ("effect", "dbpool_ledger")

    def difference() -> Any:
        options = {"target_metadata": metadata, "include_object": only_ours}
        context = MigrationContext.configure(connection, opts=options)
        script = autogenerate.produce_migrations(context, metadata)
        for step in script.upgrade_ops.ops:
            for each in getattr(step, "ops", [step]):
                Operations(context).invoke(each)
        return script.upgrade_ops.as_diffs()

    ledger.table.drop(engine)
    with engine.begin() as connection:
        assert [name for name, *_ in difference()] == ["add_table", "add_index"]
        assert difference() == []
    assert make_once().submit(keyed.happen, "a", 1).result(LONGEST) == 1
    assert effects(database) == {"a": 1}


def test_ledger_is_a_part_of_the_metadata_that_it_is_given() -> None:
    """Two ledgers of one table share it; so Alembic sees it once."""
    metadata = MetaData()
    first, second = Ledger("a", metadata=metadata), Ledger("b", metadata=metadata)
    assert first.table is second.table is metadata.tables["dbpool_ledger"]


def test_results_that_are_not_json_are_refused_by_their_place() -> None:
    """What JSON would give back as something else is refused too."""
    dumps = Ledger("test").encoding.dumps
    loop: list[Any] = []
    loop.append(loop)
    for value, place in [
        ({"a": [1, {2}]}, "result['a'][1]"),
        ({1: 2}, "a key of result"),
        ([float("nan")], "result[0]"),
        (Outcome.COMMITTED, "result"),
        (loop, "result[0]"),
    ]:
        with pytest.raises(NotStorableError) as raised:
            dumps(value)
        assert raised.value.place == place
    assert dumps([1, "\ud800\0", None, True, 1e300, (2,)]) is not None


def test_ledger_refuses_what_it_cannot_be() -> None:
    """In its constructor."""
    with pytest.raises(ValueError, match="results"):
        Ledger("a", results="yaml")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="1 to 255"):
        Ledger("")
    with pytest.raises(TypeError):
        Ledger(7)  # type: ignore[arg-type]
