"""A job is a transaction, as somebody outside sees it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from multiprocessing.context import BaseContext

import pytest
from sqlalchemy.exc import IntegrityError

import faults
import jobs
import servers
from dbpool_executor import (
    ArgumentsLostError,
    NotPlainError,
    Outcome,
    OutsideJobError,
    TransactionAbortedError,
    current_engine,
    session,
)
from processes import MakeExecutor
from servers import Database
from waiting import LONGEST, Gate, wait_until

only_postgresql = pytest.mark.parametrize(
    "database", servers.POSTGRESQLS, indirect=True
)


@pytest.mark.smoke
def test_jobs_are_committed_on_every_database_by_every_start_method(
    database: Database, context: BaseContext, make_executor: MakeExecutor
) -> None:
    """What twenty jobs of two workers write is there, and they give its keys."""
    names = [f"item {i}" for i in range(20)]
    with make_executor(database.make_engine, 2, context) as executor:
        futures = [executor.submit(jobs.insert_item, name) for name in names]
        keys = [future.result(LONGEST) for future in futures]
    rows = database.rows("SELECT id, name FROM item")
    assert sorted(rows) == sorted(zip(keys, names, strict=True))


def test_result_comes_after_the_commit(
    database: Database, make_executor: MakeExecutor, gate: Gate
) -> None:
    """A future is not done while COMMIT is held up, and then the row is there."""
    executor = make_executor(
        faults.obedient(database.make_engine), 1, **faults.OBEDIENT
    )
    hold = partial(jobs.wait_at_gate, gate.address)
    seen: list[int] = []
    future = executor.submit(faults.insert_and_have, "held up", "commit", hold)
    future.add_done_callback(lambda _future: seen.append(database.count()))
    gate.arrival()
    assert (future.done(), database.count()) == (False, 0)
    gate.open()
    future.result(LONGEST)
    assert database.count() == 1
    assert wait_until(lambda: seen, "the callback of the future") == [1]


def test_unflushed_writes_are_committed(
    database: Database, make_executor: MakeExecutor
) -> None:
    """A job may leave the flush to the executor."""
    executor = make_executor(database.make_engine, 1)
    executor.submit(jobs.insert_and_leave_unflushed, "late").result(LONGEST)
    assert database.names() == {"late"}


def test_raising_job_leaves_nothing(
    database: Database, make_executor: MakeExecutor
) -> None:
    """What a job wrote before it raised is rolled back, also what it had flushed."""
    executor = make_executor(database.make_engine, 1)
    future = executor.submit(jobs.insert_and_raise, "a", LookupError("no"))
    with pytest.raises(LookupError, match="no"):
        future.result(LONGEST)
    assert database.count() == 0


@pytest.mark.parametrize(
    ("job", "error", "place"),
    [
        (faults.give_item, NotPlainError, r"result\[0\]\['item'\] is a models\.Item"),
        (faults.give_lock, TypeError, "cannot pickle"),
        (faults.give_fails_to_pickle, ValueError, "not pickled"),
    ],
)
def test_result_that_cannot_travel_rolls_the_job_back(
    database: Database,
    make_executor: MakeExecutor,
    job: Callable[[str], object],
    error: type[Exception],
    place: str,
) -> None:
    """A job whose result stays behind leaves no row, and says why."""
    executor = make_executor(database.make_engine, 1)
    with pytest.raises(error, match=place) as raised:
        executor.submit(job, "a").result(LONGEST)
    assert database.count() == 0
    if isinstance(raised.value, NotPlainError):
        assert raised.value.outcome is Outcome.ROLLED_BACK


def test_flush_that_the_database_refuses_rolls_the_job_back(
    database: Database, make_executor: MakeExecutor
) -> None:
    """The flush before the commit fails the job with SQLAlchemy's own exception."""
    database.execute("INSERT INTO item (id, name, amount) VALUES (1, 'taken', 7)")
    executor = make_executor(database.make_engine, 1)
    with pytest.raises(IntegrityError):
        executor.submit(jobs.insert_and_leave_unflushed, "taken").result(LONGEST)
    assert database.rows("SELECT id, name, amount FROM item") == [(1, "taken", 7)]


