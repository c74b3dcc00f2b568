"""More of what every executor of processes does, and what ours does otherwise.

The first column is the standard library's: it shows that a test is right, and that a
difference which we claim is one. The second is ours. See ``test_executor_contract``.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import (
    ALL_COMPLETED,
    Executor,
    Future,
    ProcessPoolExecutor,
    as_completed,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import pytest

import jobs
import values
from dbpool_executor import (
    ArgumentsLostError,
    DBPoolExecutor,
    JobExitedError,
    NotPlainError,
    Outcome,
    ResultLostError,
    WorkerDiedError,
)
from models import Item
from processes import MakeExecutor, dispatchers, worker_pids
from waiting import LONGEST, Gate, wait_until

MakeAny: TypeAlias = Callable[..., Executor]

KINDS = ["stdlib", "dbpool"]
URL = "sqlite:///never-opened.db"


def standard(max_workers: int, **options: Any) -> ProcessPoolExecutor:
    """Make the standard executor, with our default start method."""
    options.setdefault("mp_context", multiprocessing.get_context("forkserver"))
    return ProcessPoolExecutor(max_workers, **options)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Say whose executor it is."""
    kind: str = request.param
    return kind


@pytest.fixture
def make(kind: str, make_executor: MakeExecutor) -> Iterator[MakeAny]:
    """Makes executors of either kind, and shuts them down."""
    if kind == "dbpool":
        yield partial(make_executor, URL)
        return
    made: list[Executor] = []
    before = worker_pids()

    def make(max_workers: int, **options: Any) -> Executor:
        made.append(standard(max_workers, **options))
        return made[-1]

    yield make
    for executor in made:
        executor.shutdown(cancel_futures=True)
    # One that was shut down without waiting does not wait when told again.
    wait_until(lambda: worker_pids() <= before, "the standard workers ended")


@pytest.fixture(scope="module", params=KINDS)
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    """One worker of either kind, for tests that leave it as it was."""
    made = DBPoolExecutor(URL, 1) if request.param == "dbpool" else standard(1)
    with made as executor:
        yield executor


# -- The constructor ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"max_workers": 0}, ValueError, "max_workers must be greater than 0"),
        ({"max_workers": -1}, ValueError, "max_workers must be greater than 0"),
        ({"initializer": 5}, TypeError, "initializer must be a callable"),
        ({"max_tasks_per_child": 0}, ValueError, "max_tasks_per_child must be"),
        ({"max_tasks_per_child": 1.5}, TypeError, "max_tasks_per_child must be"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    make: MakeAny, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    """By the constructor, with the same error in the same words."""
    with pytest.raises(error, match=words):
        make(**{"max_workers": 1, **options})


def test_start_method_is_that_of_the_context(make: MakeAny) -> None:
    """And a worker knows how it was started."""
    context = multiprocessing.get_context("forkserver")
    executor = make(1, mp_context=context)
    assert executor.submit(values.start_method).result(LONGEST) == "forkserver"


def test_with_block_gives_the_executor_itself(make: MakeAny) -> None:
    """And may be entered again, as far as it goes."""
    executor = make(1)
    with executor as entered:
        assert entered is executor
    with executor, pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(os.getpid)


# -- The call -------------------------------------------------------------------------


def test_submit_wants_a_function_and_wants_it_first(executor: Executor) -> None:
    """No keyword stands for it, since every keyword is the job's."""
    submit: Any = executor.submit
    with pytest.raises(TypeError):
        submit()
    with pytest.raises(TypeError):
        submit(fn=os.getpid)


def test_workers_end_only_when_told(executor: Executor) -> None:
    """One after the other, jobs meet the same process."""
    pids = {executor.submit(os.getpid).result(LONGEST) for _ in range(3)}
    assert len(pids) == 1


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(lambda: None, id="lambda"),
        pytest.param(threading.Lock(), id="lock"),
        pytest.param(Future(), id="future"),
        pytest.param(values.Unpicklable(), id="raises"),
        pytest.param((n for n in ()), id="generator"),
    ],
)
def test_argument_that_does_not_pickle_fails_its_own_job(
    executor: Executor, value: object
) -> None:
    """``submit()`` does not raise, the future does, and the neighbours are well."""
    before = executor.submit(jobs.give, 1)
    future = executor.submit(jobs.give, value)
    after = executor.submit(jobs.give, 2)
    errors = (pickle.PicklingError, AttributeError, TypeError, LookupError)
    assert isinstance(future.exception(LONGEST), errors)
    assert (before.result(LONGEST), after.result(LONGEST)) == (1, 2)


