"""InlineExecutor: what it says is what DBPoolExecutor says, case by case."""

from __future__ import annotations

import inspect
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from concurrent.futures import Future
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
from sqlalchemy import Engine, StaticPool, create_engine, event, func, select
from sqlalchemy.exc import DBAPIError, IntegrityError

import failures
import faults
import jobs
import servers
from dbpool_executor import (
    ArgumentsLostError,
    DBPoolExecutor,
    JobExitedError,
    JobFailedError,
    NotPlainError,
    OutcomeUnknownError,
    OutsideJobError,
    ResolveNotSupportedError,
    ResultLostError,
    TransactionAbortedError,
    WorkerStartError,
    current_engine,
    session,
)
from dbpool_executor.testing import InlineExecutor
from models import Base, Item
from processes import MakeExecutor
from servers import Database
from waiting import LONGEST

# -- Agreement ------------------------------------------------------------------------


class Case(NamedTuple):
    """A job, and what it ends with.

    Attributes:
        fn: The job.
        args: Its arguments.
        kind: The type of its result or exception; two where databases differ.
        options: For ``executor.options()``.
        rows: The names that it leaves in the database; None where databases differ.
    """

    fn: Callable[..., object]
    args: tuple[Any, ...]
    kind: type | tuple[type, ...]
    rows: AbstractSet[str] | None = frozenset()
    options: Mapping[str, Any] = MappingProxyType({})


OWN_COMMIT = {"commit": False}
AUTOCOMMIT = {"isolation_level": "AUTOCOMMIT"}
NOTHING = type(None)


def insert_and(raised: BaseException) -> tuple[Any, ...]:
    """Give a job that writes the item ``a`` and raises."""
    return jobs.insert_and_raise, ("a", raised)