@only_postgresql
def test_commit_that_the_database_refuses_rolls_the_job_back(
    database: Database, make_executor: MakeExecutor
) -> None:
    """A deferred constraint fails COMMIT itself, with SQLAlchemy's own exception."""
    executor = make_executor(database.make_engine, 1)
    with pytest.raises(IntegrityError, match="link"):
        executor.submit(jobs.insert_dangling_link, "a").result(LONGEST)
    assert (database.count("link"), database.count("item")) == (0, 0)
    assert executor.submit(jobs.insert_item, "next").result(LONGEST)


def test_failed_commit_leaves_nothing_to_the_next_job(
    database: Database, make_executor: MakeExecutor
) -> None:
    """A job that a listener to commits refuses is not committed by its successor."""
    executor = make_executor(
        faults.obedient(database.make_engine), 1, **faults.OBEDIENT
    )
    refuse = partial(faults.explode, PermissionError("refused"))
    with pytest.raises(PermissionError):
        executor.submit(
            faults.insert_and_have, "refused", "commit event", refuse
        ).result(LONGEST)
    executor.submit(jobs.insert_item, "next").result(LONGEST)
    assert database.names() == {"next"}


@only_postgresql
def test_swallowed_error_is_not_reported_as_success(
    database: Database, make_executor: MakeExecutor
) -> None:
    """PostgreSQL would answer COMMIT with success and store nothing."""
    executor = make_executor(database.make_engine, 1)
    future = executor.submit(jobs.insert_and_swallow_error, "a")
    with pytest.raises(TransactionAbortedError) as raised:
        future.result(LONGEST)
    assert raised.value.outcome is Outcome.ROLLED_BACK
    assert database.count() == 0
    assert executor.submit(jobs.insert_item, "next").result(LONGEST)


def test_error_inside_a_savepoint_may_be_swallowed(
    database: Database, make_executor: MakeExecutor
) -> None:
    """The rest of the job is committed."""
    executor = make_executor(database.make_engine, 1)
    executor.submit(jobs.insert_and_forgive_in_savepoint, "a").result(LONGEST)
    assert database.names() == {"a"}


@pytest.mark.parametrize(
    "database",
    [
        pytest.param(
            "sqlite",
            marks=pytest.mark.xfail(
                reason="the sqlite3 module begins no transaction at a SAVEPOINT"
            ),
        ),
        *servers.SERVERS,
    ],
    indirect=True,
)
def test_released_savepoint_is_rolled_back_with_its_job(
    database: Database, make_executor: MakeExecutor
) -> None:
    """A savepoint that ended well belongs to the job all the same."""
    executor = make_executor(database.make_engine, 1)
    future = executor.submit(jobs.insert_in_savepoint_and_raise, "a")
    with pytest.raises(ValueError, match="a"):
        future.result(LONGEST)
    assert database.count() == 0


def test_view_without_commit_leaves_it_to_the_job(
    database: Database, make_executor: MakeExecutor
) -> None:
    """Only what the job commits for itself is there."""
    executor = make_executor(database.make_engine, 1)
    view = executor.options(commit=False)
    view.submit(jobs.insert_item, "not committed").result(LONGEST)
    assert database.count() == 0
    view.submit(jobs.insert_and_commit_oneself, "by the job").result(LONGEST)
    assert database.names() == {"by the job"}
    executor.submit(jobs.insert_item, "by the executor").result(LONGEST)
    assert database.names() == {"by the job", "by the executor"}


def test_nothing_of_a_session_reaches_the_next_job(
    database: Database, make_executor: MakeExecutor
) -> None:
    """Objects, ``info``, settings and transaction go, however the job ends."""
    executor = make_executor(database.make_engine, 1)
    fresh = executor.submit(jobs.look_for_traces).result(LONGEST)
    assert (fresh["objects"], fresh["info"]) == (0, {})

    executor.submit(jobs.insert_and_leave_traces, "a").result(LONGEST)
    assert executor.submit(jobs.look_for_traces).result(LONGEST) == fresh

    view = executor.options(commit=False)
    view.submit(jobs.insert_and_leave_traces, "b").result(LONGEST)
    assert executor.submit(jobs.look_for_traces).result(LONGEST) == fresh

    with pytest.raises(ValueError, match="c"):
        executor.submit(jobs.raise_leaving_traces, "c").result(LONGEST)
    assert executor.submit(jobs.look_for_traces).result(LONGEST) == fresh
    assert database.names() == {"a", "a pending"}