def test_function_that_does_not_pickle_fails_its_own_job(executor: Executor) -> None:
    """One that no import finds."""
    future = executor.submit(lambda: 1)
    errors = (pickle.PicklingError, AttributeError)
    assert isinstance(future.exception(LONGEST), errors)
    assert executor.submit(jobs.give, 2).result(LONGEST) == 2


def test_executor_does_not_cross_into_its_workers(executor: Executor) -> None:
    """A job cannot submit to the executor that runs it."""
    future = executor.submit(jobs.give, executor)
    assert isinstance(future.exception(LONGEST), (pickle.PicklingError, TypeError))
    assert executor.submit(jobs.give, 2).result(LONGEST) == 2


@pytest.mark.parametrize("make_result", [values.make_lock, values.Unpicklable])
def test_result_that_does_not_pickle_fails_its_own_job(
    executor: Executor, make_result: Callable[[], object]
) -> None:
    """In the worker, which goes on."""
    pid = executor.submit(os.getpid).result(LONGEST)
    future = executor.submit(make_result)
    assert isinstance(future.exception(LONGEST), (TypeError, LookupError))
    assert executor.submit(os.getpid).result(LONGEST) == pid


# -- The exception --------------------------------------------------------------------


def test_chain_of_exceptions_is_told_by_the_cause(executor: Executor) -> None:
    """The root of it, what came of it, and where, as the worker's traceback says."""
    script = "try: {}['root']\nexcept KeyError as e: raise ValueError('came') from e"
    error = executor.submit(exec, script).exception(LONGEST)
    assert isinstance(error, ValueError)
    told = str(error.__cause__)
    assert told.index("KeyError: 'root'") < told.index("ValueError: came")
    printed = "".join(traceback.format_exception(error))
    assert printed.index("KeyError: 'root'") < printed.rindex("ValueError: came")


def test_notes_of_an_exception_arrive(executor: Executor) -> None:
    """As its other attributes do."""
    script = "e = ValueError(1); e.add_note('noted'); e.code = 7; raise e"
    error: Any = executor.submit(exec, script).exception(LONGEST)
    # Behind them may stand a note on the job and its outcome.
    assert (error.__notes__[:1], error.code) == (["noted"], 7)


def test_exception_is_the_same_object_each_time(executor: Executor) -> None:
    """As ``Future`` promises; two futures never share one."""
    first = executor.submit(values.raise_, KeyError("key"))
    second = executor.submit(values.raise_, KeyError("key"))
    assert first.exception(LONGEST) is first.exception(LONGEST)
    assert first.exception(LONGEST) is not second.exception(LONGEST)


# -- Callbacks, and waiting for several -----------------------------------------------


def test_callbacks_run_in_this_process(make: MakeAny, gate: Gate) -> None:
    """In a thread of the executor's own when the job was not done before."""
    executor = make(1)
    where: list[tuple[int, threading.Thread]] = []
    future = executor.submit(jobs.wait_at_gate, gate.address)
    future.add_done_callback(
        lambda _: where.append((os.getpid(), threading.current_thread()))
    )
    gate.arrival()
    gate.open()
    ((pid, thread),) = wait_until(lambda: where, "the callback")
    assert pid == os.getpid()
    assert thread is not threading.current_thread()


def test_callback_cannot_submit_after_shutdown(make: MakeAny, gate: Gate) -> None:
    """It is told so, and the shutdown ends."""
    executor = make(1)
    told: list[str] = []

    def again(_future: object) -> None:
        try:
            executor.submit(os.getpid)
        except RuntimeError as exc:
            told.append(str(exc))

    future = executor.submit(jobs.wait_at_gate, gate.address)
    future.add_done_callback(again)
    gate.arrival()
    executor.shutdown(wait=False)
    gate.open()
    assert wait_until(lambda: told, "the refusal") == [
        "cannot schedule new futures after shutdown"
    ]