CASES = {
    # It returns.
    "plain": Case(jobs.insert_and_give, ("a", {"n": [1, (2,)]}), dict, {"a"}),
    "bytearray": Case(jobs.give, (bytearray(100_000),), bytearray),
    "function": Case(jobs.give, (jobs.add,), type(jobs.add)),
    "keywords": Case(jobs.give, ({"fn": 1, "self": 2},), dict),
    "unflushed": Case(jobs.insert_and_leave_unflushed, ("a",), NOTHING, {"a"}),
    "savepoint": Case(jobs.insert_and_forgive_in_savepoint, ("a",), NOTHING, {"a"}),
    "traces": Case(jobs.insert_and_leave_traces, ("a",), NOTHING, {"a", "a pending"}),
    "no traces": Case(jobs.look_for_traces, (), dict),
    "thread": Case(jobs.session_from_thread, (), list),
    "core": Case(jobs.insert_by_core, ("a",), int, {"a"}),
    # It raises.
    "raises": Case(*insert_and(ValueError("no", 1)), ValueError),
    # SQLite as its module comes has committed the savepoint.
    "raises in savepoint": Case(
        jobs.insert_in_savepoint_and_raise, ("a",), ValueError, None
    ),
    "chained": Case(faults.raise_chained, ("a",), ValueError),
    "falsy": Case(faults.raise_falsy, ("a",), faults.FalsyError),
    "picky": Case(faults.raise_picky, ("a",), faults.PickyError),
    "locked": Case(faults.raise_locked, ("a",), faults.LockedError),
    "frozen": Case(faults.raise_frozen, ("a",), faults.FrozenError),
    "group": Case(faults.raise_group, ("a",), ExceptionGroup),
    "local": Case(faults.raise_local, ("a",), JobFailedError),
    "explosive": Case(faults.raise_explosive, ("a",), faults.ExplosiveError),
    "mute": Case(faults.raise_mute, ("a",), (faults.MuteError, JobFailedError)),
    "refused": Case(faults.insert_odd_twice, ("a",), IntegrityError),
    "exit": Case(*insert_and(SystemExit(3)), JobExitedError),
    "interrupt": Case(*insert_and(KeyboardInterrupt()), JobExitedError),
    # At the commit.
    "dangling": Case(
        jobs.insert_dangling_link, ("a",), (NOTHING, IntegrityError), None
    ),
    "swallowed": Case(
        jobs.insert_and_swallow_error, ("a",), (NOTHING, TransactionAbortedError), None
    ),
    "commit fails": Case(
        faults.insert_and_have,
        ("a", "commit", failures.end_with),
        OutcomeUnknownError,
    ),
    "after commit": Case(
        faults.insert_and_have,
        ("a", "after commit", failures.end_with),
        ResultLostError,
        {"a"},
    ),
    # What does not cross.
    "result not plain": Case(faults.give_item, ("a",), NotPlainError),
    "result not pickled": Case(faults.give_lock, ("a",), TypeError),
    "result raises": Case(faults.give_fails_to_pickle, ("a",), ValueError),
    "result lost": Case(faults.give_explosive, ("a",), ResultLostError, {"a"}),
    "result exits": Case(
        faults.give_exits_on_unpickling, ("a",), ResultLostError, {"a"}
    ),
    "argument not plain": Case(jobs.give, ([Item(name="a")],), NotPlainError),
    "argument not pickled": Case(jobs.give, (threading.Lock(),), TypeError),
    "argument raises": Case(
        jobs.insert_and_give, ("a", faults.FailsToPickle()), ValueError
    ),
    "argument lost": Case(
        jobs.insert_and_give, ("a", faults.Explosive()), ArgumentsLostError
    ),
    "argument exits": Case(
        jobs.insert_and_give, ("a", faults.ExitsOnUnpickling()), ArgumentsLostError
    ),
    "lambda": Case(lambda: 1, (), object),
    "wrong arguments": Case(jobs.add, (1,), TypeError),
    # It commits for itself.
    "own commit": Case(jobs.insert_and_commit_oneself, ("a",), NOTHING, {"a"}),
    "own commit and raise": Case(
        faults.commit_oneself_and_raise, ("a",), JobFailedError, {"a"}
    ),
    "own commit and exit": Case(
        faults.commit_oneself_and_exit, ("a",), JobExitedError, {"a"}
    ),
    "own commit and item": Case(
        faults.commit_oneself_and_give_item, ("a",), NotPlainError, {"a"}
    ),
    # Options.
    "uncommitted": Case(jobs.insert_and_give, ("a", 1), int, set(), OWN_COMMIT),
    "committed": Case(
        jobs.insert_and_commit_oneself, ("a",), NOTHING, {"a"}, OWN_COMMIT
    ),
    "uncommitted, lost": Case(
        faults.give_explosive, ("a",), ResultLostError, set(), OWN_COMMIT
    ),
    "autocommit": Case(*insert_and(ValueError("no")), ValueError, {"a"}, AUTOCOMMIT),
    "autocommit, exit": Case(
        *insert_and(SystemExit(3)), JobExitedError, {"a"}, AUTOCOMMIT
    ),
    "isolated": Case(
        jobs.insert_and_give, ("a", 1), int, {"a"}, {"isolation_level": "SERIALIZABLE"}
    ),
    "read only": Case(jobs.insert_item, ("a",), DBAPIError, set(), {"read_only": True}),
    "no longer read only": Case(jobs.insert_and_give, ("a", 1), int, {"a"}),
    "resolved": Case(
        jobs.insert_and_give,
        ("a", "b"),
        (str, ResolveNotSupportedError),
        None,
        {"resolve": True},
    ),
    "in time": Case(jobs.insert_and_give, ("a", 1), int, {"a"}, {"timeout": LONGEST}),
    "retried in vain": Case(
        *insert_and(failures.lost_connection()), DBAPIError, set(), {"retries": 2}
    ),
    "not retried": Case(*insert_and(ValueError()), ValueError, set(), {"retries": 2}),
}


ON_A_SERVER = {
    "plain", "unflushed", "savepoint", "core", "raises in savepoint", "refused", "exit",
    "dangling", "swallowed", "after commit", "result not plain", "result lost",
    "own commit", "own commit and raise", "uncommitted", "autocommit", "isolated",
    "read only", "no longer read only", "resolved", "retried in vain",
}  # fmt: skip


class Both(NamedTuple):
    """The two executors, on one database."""

    database: Database
    real: DBPoolExecutor
    inline: InlineExecutor


@pytest.fixture(scope="module", params=["sqlite", "postgresql-psycopg"])
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Both]:
    """Both executors on each of two databases, for all cases."""
    if request.param == "sqlite":
        database = servers.sqlite_file(tmp_path_factory.mktemp("both") / "test.db")
    else:
        url = request.getfixturevalue("postgresql_url")
        database = servers.on_server(request.param, url)
    factory = faults.obedient(database.make_engine)
    with (
        DBPoolExecutor(factory, 1, **faults.OBEDIENT) as real,
        InlineExecutor(factory, 1, **faults.OBEDIENT) as inline,
    ):
        yield Both(database, real, inline)


