"""A parent that goes on with what it has open, whatever its copies and workers do.

The tables are those of the measurements that the package was made from: what a forked
copy may do, what people do against it, and SQLite.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from sqlalchemy import Engine, StaticPool, create_engine, insert, text
from sqlalchemy.orm import Session

import defence
import inherited
import jobs
import servers
import warm
from dbpool_executor import (
    OpenConnectionsError,
    WorkerDiedError,
    WorkerStartError,
)
from models import Item
from processes import MakeExecutor
from servers import Database
from waiting import LONGEST, Gate
from warm import Interpreter

if defence.is_taken_away():
    defence.take_away()

only_servers = pytest.mark.parametrize("database", servers.SERVERS, indirect=True)
one_server = pytest.mark.parametrize("database", ["postgresql-psycopg"], indirect=True)


def address(database: Database) -> str:
    """Give the URL of a database as a program takes it."""
    return database.url.render_as_string(hide_password=False)


@contextlib.contextmanager
def globals_of(database: Database, **options: Any) -> Iterator[None]:
    """Bind the globals of the classic program in this process."""
    inherited.init(address(database), **options)
    try:
        yield
    finally:
        inherited.end()


# -- The classic program --------------------------------------------------------


def test_copy_that_binds_the_globals_anew_leaves_the_parent_what_it_has(
    wired: Database, interpreter: Interpreter
) -> None:
    """The parent's transaction and its half-read result survive fork after fork."""
    report = interpreter.run("classic", url=address(wired), rounds=warm.rounds(16))
    assert set(report["ends"]) == {"fine"}
    assert wired.names() == set(report["committed"])


def test_worker_that_binds_the_globals_anew_leaves_the_parent_what_it_has(
    wired: Database, start_method: str, make_executor: MakeExecutor
) -> None:
    """So they survive each worker that replaces one that a job has killed."""
    context = multiprocessing.get_context(start_method)
    executor = make_executor(wired.make_engine, 1, context)
    executor.submit(jobs.add, 1, 1).result(LONGEST)  # started while nothing is open
    committed: set[str] = set()
    usual = {"fork": 6, "forkserver": 2, "spawn": 1}[start_method]
    with globals_of(wired):
        for number in range(warm.rounds(usual)):
            work = inherited.Work(f"{number}")
            with pytest.raises(WorkerDiedError):
                executor.submit(inherited.die).result(LONGEST)
            url, name = address(wired), f"{number} by the globals"
            executor.submit(inherited.rebind_and_write, url, name).result(LONGEST)
            executor.submit(jobs.insert_item, f"{number} by the job").result(LONGEST)
            committed |= {name, f"{number} by the job", *work.go_on()}
    assert wired.names() == committed


def test_sqlite_file_is_shared_with_workers(
    sqlite_database: Database, start_method: str, make_executor: MakeExecutor
) -> None:
    """A file that the parent works with takes the rows of both.

    Under fork the parent has it closed while workers start.
    """
    context = multiprocessing.get_context(start_method)
    committed: set[str] = set()
    with globals_of(sqlite_database):
        for number in range(warm.rounds(8 if start_method == "fork" else 2)):
            by_job = f"{number} by the job"
            executor = make_executor(sqlite_database.make_engine, 1, context)
            if start_method == "fork":
                inherited.session.close()  # its connection is idle then
                executor.submit(jobs.insert_item, by_job).result(LONGEST)
            work = inherited.Reading(f"{number}")
            url, name = address(sqlite_database), f"{number} by the globals"
            executor.submit(inherited.rebind_and_write, url, name).result(LONGEST)
            if start_method != "fork":
                executor.submit(jobs.insert_item, by_job).result(LONGEST)
            committed |= {name, by_job, *work.go_on()}
            executor.shutdown()
    assert sqlite_database.names() == committed
    assert sqlite_database.rows("PRAGMA integrity_check") == [("ok",)]


# -- What a copy does, by driver ------------------------------------------------

DEEDS = [
    ("nothing", "_exit"),
    ("nothing", "exit"),
    ("uses_engine", "_exit"),
    ("disposes_without_closing", "_exit"),
    ("disposes", "_exit"),
    ("removes", "_exit"),
    ("closes_descriptors", "_exit"),
    ("covers_descriptors", "exit"),
]


@only_servers
@pytest.mark.parametrize(("deed", "leave"), DEEDS)
def test_idle_connection_survives_what_a_copy_does(
    database: Database, deed: str, leave: str, interpreter: Interpreter
) -> None:
    """The parent's session works on, and what it commits is there."""
    report = interpreter.run(
        "idle", url=address(database), deed=deed, leave=leave, rounds=warm.rounds(3)
    )
    assert set(report["ends"]) <= {"fine", "refused"}
    assert database.names() == set(report["committed"])


