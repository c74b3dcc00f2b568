"""What no check before a fork can see: other threads that work while it happens."""

from __future__ import annotations

import multiprocessing
import sys
import threading

import pytest
from sqlalchemy import create_engine

import defence
import inherited
import jobs
import servers
import warm
from processes import MakeExecutor
from servers import Database
from waiting import LONGEST
from warm import Interpreter

if defence.is_taken_away():
    defence.take_away()

one_server = pytest.mark.parametrize("database", ["postgresql-psycopg"], indirect=True)
only_servers = pytest.mark.parametrize("database", servers.SERVERS, indirect=True)


def address(database: Database) -> str:
    """Give the URL of a database as a program takes it."""
    return database.url.render_as_string(hide_password=False)


# -- A transaction of another thread --------------------------------------------

DEEDS = [
    "nothing",
    "collects",
    "uses_engine",
    "uses_session",
    "disposes",
    "disposes_without_closing",
    "removes",
    "closes_sessions",
    "rebinds",
]


@only_servers
@pytest.mark.parametrize("deed", DEEDS)
def test_transaction_of_another_thread_survives_what_a_copy_does(
    database: Database, deed: str, interpreter: Interpreter
) -> None:
    """All its rows are there, and the copy is never given its connection."""
    report = interpreter.run(
        "race", url=address(database), deed=deed, rounds=warm.rounds(6)
    )
    assert set(report["ends"]) <= {"fine", "refused"}
    assert database.names() == set(report["committed"])


@only_servers
def test_transaction_of_another_thread_survives_what_jobs_do(
    database: Database, interpreter: Interpreter
) -> None:
    """So it does when an executor replaces its worker in the middle of it."""
    report = interpreter.run("replaced", url=address(database), rounds=warm.rounds(12))
    assert set(report["ends"]) <= {"fine", "refused"}
    assert database.names() == set(report["committed"])


@only_servers
@pytest.mark.parametrize("anew", [False, True], ids=["known", "new"])
def test_transaction_opened_after_the_last_look_survives(
    database: Database, anew: bool, interpreter: Interpreter
) -> None:
    """It may begin at the last moment before the fork, on a connection made then."""
    report = interpreter.run(
        "late", url=address(database), anew=anew, rounds=warm.rounds(4)
    )
    assert set(report["ends"]) == {"fine"}
    assert database.names() == set(report["committed"])


@only_servers
def test_transaction_survives_a_fork_that_may_open_no_more_files(
    database: Database, interpreter: Interpreter
) -> None:
    """There is a way to cover a connection without a free descriptor."""
    report = interpreter.run("exhausted", url=address(database))
    assert report["ends"] == ["fine"]
    assert database.names() == set(report["committed"])


@pytest.mark.parametrize("wire", ["plain", "tls"])
def test_transaction_of_a_running_event_loop_survives_a_copy_with_a_loop_of_its_own(
    wire: str, request: pytest.FixtureRequest, interpreter: Interpreter
) -> None:
    """The copy cuts what it inherited, and the parent's loop still hears its socket."""
    pytest.importorskip("asyncpg")
    if wire == "tls":
        url, _ = request.getfixturevalue("postgresql_tls")
    else:
        url = request.getfixturevalue("postgresql_url")
    database = servers.on_server("postgresql-psycopg", url)
    database.empty_tables()
    asynchronous = url.set(drivername="postgresql+asyncpg")
    asynchronous = asynchronous.difference_update_query(["application_name"])
    if wire == "tls":
        asynchronous = asynchronous.update_query_dict({"ssl": "require"})
    report = interpreter.run(
        "event_loop",
        url=asynchronous.render_as_string(hide_password=False),
        rounds=warm.rounds(3),
    )
    assert set(report["ends"]) == {"fine"}
    assert database.names() == set(report["committed"])


@only_servers
@pytest.mark.parametrize("detached", [False, True], ids=["never", "not any more"])
def test_transaction_on_a_connection_that_is_no_pools_survives_what_jobs_do(
    database: Database, detached: bool, make_executor: MakeExecutor
) -> None:
    """A driver's own connection cannot be refused, but it does not cross either."""
    fork = multiprocessing.get_context("fork")
    executor = make_executor(database.make_engine, 1, fork)
    inherited.connect_raw(address(database), detached=detached)
    executor.submit(inherited.end_raw).result(LONGEST)
    executor.shutdown()
    inherited.raw.commit()
    inherited.raw.close()
    assert database.names() == {"raw"}


# -- The looks themselves -------------------------------------------------------


@pytest.mark.xfail(
    sys.version_info >= (3, 13),
    reason="there the look lets other threads run, and may end an object of theirs",
    strict=False,
)
def test_look_at_all_objects_ends_none_of_another_thread(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """An object whose last reference goes meanwhile ends in the thread that had it.

    mysqlclient fails if the end of a result meets the next query of its connection.
    """
    ended_in: set[int] = set()
    stopped = threading.Event()

    class Result:
        def __del__(self) -> None:
            ended_in.add(threading.get_ident())

    def work() -> None:
        while not stopped.is_set():
            _ = [Result() for _ in range(100)]

    thread = threading.Thread(target=work)
    thread.start()
    engine = create_engine(sqlite_database.url)
    try:
        for _ in range(warm.rounds(5)):
            engine.connect().close()  # so that there is something to look for
            executor = make_executor(
                sqlite_database.make_engine, 1, multiprocessing.get_context("fork")
            )
            executor.submit(jobs.add, 1, 1).result(LONGEST)
            executor.shutdown()
    finally:
        stopped.set()
        thread.join(LONGEST)
    assert ended_in == {thread.ident}


# -- Locks ----------------------------------------------------------------------


@only_servers
@pytest.mark.parametrize("kind", ["pool", "logging", "import"])
def test_workers_start_whatever_lock_another_thread_holds(
    database: Database, kind: str, interpreter: Interpreter
) -> None:
    """A job that takes the same kind of lock is answered."""
    rounds = warm.rounds(17)
    report = interpreter.run("locks", url=address(database), kind=kind, rounds=rounds)
    assert report["answers"] == list(range(rounds))
    assert [note for note in report["notes"] if "killed" in note] == []


@pytest.mark.xfail(
    sys.version_info >= (3, 13),
    reason="there a forked worker may be held up by that lock, and is killed",
    strict=False,
)
@one_server
def test_workers_leave_though_another_thread_was_printing(
    database: Database, interpreter: Interpreter
) -> None:
    """A lock of standard output that nobody releases there does not hold them up."""
    report = interpreter.run("locks", url=address(database), kind="stream", rounds=2)
    assert report["answers"] == [0, 1]
    assert [note for note in report["notes"] if "killed" in note] == []
