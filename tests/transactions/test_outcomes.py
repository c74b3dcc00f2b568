"""What a failed job says of its transaction, and what the database says."""

from __future__ import annotations

import os
import pickle
import signal
import threading
from collections.abc import Callable
from functools import partial
from multiprocessing.context import BaseContext
from typing import Any

import psutil
import pytest
from sqlalchemy.exc import DBAPIError, IntegrityError

import faults
import jobs
import servers
from dbpool_executor import (
    ArgumentsLostError,
    DBPoolError,
    JobExitedError,
    JobFailedError,
    Outcome,
    OutcomeUnknownError,
    ResultLostError,
    WorkerDiedError,
)
from processes import MakeExecutor, worker_pids
from servers import Database
from waiting import LONGEST, Gate, wait_until

Job = Callable[[str], object]

only_servers = pytest.mark.parametrize("database", servers.SERVERS, indirect=True)


# -- The worker dies ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("death", "exitcode", "words"),
    [
        (faults.insert_and_die, -signal.SIGKILL, "was killed by SIGKILL"),
        (partial(faults.insert_and_die, number=signal.SIGTERM), -15, "by SIGTERM"),
        (partial(faults.insert_and_die, number=signal.SIGSEGV), -11, "by SIGSEGV"),
        (partial(faults.insert_and_exit, code=3), 3, "exited with code 3"),
        (partial(faults.insert_and_exit, code=0), 0, "exited with code 0"),
    ],
)
def test_crash_costs_one_job(
    sqlite_database: Database,
    make_executor: MakeExecutor,
    death: Job,
    exitcode: int,
    words: str,
) -> None:
    """The job that ran fails and leaves nothing; the other twenty are done."""
    executor = make_executor(sqlite_database.make_engine, 2)
    names = [f"item {i}" for i in range(20)]
    before = [executor.submit(jobs.insert_item, name) for name in names[:10]]
    dying = executor.submit(death, "dying")
    after = [executor.submit(jobs.insert_item, name) for name in names[10:]]

    with pytest.raises(WorkerDiedError, match=words) as raised:
        dying.result(LONGEST)
    assert raised.value.exitcode == exitcode
    assert raised.value.pid not in worker_pids() | {None, os.getpid()}
    assert raised.value.outcome is Outcome.ROLLED_BACK
    for future in [*before, *after]:
        future.result(LONGEST)
    assert sqlite_database.names() == set(names)


def test_crash_is_rolled_back_on_every_database_by_every_start_method(
    database: Database, context: BaseContext, make_executor: MakeExecutor
) -> None:
    """The row that a killed worker wrote is gone, and its executor lives on."""
    executor = make_executor(database.make_engine, 1, context)
    dying = executor.submit(faults.insert_and_die, "same")
    waiting = executor.submit(jobs.insert_item, "waiting")
    with pytest.raises(WorkerDiedError, match="SIGKILL"):
        dying.result(LONGEST)
    waiting.result(LONGEST)
    # The name is free again: the server has ended the dead worker's transaction.
    executor.submit(jobs.insert_item, "same").result(LONGEST)
    assert database.names() == {"waiting", "same"}