def scrubbed(value: object) -> str:
    """Give a text without what differs from process to process."""
    return re.sub(r"0x[0-9a-f]+|psycopg\.[\w.]+", "…", str(value))


def told(future: Future[Any]) -> dict[str, Any]:
    """Give all that a future tells."""
    error = future.exception(LONGEST)
    if error is None:
        value = future.result()
        # A process id is what must differ.
        return {"result": type(value) if type(value) is int else value}
    cause = error.__cause__
    return {
        "type": type(error),
        "text": scrubbed(text_of(error)),
        "args": scrubbed(error.args),
        "outcome": getattr(error, "outcome", None),
        "notes": getattr(error, "__notes__", None),
        "attempts": getattr(error, "attempts", None),
        "attributes": sorted(vars(error)),
        "suppresses": error.__suppress_context__,
        "cause": type(cause),
        "cause of cause": type(cause and cause.__cause__),
        # Of the job's own code; what is between it and the executor may differ.
        "frames": re.findall(
            r'tests/support/(\w+)\.py", line (\d+), in (\w+)', str(cause)
        ),
    }


def text_of(error: BaseException) -> str:
    """Give the text of an error, also of one that has none."""
    try:
        return str(error)
    except RuntimeError as exc:
        return repr(exc)


@pytest.mark.parametrize(
    ("both", "name"),
    [("sqlite", name) for name in CASES]
    + [("postgresql-psycopg", name) for name in sorted(ON_A_SERVER)],
    indirect=["both"],
)
def test_both_tell_the_same_and_leave_the_same(both: Both, name: str) -> None:
    """Result or exception, text, notes, outcome and cause; and the rows, from outside."""
    case = CASES[name]
    database, *executors = both
    accounts = []
    for executor in executors:
        database.empty_tables()
        view = executor.options(**case.options)
        future = view.submit(case.fn, *case.args)
        account = told(future)
        error = future.exception()
        assert isinstance(future.result() if error is None else error, case.kind)
        assert case.rows is None or database.names() == case.rows
        accounts.append({**account, "rows": database.names()})
    assert accounts[0] == accounts[1]


@pytest.mark.parametrize(
    ("chunksize", "rows"), [(1, {"a", "b", "d"}), (2, {"a", "b"}), (4, set())]
)
@pytest.mark.parametrize("buffersize", [None, 3])
def test_both_map_the_same(
    both: Both, chunksize: int, buffersize: int | None, rows: set[str]
) -> None:
    """The results up to the bad one, its error, and whole chunks in the database."""
    database, *executors = both
    for executor in executors:
        database.empty_tables()
        names = ["a", "b", "bad c", "d"]
        results = executor.map(
            jobs.insert_unless_bad, names, chunksize=chunksize, buffersize=buffersize
        )
        taken = []
        with pytest.raises(ValueError, match="bad c"):
            taken.extend(results)
        executor.submit(jobs.count_items).result(LONGEST)  # what was sent is done
        assert database.names() in (rows, rows - {"d"})  # the last may be cancelled