def test_copy_that_uses_the_inherited_engine_is_not_given_the_parents_connection(
    wired: Database, interpreter: Interpreter
) -> None:
    """Over TLS and over a plain socket it gets an error, or a connection of its own."""
    report = interpreter.run(
        "idle", url=address(wired), deed="uses_engine", leave="exit", rounds=3
    )
    assert set(report["ends"]) <= {"fine", "refused"}
    assert wired.names() == set(report["committed"])


# -- What people do against it --------------------------------------------------

MEASURES = [
    "dispose",
    "dispose_without_closing",
    "null_pool",
    "listener",
    "close_sessions",
    "freeze",
    "cover",
    "hold",
]


@only_servers
@pytest.mark.parametrize("against", MEASURES)
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "in use"])
def test_parent_is_well_whatever_else_was_done_against_it(
    database: Database, against: str, busy: bool, interpreter: Interpreter
) -> None:
    """No measure of the program's own, right or wrong, costs the parent a row."""
    report = interpreter.run(
        "measure", url=address(database), against=against, busy=busy, rounds=2
    )
    assert set(report["ends"]) <= {"fine", "refused"}
    assert database.names() == set(report["committed"])


# -- SQLite and fork ------------------------------------------------------------


def test_idle_connection_to_a_sqlite_file_costs_no_worker_a_commit(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """All hundred are there, though the parent disposes its engine meanwhile."""
    engine = create_engine(sqlite_database.url)
    with Session(engine) as session:
        session.add(Item(name="before"))
        session.commit()
    executor = make_executor(
        sqlite_database.make_engine, 1, multiprocessing.get_context("fork")
    )
    names = [f"item {number}" for number in range(100)]
    for name in names[:50]:
        executor.submit(jobs.insert_item, name).result(LONGEST)
    with Session(engine) as session:
        assert session.scalar(text("SELECT count(*) FROM item")) == 51
    engine.dispose()
    for name in names[50:]:
        executor.submit(jobs.insert_item, name).result(LONGEST)
    executor.shutdown()
    assert sqlite_database.names() == {"before", *names}
    assert sqlite_database.rows("PRAGMA integrity_check") == [("ok",)]


@pytest.mark.parametrize(
    "job", [inherited.drop_and_collect, inherited.dispose_and_collect, inherited.write]
)
def test_open_transaction_on_a_sqlite_file_is_refused_and_stays_whole(
    sqlite_database: Database,
    make_executor: MakeExecutor,
    job: object,
) -> None:
    """No worker is forked that could close the file, or wait for its lock."""
    # With a rollback journal, and a cache so small that the file is written to before
    # the commit.
    sqlite_database.execute("PRAGMA journal_mode=DELETE")
    items = [{"name": f"{number:0100}", "amount": 0} for number in range(2000)]
    with sqlite_database.outside() as connection:
        connection.execute(insert(Item), items[::2])
    fork = multiprocessing.get_context("fork")
    executor = make_executor(sqlite_database.make_engine, 1, fork)
    refused = False
    with globals_of(sqlite_database):
        inherited.session.execute(text("PRAGMA cache_size = 5"))
        inherited.session.execute(insert(Item), items[1::2])
        try:
            executor.submit(job).result(LONGEST)
        except OpenConnectionsError:
            refused = True
        inherited.session.commit()
    assert sqlite_database.rows("PRAGMA integrity_check") == [("ok",)]
    assert sqlite_database.count() == 2000
    assert refused


def test_sqlite_file_with_nothing_open_is_written_by_forked_workers(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """An engine that was disposed is no reason to refuse."""
    with globals_of(sqlite_database):
        inherited.session.add(Item(name="before"))
        inherited.session.commit()
    executor = make_executor(
        sqlite_database.make_engine, 2, multiprocessing.get_context("fork")
    )
    executor.submit(jobs.insert_item, "after").result(LONGEST)
    assert sqlite_database.names() == {"before", "after"}


@pytest.mark.parametrize("start_method", ["forkserver", "spawn"], indirect=True)
def test_open_transaction_on_a_sqlite_file_is_nothing_to_workers_that_inherit_nothing(
    sqlite_database: Database, start_method: str, make_executor: MakeExecutor
) -> None:
    """Their jobs wait for its lock, as they would for any other program's."""
    executor = make_executor(
        sqlite_database.make_engine, 1, multiprocessing.get_context(start_method)
    )
    with globals_of(sqlite_database):
        inherited.session.add(Item(name="parent"))
        inherited.session.flush()
        future = executor.submit(jobs.insert_item, "worker")
        assert executor.submit(jobs.count_items).running() is False
        inherited.session.commit()
        future.result(LONGEST)
    assert sqlite_database.names() == {"parent", "worker"}
    assert sqlite_database.rows("PRAGMA integrity_check") == [("ok",)]


# -- Inherited through a forkserver ---------------------------------------------

PRELOADS = {
    "without the package": ["preloaded"],
    "before the package": ["preloaded", "dbpool_executor"],
    "after the package": ["dbpool_executor", "preloaded"],
    "before what ends our preloads": [
        "preloaded",
        "dbpool_executor._launch.last_preload",
    ],
}


@only_servers
@pytest.mark.parametrize("modules", PRELOADS.values(), ids=PRELOADS)
def test_preloaded_module_that_connects_does_no_harm_and_is_told_of_once(
    database: Database, modules: list[str], interpreter: Interpreter
) -> None:
    """The forkserver's transaction outlives workers that use it, and die of it."""
    report = interpreter.run(
        "preload",
        url=address(database),
        modules=modules,
        factory="make_engine",
        workers=2,
    )
    assert set(report["ends"]) <= {"fine", "refused"}
    assert report["is_open"]
    told = [note for note in report["notes"] if "preloaded" in note]
    assert len(told) == 1
    assert repr(create_engine(database.url)) in told[0]


@one_server
@pytest.mark.parametrize("modules", PRELOADS.values(), ids=PRELOADS)
def test_factory_that_returns_a_preloaded_engine_is_refused_by_its_name(
    database: Database, modules: list[str], interpreter: Interpreter
) -> None:
    """No job runs on the forkserver's connection."""
    report = interpreter.run(
        "preload",
        url=address(database),
        modules=modules,
        factory="preloaded_engine",
        workers=1,
    )
    assert "preloaded.engine" in report["error"]
    assert report["ends"] == []


# -- Engine factories that surprise ---------------------------------------------


@one_server
def test_factory_that_returns_a_connected_engine_is_refused_by_its_name(
    database: Database, make_executor: MakeExecutor
) -> None:
    """A worker forked beside a StaticPool does not take its connection for its own."""
    fork = multiprocessing.get_context("fork")
    with globals_of(database, poolclass=StaticPool):
        inherited.session.execute(text("SELECT 1"))
        inherited.session.rollback()
        executor = make_executor(inherited.global_engine, 1, fork)
        with pytest.raises(
            WorkerStartError, match=r"returned inherited\.engine"
        ) as caught:
            executor.submit(jobs.insert_item, "worker").result(LONGEST)
        assert isinstance(caught.value.__cause__, RuntimeError)
        inherited.session.add(Item(name="parent"))
        inherited.session.commit()
    assert database.names() == {"parent"}


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (partial(create_engine, "sqlite://"), "a database in memory"),
        (partial(create_engine, "sqlite:///:memory:"), "a database in memory"),
        (inherited.global_engine, "inherited.engine, the same engine at each call"),
        (inherited.static_engine, "with a StaticPool"),
    ],
    ids=["memory", "memory by name", "global", "static"],
)
def test_what_a_worker_will_see_of_an_unusual_engine_is_told_once(
    sqlite_database: Database,
    factory: Callable[[], Engine],
    words: str,
    make_executor: MakeExecutor,
    gate: Gate,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Two workers have the same to say, and the log has it once."""
    fork = multiprocessing.get_context("fork")
    with globals_of(sqlite_database):
        executor = make_executor(factory, 2, fork)
        for _ in range(2):
            executor.submit(jobs.wait_at_gate, gate.address)
        assert gate.arrival() != gate.arrival()
        gate.open()
        executor.shutdown()
    told = [r for r in caplog.records if words in r.getMessage()]
    assert [(r.name, r.levelname) for r in told] == [("dbpool_executor", "WARNING")]


# -- Registered once ------------------------------------------------------------


@only_servers
def test_reload_registers_nothing_twice_and_defends_as_before(
    database: Database, interpreter: Interpreter
) -> None:
    """Neither the module nor the package adds a hook when it is reloaded."""
    report = interpreter.run("reloaded", url=address(database))
    assert report["registered"] == 0
    assert database.names() == set(report["committed"])


@only_servers
def test_engine_that_was_dropped_is_collected(
    database: Database, interpreter: Interpreter
) -> None:
    """Neither it nor its pool nor its connection lives on, whatever was forked."""
    report = interpreter.run("forgotten", url=address(database))
    assert report["left"] == []
    assert report["ends"] == ["fine", "fine"]