def test_as_completed_tells_what_is_not_done_in_time(make: MakeAny, gate: Gate) -> None:
    """In the words of the standard library, and after what is done."""
    executor = make(2)
    slow = executor.submit(jobs.wait_at_gate, gate.address)
    gate.arrival()
    fast = executor.submit(jobs.give, 1)
    fast.result(LONGEST)
    done = as_completed([slow, fast, slow], 0)
    assert next(done) is fast
    with pytest.raises(TimeoutError, match=r"1 \(of 2\) futures unfinished"):
        next(done)
    gate.open()
    assert wait([slow, fast, slow], LONGEST, ALL_COMPLETED).done == {slow, fast}


# -- Map ------------------------------------------------------------------------------


@pytest.mark.parametrize("chunksize", [1, 2])
def test_error_of_the_inputs_is_raised_by_map(
    executor: Executor, chunksize: int
) -> None:
    """At once, since all inputs are taken at once."""

    def inputs() -> Iterator[int]:
        yield 1
        raise OSError("the inputs are gone")

    with pytest.raises(OSError, match="the inputs are gone"):
        executor.map(jobs.give, inputs(), chunksize=chunksize)
    assert executor.submit(jobs.give, 2).result(LONGEST) == 2


def test_argument_of_map_that_does_not_pickle_fails_in_its_place(
    executor: Executor,
) -> None:
    """The results before it come first."""
    results = executor.map(jobs.give, [1, values.Unpicklable(), 3])
    assert next(results) == 1
    with pytest.raises(LookupError):
        next(results)


def test_closing_the_results_of_map_cancels_the_rest(
    make: MakeAny, gate: Gate, tmp_path: Path
) -> None:
    """What has not started never runs."""
    record = tmp_path / "record"
    executor = make(1)
    gates = [None, *[gate.address] * 9]
    results: Any = executor.map(partial(values.note_and_wait, record), range(10), gates)
    assert next(results) == 0
    gate.arrival()
    results.close()
    gate.close()
    executor.shutdown()
    # The standard executor has sent two jobs ahead, which fail at the closed gate.
    assert len(record.read_text().split()) <= 4


def test_jobs_of_map_run_although_nobody_takes_the_results(
    make: MakeAny, tmp_path: Path
) -> None:
    """``executor.map(write, rows)`` is a usual way to do something for each row."""
    record = tmp_path / "record"
    with make(1) as executor:
        executor.map(partial(jobs.note, record), range(20))
    assert record.exists()
    assert len(record.read_text().split()) == 20


# -- Workers --------------------------------------------------------------------------


def test_worker_is_replaced_after_its_last_task(make: MakeAny) -> None:
    """Nobody does more; those that failed are counted too."""
    executor = make(1, max_tasks_per_child=2)
    pids = []
    for _ in range(3):
        future = executor.submit(values.raise_, KeyError("key"))
        assert isinstance(future.exception(LONGEST), KeyError)
        pids.append(executor.submit(os.getpid).result(LONGEST))
    assert set(Counter(pids).values()) == {1}


def test_chunk_is_one_task(make: MakeAny) -> None:
    """However many calls it is made of."""
    executor = make(1, max_tasks_per_child=2)
    before = executor.submit(os.getpid).result(LONGEST)
    scripts = ["import os; os.environ['CHUNKS'] = 'seen'"] * 5
    assert list(executor.map(exec, scripts, chunksize=5)) == [None] * 5
    assert executor.submit(os.getpid).result(LONGEST) != before


def test_initializer_that_fails_breaks_the_executor(make: MakeAny) -> None:
    """What waits fails as broken, and so does the next ``submit()``."""
    executor = make(1, initializer=values.raise_, initargs=(KeyError("init"),))
    future = executor.submit(os.getpid)
    assert isinstance(future.exception(LONGEST), BrokenProcessPool)
    with pytest.raises(BrokenProcessPool):
        executor.submit(os.getpid)