def test_idle_worker_holds_no_transaction(
    database: Database, make_executor: MakeExecutor
) -> None:
    """A job that only read leaves nothing open that would hold up a writer."""
    executor = make_executor(database.make_engine, 1)
    assert executor.submit(jobs.count_items).result(LONGEST) == 0
    database.execute("DROP TABLE link")
    database.create_tables()
    executor.submit(jobs.insert_item, "a").result(LONGEST)
    assert executor.submit(jobs.count_items).result(LONGEST) == 1


def test_chunk_is_one_transaction(
    database: Database, make_executor: MakeExecutor
) -> None:
    """Of a chunk with a call that raises nothing is there, of the others all."""
    executor = make_executor(database.make_engine, 1)
    names = ["a", "b", "c", "d", "bad", "f", "g", "h", "i"]
    results = executor.map(jobs.insert_unless_bad, names, chunksize=3)
    assert [next(results) for _ in range(3)] == ["a", "b", "c"]
    with pytest.raises(ValueError, match="bad"):
        next(results)
    executor.shutdown()
    # The third chunk was cancelled by the end of the iterator, or was done by then.
    assert database.names() in ({"a", "b", "c"}, {"a", "b", "c", "g", "h", "i"})


def test_chunks_of_a_large_map_are_all_there(
    database: Database, make_executor: MakeExecutor
) -> None:
    """Every call of every chunk writes its row, and the results keep their order."""
    executor = make_executor(database.make_engine, 2)
    names = [f"item {i}" for i in range(103)]
    results = list(executor.map(jobs.insert_unless_bad, names, chunksize=10))
    assert results == names
    assert database.names() == set(names)


def test_connection_of_the_engine_is_the_jobs_own(
    database: Database, make_executor: MakeExecutor
) -> None:
    """A job may use Core, and commits there for itself."""
    executor = make_executor(database.make_engine, 1)
    executor.submit(jobs.insert_by_core, "core").result(LONGEST)
    assert database.names() == {"core"}


@pytest.mark.parametrize(
    ("use", "name"),
    [
        (partial(getattr, session, "info"), "session"),
        (session, "session"),
        (partial(session.add, None), "session"),
        (current_engine, r"current_engine\(\)"),
    ],
)
def test_outside_a_job_there_is_no_session(use: object, name: str) -> None:
    """The parent process is told that it is not a job."""
    with pytest.raises(OutsideJobError, match=f"^{name} was used outside a job"):
        use()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("function", "name"),
    [("session", "session"), ("current_engine", r"current_engine\(\)")],
)
def test_between_two_jobs_there_is_no_session(
    sqlite_database: Database, make_executor: MakeExecutor, function: str, name: str
) -> None:
    """What unpickles an argument is not the job yet, though it runs in its thread."""
    executor = make_executor(sqlite_database.make_engine, 1)
    executor.submit(jobs.insert_item, "a").result(LONGEST)
    call = executor.submit(jobs.give, faults.CallsOnUnpickling(function))
    with pytest.raises(ArgumentsLostError, match=f"{name} was used outside a job"):
        call.result(LONGEST)


def test_thread_of_a_job_has_no_session(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """A session belongs to the thread that runs the job, and to no other."""
    executor = make_executor(sqlite_database.make_engine, 1)
    raised = executor.submit(jobs.session_from_thread).result(LONGEST)
    assert raised == ["OutsideJobError"] * 3


def test_what_a_job_commits_by_itself_is_read_anew(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """As in every session; only after the worker's own commit nobody would read it."""
    executor = make_executor(sqlite_database.make_engine, 1).options(commit=False)
    future = executor.submit(jobs.insert_and_commit_and_tell_expiry)
    assert future.result(LONGEST) is True
    assert sqlite_database.names() == {"kept"}


def test_session_that_is_opened_at_the_end_of_a_job_is_not_the_next_ones(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """It goes with the job, as the first one does."""
    executor = make_executor(
        sqlite_database.make_engine, 1, session_options={"class_": faults.Reopening}
    )
    for name in ("a", "b"):
        executor.submit(jobs.insert_item, name).result(LONGEST)
        assert executor.submit(jobs.session_info).result(LONGEST) == {}
    assert sqlite_database.names() == {"a", "b"}