def test_many_crashes_cost_as_many_jobs(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """However many workers die in a row, the executor does not give up."""
    executor = make_executor(sqlite_database.make_engine, 1)
    dying = [executor.submit(faults.insert_and_die, f"dying {i}") for i in range(8)]
    last = executor.submit(jobs.insert_item, "last")
    assert {type(f.exception(LONGEST)) for f in dying} == {WorkerDiedError}
    assert len({id(f.exception()) for f in dying}) == len(dying)
    last.result(LONGEST)
    assert sqlite_database.names() == {"last"}


def test_death_of_an_idle_worker_is_no_event(
    sqlite_database: Database, context: BaseContext, make_executor: MakeExecutor
) -> None:
    """No future fails, and the next job gets another worker."""
    executor = make_executor(sqlite_database.make_engine, 1, context)
    first = executor.submit(jobs.pid).result(LONGEST)
    psutil.Process(first).kill()
    wait_until(lambda: not psutil.pid_exists(first), "the worker to be gone")
    second = executor.submit(jobs.pid).result(LONGEST)
    assert second not in (first, os.getpid())


def test_jobs_may_be_submitted_while_idle_workers_die(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """A job that reaches a dying worker before it is begun goes to another one."""
    executor = make_executor(sqlite_database.make_engine, 1)
    for i in range(10):
        worker = executor.submit(jobs.pid).result(LONGEST)
        os.kill(worker, signal.SIGKILL)
        executor.submit(jobs.insert_item, f"item {i}").result(LONGEST)
    assert sqlite_database.count() == 10


def test_death_while_arguments_are_unpickled_costs_one_job(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """A job that cannot even be unpickled is not given to worker after worker."""
    executor = make_executor(sqlite_database.make_engine, 1)
    dying = executor.submit(jobs.give, faults.DiesOnUnpickling())
    error = dying.exception(LONGEST)
    assert isinstance(error, WorkerDiedError)
    assert error.outcome in (Outcome.ROLLED_BACK, Outcome.NEVER_STARTED)
    executor.submit(jobs.insert_item, "next").result(LONGEST)


# -- At which moment the worker dies --------------------------------------------------


def die_at(moment: str) -> tuple[Any, ...]:
    """Give a call that writes the item ``a`` and dies."""
    return faults.insert_and_have, "a", moment, faults.die


def test_death_at_commit_is_unknown(
    database: Database, make_executor: MakeExecutor
) -> None:
    """Once COMMIT has begun nothing is promised; here the row is not there."""
    executor = make_executor(
        faults.obedient(database.make_engine), 1, **faults.OBEDIENT
    )
    with pytest.raises(OutcomeUnknownError) as raised:
        executor.submit(*die_at("commit")).result(LONGEST)
    assert raised.value.outcome is Outcome.UNKNOWN
    cause = raised.value.__cause__
    assert isinstance(cause, WorkerDiedError)
    assert (cause.exitcode, cause.outcome) == (-signal.SIGKILL, Outcome.UNKNOWN)
    executor.submit(jobs.insert_item, "next").result(LONGEST)
    assert database.names() == {"next"}


def test_death_before_the_commit_is_noted_is_unknown(
    database: Database, make_executor: MakeExecutor
) -> None:
    """The same error, and here the row is there: that is why nothing is promised."""
    executor = make_executor(
        faults.obedient(database.make_engine), 1, **faults.OBEDIENT
    )
    with pytest.raises(OutcomeUnknownError) as raised:
        executor.submit(*die_at("commit returned")).result(LONGEST)
    assert isinstance(raised.value.__cause__, WorkerDiedError)
    assert database.names() == {"a"}


def test_death_in_a_hook_after_commit_promises_no_rollback(
    database: Database, make_executor: MakeExecutor
) -> None:
    """Whether it was noted by then or not, the row is there."""
    executor = make_executor(database.make_engine, 1)
    error = executor.submit(*die_at("after commit")).exception(LONGEST)
    assert isinstance(error, DBPoolError)
    assert error.outcome in (Outcome.UNKNOWN, Outcome.COMMITTED)
    assert database.names() == {"a"}


def test_death_after_the_commit_was_noted_loses_the_result_alone(
    database: Database, make_executor: MakeExecutor
) -> None:
    """The row is there, and the error says so."""
    executor = make_executor(
        faults.obedient(database.make_engine), 1, **faults.OBEDIENT
    )
    with pytest.raises(ResultLostError, match="SIGKILL") as raised:
        executor.submit(*die_at("close")).result(LONGEST)
    assert raised.value.outcome is Outcome.COMMITTED
    assert database.names() == {"a"}


def test_death_while_a_large_result_is_sent_loses_the_result_alone(
    sqlite_database: Database, make_executor: MakeExecutor, gate: Gate
) -> None:
    """Half a result is not a result: the row is there, and the executor lives on."""
    executor = make_executor(
        faults.obedient(sqlite_database.make_engine), 2, **faults.OBEDIENT
    )
    is_held, may_go_on = threading.Event(), threading.Event()

    def hold(_future: object) -> None:
        # In the dispatcher's thread, which now reads from no worker.
        is_held.set()
        may_go_on.wait(LONGEST)

    other = executor.submit(jobs.wait_at_gate, gate.address)
    other.add_done_callback(hold)
    others_worker = gate.arrival()
    large = executor.submit(faults.give_large, "large", 50_000_000, gate.address)
    worker = psutil.Process(gate.arrival())
    assert sqlite_database.names() == {"large"}
    gate.open(others_worker)
    assert is_held.wait(LONGEST)
    gate.open(worker.pid)
    wait_until(lambda: worker.status() == psutil.STATUS_SLEEPING, "a full socket")
    worker.kill()
    may_go_on.set()

    with pytest.raises(ResultLostError) as raised:
        large.result(LONGEST)
    assert raised.value.outcome is Outcome.COMMITTED
    other.result(LONGEST)
    executor.submit(jobs.insert_item, "next").result(LONGEST)
    assert sqlite_database.names() == {"large", "next"}


def test_large_result_that_arrived_is_a_result(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """Many megabytes cross unharmed, and the worker goes on."""
    executor = make_executor(sqlite_database.make_engine, 1)
    large = executor.submit(faults.give_large, "large", 50_000_000).result(LONGEST)
    assert (len(large), sqlite_database.names()) == (50_000_000, {"large"})


def test_death_after_a_commit_of_its_own_is_unknown(
    database: Database, make_executor: MakeExecutor
) -> None:
    """A job that commits for itself has given up the promise to be rolled back."""
    executor = make_executor(database.make_engine, 1)
    for job_executor in (executor, executor.options(commit=False)):
        name = f"item {database.count()}"
        future = job_executor.submit(faults.commit_oneself_and_die, name)
        with pytest.raises(OutcomeUnknownError):
            future.result(LONGEST)
    assert database.count() == 2


@pytest.mark.parametrize(
    "job",
    [
        faults.commit_oneself_and_raise,
        faults.commit_oneself_and_exit,
        faults.commit_oneself_and_give_item,
    ],
)
def test_failure_after_a_commit_of_its_own_promises_nothing(
    sqlite_database: Database, make_executor: MakeExecutor, job: Job
) -> None:
    """Where the row may be there, no error says that the job was rolled back."""
    executor = make_executor(sqlite_database.make_engine, 1)
    error = executor.submit(job, "a").exception(LONGEST)
    assert sqlite_database.names() == {"a"}
    assert isinstance(error, DBPoolError)
    assert error.outcome is not Outcome.ROLLED_BACK


def test_hook_that_exits_after_commit_does_not_undo_it(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """The row is there, so the error must not say that it was rolled back."""
    executor = make_executor(sqlite_database.make_engine, 1)
    leave = partial(faults.explode, SystemExit(3))
    future = executor.submit(faults.insert_and_have, "a", "after commit", leave)
    error = future.exception(LONGEST)
    assert sqlite_database.names() == {"a"}
    assert isinstance(error, DBPoolError)
    assert error.outcome is not Outcome.ROLLED_BACK


# -- The connection is lost -----------------------------------------------------------


def drop_sessions(database: Database) -> None:
    """Have the server end the sessions of all jobs."""
    if database.is_postgresql:
        database.rows(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        return
    sessions = database.rows(
        "SELECT id FROM information_schema.processlist "
        "WHERE db = database() AND id <> connection_id()"
    )
    for (number,) in sessions:
        database.execute(f"KILL CONNECTION {number}")
    wait_until(lambda: database.sessions() == 0, "the server to end the sessions")


@only_servers
def test_connection_lost_before_commit_is_rolled_back(
    database: Database, make_executor: MakeExecutor, gate: Gate
) -> None:
    """The job fails with SQLAlchemy's exception, and the worker connects anew."""
    executor = make_executor(database.make_engine, 1)
    future = executor.submit(faults.select_after_gate, "a", gate.address)
    worker = gate.arrival()
    drop_sessions(database)
    gate.open()
    with pytest.raises(DBAPIError) as raised:
        future.result(LONGEST)
    assert raised.value.connection_invalidated
    assert executor.submit(jobs.pid).result(LONGEST) == worker
    executor.submit(jobs.insert_item, "next").result(LONGEST)
    assert database.names() == {"next"}


@only_servers
def test_connection_lost_at_commit_is_unknown(
    database: Database, make_executor: MakeExecutor, gate: Gate
) -> None:
    """COMMIT meets a connection that is gone; SQLAlchemy's exception is the cause."""
    executor = make_executor(database.make_engine, 1)
    future = executor.submit(jobs.insert_at_gate, "a", gate.address)
    worker = gate.arrival()
    drop_sessions(database)
    gate.open()
    with pytest.raises(OutcomeUnknownError) as raised:
        future.result(LONGEST)
    assert raised.value.outcome is Outcome.UNKNOWN
    assert isinstance(raised.value.__cause__, DBAPIError)
    assert executor.submit(jobs.pid).result(LONGEST) == worker
    executor.submit(jobs.insert_item, "next").result(LONGEST)
    assert database.names() == {"next"}


# -- The job exits --------------------------------------------------------------------


@pytest.mark.parametrize(
    "exc", [SystemExit(3), SystemExit(), KeyboardInterrupt(), GeneratorExit()]
)
def test_job_that_exits_ends_neither_worker_nor_parent(
    database: Database, make_executor: MakeExecutor, exc: BaseException
) -> None:
    """It is rolled back and told by name; the same worker does the next job."""
    executor = make_executor(database.make_engine, 1)
    worker = executor.submit(jobs.pid).result(LONGEST)
    with pytest.raises(JobExitedError, match=type(exc).__name__) as raised:
        executor.submit(jobs.insert_and_raise, "a", exc).result(LONGEST)
    assert raised.value.outcome is Outcome.ROLLED_BACK
    assert executor.submit(jobs.pid).result(LONGEST) == worker
    assert database.count() == 0


@pytest.mark.parametrize(
    ("before", "args"),
    [
        (jobs.give, (1,)),
        (jobs.session_settings, ()),
        (jobs.insert_item, ("b",)),
        (jobs.insert_by_core, ("b",)),
        (faults.insert_by_kept_engine, ("b",)),
        (faults.commit_oneself_and_exit, ("b",)),
    ],
)
def test_outcome_is_that_of_the_job_alone(
    database: Database,
    make_executor: MakeExecutor,
    before: Callable[..., object],
    args: tuple[Any, ...],
) -> None:
    """Whatever the one before has used or committed."""
    executor = make_executor(database.make_engine, 1, initializer=faults.keep_engine)
    for call, outcome in (
        ((jobs.insert_and_raise, "a", SystemExit(3)), Outcome.ROLLED_BACK),
        ((faults.commit_oneself_and_exit, "a"), Outcome.UNKNOWN),
    ):
        executor.submit(before, *args).exception(LONGEST)
        with pytest.raises(JobExitedError) as raised:
            executor.submit(*call).result(LONGEST)
        assert raised.value.outcome is outcome


# -- The job raises -------------------------------------------------------------------


def failure_of(database: Database, make_executor: MakeExecutor, job: Job) -> Any:
    """Run a job that fails, and see that it left nothing and broke nothing."""
    executor = make_executor(database.make_engine, 1)
    worker = executor.submit(jobs.pid).result(LONGEST)
    error: Any
    with pytest.raises(Exception) as raised:
        executor.submit(job, "a").result(LONGEST)
    error = raised.value
    assert database.count() == 0
    assert executor.submit(jobs.pid).result(LONGEST) == worker
    assert f"in {job.__name__}" in str(error.__cause__)
    assert "faults.py" in str(error.__cause__)
    return error


def test_exception_arrives_as_itself_with_the_workers_traceback(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """Also the chain that the job made is told."""
    error = failure_of(sqlite_database, make_executor, faults.raise_chained)
    assert (type(error), error.args) == (ValueError, ("what came of it",))
    assert "LookupError: the root of it" in str(error.__cause__)


def test_falsy_exception_is_raised(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """An exception that is false is not taken for no exception."""
    error = failure_of(sqlite_database, make_executor, faults.raise_falsy)
    assert (type(error), error.args, bool(error)) == (
        faults.FalsyError,
        ("falsy",),
        False,
    )


def test_exception_with_a_constructor_of_its_own_arrives_whole(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """Attributes and text are those that the job gave it."""
    error = failure_of(sqlite_database, make_executor, faults.raise_picky)
    assert type(error) is faults.PickyError
    assert (error.place, error.code, str(error)) == ("home", 7, "7 at home")


def test_exception_that_holds_a_lock_arrives_without_it(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """What does not pickle is told by its ``repr``, and the rest is as it was."""
    error = failure_of(sqlite_database, make_executor, faults.raise_locked)
    assert type(error) is faults.LockedError
    assert (error.text, error.args) == ("locked", ("locked",))
    assert "lock" in str(error.lock)


def test_frozen_exception_arrives_with_its_cause(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """A frozen dataclass refuses to be given a cause, and has one all the same."""
    error = failure_of(sqlite_database, make_executor, faults.raise_frozen)
    assert error == faults.FrozenError(7, "home")


def test_exception_group_arrives_with_its_members(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """``except*`` works on it."""
    error = failure_of(sqlite_database, make_executor, faults.raise_group)
    assert isinstance(error, ExceptionGroup)
    assert [type(e) for e in error.exceptions] == [ValueError, faults.PickyError]


def test_exception_that_raises_on_unpickling_arrives_as_itself(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """Its own way to be rebuilt fails, so it is put together without."""
    error = failure_of(sqlite_database, make_executor, faults.raise_explosive)
    assert (type(error), error.args) == (faults.ExplosiveError, ("boom",))


def test_exception_that_exits_on_unpickling_ends_no_process(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """Neither the worker, which tries whether it can be rebuilt, nor the parent."""
    error = failure_of(sqlite_database, make_executor, faults.raise_exits_on_unpickling)
    assert isinstance(error, faults.ExitsOnUnpicklingError | JobFailedError)


def test_exception_of_a_local_class_has_a_stand_in(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """The class cannot be imported here; its name and its text are told."""
    error = failure_of(sqlite_database, make_executor, faults.raise_local)
    assert type(error) is JobFailedError
    assert error.class_name == "faults.raise_local.<locals>.LocalError"
    assert (error.text, error.outcome) == ("local", Outcome.ROLLED_BACK)


def test_exception_that_cannot_be_shown_fails_its_job_alone(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """An exception whose ``str()`` raises is told all the same."""
    error = failure_of(sqlite_database, make_executor, faults.raise_mute)
    assert "MuteError" in f"{type(error).__name__} {error!r}"


def test_database_error_is_told_whatever_its_parameters(
    database: Database, make_executor: MakeExecutor
) -> None:
    """A parameter that does not pickle does not hide what the database refused."""
    executor = make_executor(database.make_engine, 1)
    with pytest.raises(IntegrityError) as raised:
        executor.submit(faults.insert_odd_twice, "odd").result(LONGEST)
    error = raised.value
    assert isinstance(error.orig, Exception)
    assert type(error.orig).__name__ in ("IntegrityError", "UniqueViolation")
    assert "INSERT INTO item" in str(error.statement)
    assert "odd" in str(error.params)
    assert "insert_odd_twice" in str(error.__cause__)
    assert type(pickle.loads(pickle.dumps(error))) is IntegrityError
    assert database.count() == 0


# -- Values that do not cross ---------------------------------------------------------


@pytest.mark.parametrize("value", [faults.Explosive(), faults.ExitsOnUnpickling()])
def test_argument_that_raises_on_unpickling_fails_its_job_alone(
    sqlite_database: Database, make_executor: MakeExecutor, value: object
) -> None:
    """The job never starts, and its worker does the next one."""
    executor = make_executor(sqlite_database.make_engine, 1)
    first = executor.submit(jobs.pid)
    future = executor.submit(jobs.insert_and_give, "a", value)
    after = executor.submit(jobs.pid)
    with pytest.raises(ArgumentsLostError) as raised:
        future.result(LONGEST)
    assert raised.value.outcome is Outcome.NEVER_STARTED
    assert raised.value.__cause__ is not None
    assert first.result(LONGEST) == after.result(LONGEST)
    assert sqlite_database.count() == 0


def test_argument_that_does_not_pickle_fails_its_job_alone(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """The error is in the future, as with the standard pool."""
    executor = make_executor(sqlite_database.make_engine, 1)
    future = executor.submit(jobs.insert_and_give, "a", faults.FailsToPickle())
    after = executor.submit(jobs.insert_item, "next")
    with pytest.raises(ValueError, match="not pickled"):
        future.result(LONGEST)
    after.result(LONGEST)
    assert sqlite_database.names() == {"next"}


@pytest.mark.parametrize(
    "job", [faults.give_explosive, faults.give_exits_on_unpickling]
)
def test_result_that_raises_on_unpickling_is_lost_alone(
    database: Database, make_executor: MakeExecutor, job: Job
) -> None:
    """The row is there, the error says so, and the parent comes to no harm."""
    executor = make_executor(database.make_engine, 1)
    future = executor.submit(job, "a")
    after = executor.submit(jobs.insert_item, "next")
    with pytest.raises(ResultLostError) as raised:
        future.result(LONGEST)
    assert raised.value.outcome is Outcome.COMMITTED
    after.result(LONGEST)
    assert database.names() == {"a", "next"}


def test_lost_result_of_a_job_without_commit_is_not_called_committed(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """Nothing was committed, so the error must not say that it was."""
    executor = make_executor(sqlite_database.make_engine, 1)
    view = executor.options(commit=False)
    error = view.submit(faults.give_explosive, "a").exception(LONGEST)
    assert sqlite_database.count() == 0
    assert isinstance(error, DBPoolError)
    assert error.outcome is not Outcome.COMMITTED