def test_forgotten_executor_does_its_jobs_and_ends(kind: str, gate: Gate) -> None:
    """Garbage collection is a shutdown that does not wait."""
    before = worker_pids(), dispatchers()
    executor = standard(1) if kind == "stdlib" else DBPoolExecutor(URL, 1)
    futures = [executor.submit(jobs.wait_at_gate, gate.address, "first")]
    gate.arrival()
    futures += [executor.submit(jobs.give, n) for n in range(3)]
    del executor
    gc.collect()
    gate.open()
    assert [f.result(LONGEST) for f in futures] == ["first", 0, 1, 2]
    wait_until(lambda: (worker_pids(), dispatchers()) == before, "its workers to end")


# -- Differences on purpose, each as the README gives it --------------------------------


def test_one_crash_breaks_the_standard_executor_and_costs_ours_a_job(
    kind: str, make: MakeAny
) -> None:
    """To who waits for the job it is the same class of error."""
    executor = make(1)
    error = executor.submit(os._exit, 3).exception(LONGEST)
    assert isinstance(error, BrokenProcessPool)
    if kind == "stdlib":
        with pytest.raises(BrokenProcessPool):
            executor.submit(jobs.give, 1)
        return
    assert isinstance(error, WorkerDiedError)
    assert error.outcome is Outcome.ROLLED_BACK
    assert executor.submit(jobs.give, 1).result(LONGEST) == 1


@pytest.mark.parametrize(
    ("fn", "args", "ours"),
    [
        (
            jobs.give,
            (values.UnpicklesWith(values.raise_lookup_error),),
            ArgumentsLostError,
        ),
        (values.UnpicklesWith, (values.raise_lookup_error,), ResultLostError),
    ],
    ids=["argument", "result"],
)
def test_value_that_does_not_unpickle_costs_ours_a_job(
    kind: str,
    make: MakeAny,
    fn: Callable[..., object],
    args: tuple[Any, ...],
    ours: type[Exception],
) -> None:
    """And the standard executor everything: both say ``BrokenProcessPool``."""
    executor = make(1)
    error = executor.submit(fn, *args).exception(LONGEST)
    assert isinstance(error, BrokenProcessPool)
    if kind == "stdlib":
        with pytest.raises(BrokenProcessPool):
            executor.submit(jobs.give, 1)
        return
    assert isinstance(error, ours)
    assert executor.submit(jobs.give, 1).result(LONGEST) == 1


@pytest.mark.parametrize("exit_", [SystemExit(3), KeyboardInterrupt()], ids=repr)
def test_exit_of_a_job_is_not_raised_as_itself(
    kind: str, make: MakeAny, exit_: BaseException
) -> None:
    """``result()`` of the standard executor would end the program that asks."""
    future = make(1).submit(values.raise_, exit_)
    error = future.exception(LONGEST)
    if kind == "stdlib":
        assert type(error) is type(exit_)
        return
    assert isinstance(error, JobExitedError)
    assert error.outcome is Outcome.ROLLED_BACK
    assert type(error.__cause__) is type(exit_)


def test_exception_that_does_not_pickle_is_told_all_the_same(
    kind: str, make: MakeAny
) -> None:
    """The standard executor tells that a lock does not pickle, and not what failed."""
    future = make(1).submit(values.raise_called, values.error_with_lock)
    error = future.exception(LONGEST)
    assert type(error) is (TypeError if kind == "stdlib" else ValueError)


def test_mapped_instance_does_not_come_back(kind: str, make: MakeAny) -> None:
    """Of the standard executor it does, detached, and fails at its next attribute."""
    future = make(1).submit(Item, name="item", amount=1)
    if kind == "stdlib":
        assert isinstance(future.result(LONGEST), Item)
        return
    with pytest.raises(NotPlainError, match="return its primary key"):
        future.result(LONGEST)


def test_forked_workers_may_be_replaced(kind: str, make: MakeAny) -> None:
    """Ours keeps what a fork copies out of harm's way; the standard one refuses."""
    options = {
        "max_tasks_per_child": 1,
        "mp_context": multiprocessing.get_context("fork"),
    }
    if kind == "stdlib":
        with pytest.raises(ValueError, match="incompatible with the 'fork'"):
            make(1, **options)
        return
    executor = make(1, **options)
    pids = {executor.submit(os.getpid).result(LONGEST) for _ in range(2)}
    assert len(pids) == 2