def test_both_repeat_the_same(both: Both, tmp_path: Path) -> None:
    """A job that fails for a transient reason is done at the second attempt."""
    database, *executors = both
    error = failures.lost_connection()
    for executor in executors:
        database.empty_tables()
        before = executor.stats().retried
        record = tmp_path / type(executor).__name__
        view = executor.options(retries=1)
        view.submit(failures.raise_at_first, record, "a", error).result(LONGEST)
        assert database.names() == {"a"}
        assert executor.stats().retried == before + 1
        assert len(record.read_text().split()) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        {"initializer": faults.fail_to_initialize},
        {"engine_factory": abs},
        {"engine_factory": dict},
        {"engine_factory": str, "initializer": jobs.pid},
    ],
)
def test_both_break_the_same(
    sqlite_database: Database, make_executor: MakeExecutor, arguments: dict[str, Any]
) -> None:
    """What cannot start fails its job and refuses the next, with the same words."""
    arguments = {"engine_factory": sqlite_database.make_engine, **arguments}
    accounts = []
    for make in (make_executor, InlineExecutor):
        executor = make(max_workers=1, **arguments)
        account = told(executor.submit(jobs.add, 1, 2))
        with pytest.raises(WorkerStartError) as raised:
            executor.submit(jobs.add, 1, 2)
        accounts.append((account, str(raised.value), repr(executor)[:24].split()[1:]))
        executor.shutdown()
    assert accounts[0] == accounts[1]
    assert accounts[0][0]["type"] is WorkerStartError
    assert sqlite_database.count() == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"engine_factory": 5},
        {"engine_factory": create_engine("sqlite://")},
        {"engine_factory": "no url"},
        {"engine_factory": "sqlite+aiosqlite://"},
        {"initializer": 5},
        {"initargs": (threading.Lock(),)},
        {"finalizer": 5},
        {"timeout": -1},
        {"retries": "2"},
        {"worker": 1},
    ],
    ids=str,
)
def test_both_refuse_the_same(wrong: dict[str, Any]) -> None:
    """An argument that is wrong there is wrong here."""
    said = []
    for cls in (DBPoolExecutor, InlineExecutor):
        with pytest.raises(Exception, match=r".") as raised:
            cls(**{"engine_factory": "sqlite://", **wrong})
        said.append((type(raised.value), str(raised.value).removeprefix(cls.__name__)))
    assert said[0] == said[1]


def test_both_have_the_same_signatures() -> None:
    """So that one can stand in for the other, under its name."""
    for name in ("__init__", "submit", "map", "options", "shutdown"):
        real, inline = (getattr(c, name) for c in (DBPoolExecutor, InlineExecutor))
        assert inspect.signature(real) == inspect.signature(inline)


# -- In this process --------------------------------------------------------------------


@pytest.fixture
def memory() -> Iterator[Engine]:
    """The engine of a test, whose one connection is the database."""
    engine = create_engine("sqlite://", poolclass=StaticPool)
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


def names(engine: Engine) -> set[str]:
    """Give the names of the items that an engine sees."""
    with engine.connect() as connection:
        return set(connection.scalars(select(Item.name)))


def test_a_job_runs_in_the_callers_thread_and_is_done(memory: Engine) -> None:
    """When submit() returns there is nothing left to wait for."""
    with InlineExecutor(lambda: memory) as executor:
        future = executor.submit(threading.get_ident)
        assert future.done()
        assert future.result() == threading.get_ident()
        assert executor.submit(jobs.insert_item, "a").done()
        assert names(memory) == {"a"}


def test_arguments_and_results_are_copies(memory: Engine) -> None:
    """What a job does to them is not seen here, nor the other way round."""
    sent: list[object] = [[1]]
    with InlineExecutor(lambda: memory) as executor:
        got = executor.submit(jobs.give, sent).result()
    assert got == sent
    assert got[0] is not sent[0]


def test_the_tests_engine_outlives_the_executor(memory: Engine) -> None:
    """Nothing is lost with the executor, and nothing of it stays on the engine."""
    for name in ("a", "b"):
        with InlineExecutor(lambda: memory) as executor:
            executor.submit(jobs.insert_item, name).result()
    assert names(memory) == {"a", "b"}
    assert not memory.dispatch.commit
    assert not memory.dispatch.before_cursor_execute


def test_connections_of_a_file_are_closed_at_shutdown(
    sqlite_database: Database, tmp_path: Path
) -> None:
    """As in a worker; what the test has checked out is left alone."""
    engine = sqlite_database.make_engine()
    closed: list[object] = []
    event.listen(engine, "close", lambda connection, _record: closed.append(connection))
    with engine.connect() as mine, InlineExecutor(lambda: engine) as executor:
        view = executor.options(commit=False)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            view.submit(failures.leave_open, "a").result()
        assert [w.category for w in said] == [ResourceWarning]
        assert len(closed) == 1
        executor.submit(jobs.insert_item, "b").result()
        executor.shutdown()
        assert len(closed) == 2
        assert mine.scalars(select(func.count(Item.id))).one() == 1
    engine.dispose()
    assert sqlite_database.names() == {"b"}


def test_session_is_there_in_a_job_alone(memory: Engine) -> None:
    """As in a worker: outside a job it says so, after the job as before it."""
    with InlineExecutor(lambda: memory) as executor:
        executor.submit(jobs.insert_item, "a").result()
        for what in (session, current_engine):
            with pytest.raises(OutsideJobError):
                what()


_running: list[InlineExecutor] = []


def submit_from_inside() -> None:
    """Submit a job from a job, to the executor that runs it."""
    jobs.insert_item("outer")
    _running[0].submit(jobs.insert_item, "inner")


def test_a_job_cannot_submit(memory: Engine) -> None:
    """In a worker the executor is not there; here it says so, and nothing is mixed."""
    with InlineExecutor(lambda: memory) as executor:
        _running[:] = [executor]
        with pytest.raises(RuntimeError, match="inside a job"):
            executor.submit(submit_from_inside).result()
        assert executor.submit(jobs.count_items).result() == 0


def test_callbacks_may_submit(memory: Engine) -> None:
    """They run when the job is over."""
    futures: list[Future[int]] = []
    with InlineExecutor(lambda: memory) as executor:
        executor.submit(jobs.add, 1, 2).add_done_callback(
            lambda _future: futures.append(executor.submit(jobs.add, 3, 4))
        )
    assert futures[0].result(0) == 7


def test_threads_take_turns(sqlite_database: Database) -> None:
    """Jobs of several threads do not meet."""
    with InlineExecutor(sqlite_database.make_engine) as executor:

        def submit(prefix: str) -> None:
            for i in range(20):
                executor.submit(jobs.insert_item, f"{prefix} {i}").result(0)

        threads = [threading.Thread(target=submit, args=(p,)) for p in "abc"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONGEST)
        assert executor.stats().done == 60
    assert sqlite_database.count() == 60


def test_finalizer_runs_once_after_the_last_job(sqlite_database: Database) -> None:
    """At shutdown, as a transaction of its own; not again at the second."""
    factory = sqlite_database.make_engine
    with InlineExecutor(
        factory, finalizer=jobs.insert_item, finalargs=("last",)
    ) as executor:
        executor.submit(jobs.insert_item, "first").result()
        assert sqlite_database.names() == {"first"}
        executor.shutdown()
    assert sqlite_database.names() == {"first", "last"}


def test_nothing_is_taken_after_shutdown(memory: Engine) -> None:
    """As everywhere."""
    executor = InlineExecutor(lambda: memory)
    view = executor.options(retries=1)
    view.shutdown()
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(jobs.add, 1, 2)
    assert "shut down" in repr(executor)


# -- In a transaction of the test ---------------------------------------------------------


@pytest.fixture
def joined(both: Both) -> Iterator[InlineExecutor]:
    """Jobs run inside a transaction that is rolled back, as the README has it."""
    database = both.database
    database.empty_tables()
    engine = database.make_engine()
    if database.is_sqlite:

        @event.listens_for(engine, "connect")
        def configure(connection: Any, _record: object) -> None:
            connection.isolation_level = None

        @event.listens_for(engine, "begin")
        def begin(connection: Any) -> None:
            connection.exec_driver_sql("BEGIN")

    with engine.connect() as connection:
        transaction = connection.begin()
        options = {"bind": connection, "join_transaction_mode": "create_savepoint"}
        with InlineExecutor(lambda: engine, session_options=options) as executor:
            yield executor
        transaction.rollback()
    engine.dispose()
    assert database.count() == 0


def names_inside() -> list[str]:
    """Give the names that a job sees."""
    return list(session.scalars(select(Item.name)))


JOINED = {
    "plain", "unflushed", "savepoint", "raises", "raises in savepoint", "refused", "exit",
    "swallowed", "result not plain", "result lost", "own commit and raise", "own commit and exit",
    "uncommitted", "isolated", "committed", "retried in vain",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(JOINED))
def test_jobs_that_join_a_transaction_tell_the_same(
    both: Both, joined: InlineExecutor, name: str
) -> None:
    """A failed job is undone and the ones before it stay, until the test ends."""
    case = CASES[name]
    accounts = []
    for executor in (both.real, joined):
        both.database.empty_tables()
        if executor is joined:
            joined.submit(jobs.insert_item, "before").result()
        view = executor.options(**case.options)
        accounts.append(told(view.submit(case.fn, *case.args)))
        # Alone, SQLite commits a savepoint that begins no transaction; in the test's not.
        accounts[-1].pop("notes", None)
    assert accounts[0] == accounts[1]
    inside = joined.submit(names_inside).result()
    assert case.rows is None or set(inside) == case.rows | {"before"}
    assert both.database.count() == 0
