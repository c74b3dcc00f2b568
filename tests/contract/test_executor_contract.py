"""What every executor of processes does: the standard library's, and ours.

The first column shows that a test is right, the second that we are.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import socket
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import (
    ALL_COMPLETED,
    FIRST_COMPLETED,
    FIRST_EXCEPTION,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    as_completed,
    wait,
)
from functools import partial
from typing import Any, TypeAlias

import pytest

import jobs
import values
from dbpool_executor import DBPoolExecutor
from processes import MakeExecutor, worker_pids
from waiting import LONGEST, Gate, wait_until

MakeAny: TypeAlias = Callable[..., Executor]

KINDS = ["stdlib", "dbpool"]
URL = "sqlite://"


def standard(max_workers: int, **options: Any) -> ProcessPoolExecutor:
    """Make the standard executor, with our default start method."""
    options.setdefault("mp_context", multiprocessing.get_context("forkserver"))
    return ProcessPoolExecutor(max_workers, **options)


@pytest.fixture(params=KINDS)
def make(
    request: pytest.FixtureRequest, make_executor: MakeExecutor
) -> Iterator[MakeAny]:
    """Makes executors of either kind, and shuts them down."""
    if request.param == "dbpool":
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
    """Two workers of either kind, for tests that leave them as they were."""
    made = DBPoolExecutor(URL, 2) if request.param == "dbpool" else standard(2)
    with made as executor:
        yield executor


# -- The call -----------------------------------------------------------------------


def test_every_keyword_reaches_the_job(executor: Executor) -> None:
    """Those too that are names of the executor's own parameters."""
    kwargs: dict[str, Any] = dict.fromkeys(
        [
            "self", "fn", "args", "kwargs", "timeout", "chunksize", "buffersize",
            "commit", "retries", "executor", "future", "job",
        ],
        1,
    )  # fmt: skip
    future = executor.submit(values.identity, 1, 2, **kwargs)
    assert future.result(LONGEST) == ((1, 2), kwargs)


@pytest.mark.parametrize(
    ("fn", "args", "result"),
    [
        (len, ("abc",), 3),
        (str.upper, ("abc",), "ABC"),
        ("abc".upper, (), "ABC"),
        (partial(jobs.add, b=2), (1,), 3),
        (values.Pair, (1, 2), values.Pair(1, 2)),
        (values.Thing(a=1).method, (), {"a": 1}),
        (dict, ((("a", 1),),), {"a": 1}),
    ],
)
def test_every_kind_of_callable_is_a_job(
    executor: Executor, fn: Any, args: tuple[Any, ...], result: object
) -> None:
    """Builtin functions, methods, partials, classes."""
    assert executor.submit(fn, *args).result(LONGEST) == result


def test_jobs_run_in_another_process(executor: Executor) -> None:
    """Not in this one."""
    assert executor.submit(os.getpid).result(LONGEST) != os.getpid()


def test_results_are_those_of_their_own_jobs(executor: Executor) -> None:
    """Of five hundred, each has its own."""
    futures = [executor.submit(jobs.add, n, n) for n in range(500)]
    assert [f.result(LONGEST) for f in futures] == [2 * n for n in range(500)]


def test_jobs_may_be_submitted_by_many_threads(executor: Executor) -> None:
    """At once, and each gets what it asked for."""
    results: dict[int, list[int]] = {}

    def submit(thread: int) -> None:
        futures = [executor.submit(jobs.add, thread, n) for n in range(50)]
        results[thread] = [future.result(LONGEST) for future in futures]

    threads = [threading.Thread(target=submit, args=(n * 100,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {
        thread: list(range(thread, thread + 50)) for thread in range(0, 400, 100)
    }


def test_large_values_cross_whatever_the_default_timeout_of_sockets(
    make: MakeAny,
) -> None:
    """A program's ``socket.setdefaulttimeout()`` means its own sockets."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(0.1)
    try:
        executor = make(1)
        blocks = [bytes([n]) * 3_000_000 for n in range(3)]
        for block in blocks:
            assert executor.submit(jobs.give, block).result(LONGEST) == block
    finally:
        socket.setdefaulttimeout(before)


# -- The future ----------------------------------------------------------------------


def test_future_tells_the_state_of_its_job(make: MakeAny, gate: Gate) -> None:
    """Running while it runs, done when it is done, and patient meanwhile."""
    future = make(1).submit(jobs.wait_at_gate, gate.address, "value")
    gate.arrival()
    assert (future.running(), future.done(), future.cancelled()) == (True, False, False)
    assert not future.cancel()
    with pytest.raises(TimeoutError):
        future.result(0)
    with pytest.raises(TimeoutError):
        future.exception(0)
    gate.open()
    assert future.result(LONGEST) == "value"
    assert future.exception() is None
    assert (future.running(), future.done(), future.cancelled()) == (False, True, False)
    assert future.result() == "value"


@pytest.mark.parametrize(
    "error",
    [
        ValueError("text", 5),
        FileNotFoundError(2, "no such file", "/a"),
        KeyError("key"),
        CancelledError(),
        TimeoutError("of the job's own"),
        ExceptionGroup("group", [ValueError(1)]),
    ],
    ids=repr,
)
def test_exception_of_the_job_is_raised(executor: Executor, error: Exception) -> None:
    """As itself, with its arguments, and the traceback of the worker as its cause."""
    future = executor.submit(values.raise_, error)
    raised = future.exception(LONGEST)
    assert type(raised) is type(error)
    assert str(raised) == str(error)
    assert "in raise_" in str(raised.__cause__)
    with pytest.raises(type(error)) as caught:
        future.result(LONGEST)
    assert caught.value is raised


def test_job_that_is_no_callable_fails(executor: Executor) -> None:
    """Where the call is made, which is not here."""
    future: Future[Any] = executor.submit(5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="callable"):
        future.result(LONGEST)


def test_failures_do_no_harm_to_their_neighbours(executor: Executor) -> None:
    """Every second job raises."""
    futures = [
        executor.submit(values.give_or_raise, n, n if n % 2 else -1) for n in range(40)
    ]
    errors = [type(future.exception(LONGEST)) for future in futures]
    assert errors == [type(None), KeyError] * 20


# -- Callbacks ------------------------------------------------------------------------


def test_callbacks_are_called_once_with_their_future(make: MakeAny, gate: Gate) -> None:
    """In the order in which they were added; later ones at once."""
    called: list[tuple[int, Future[Any]]] = []

    def call(number: int, future: Future[Any]) -> None:
        called.append((number, future))

    future = make(1).submit(jobs.wait_at_gate, gate.address)
    for number in range(3):
        future.add_done_callback(partial(call, number))
    gate.arrival()
    assert called == []
    gate.open()
    future.result(LONGEST)
    wait_until(lambda: len(called) == 3, "three callbacks")
    future.add_done_callback(partial(call, 3))
    assert called == [(number, future) for number in range(4)]


def test_callback_that_raises_is_logged_and_forgotten(
    make: MakeAny, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    """The other callbacks are called, and the executor goes on."""
    executor = make(1)
    called = threading.Event()
    future = executor.submit(jobs.wait_at_gate, gate.address)
    future.add_done_callback(lambda _: values.raise_(ValueError("of a callback")))
    future.add_done_callback(lambda _: called.set())
    gate.arrival()
    gate.open()
    assert called.wait(LONGEST)
    assert executor.submit(jobs.add, 1, 2).result(LONGEST) == 3
    assert "of a callback" in caplog.text


def test_callback_may_submit_again(make: MakeAny) -> None:
    """A chain of jobs, each submitted by the callback of the one before it."""
    executor = make(1)
    results: list[int] = []
    done = threading.Event()

    def again(future: Future[int]) -> None:
        results.append(future.result())
        if len(results) == 20:
            done.set()
        else:
            executor.submit(jobs.add, results[-1], 1).add_done_callback(again)

    executor.submit(jobs.add, 0, 0).add_done_callback(again)
    assert done.wait(LONGEST)
    assert results == list(range(20))


def test_callback_of_a_cancelled_job_is_called(make: MakeAny, gate: Gate) -> None:
    """By who cancels it."""
    executor = make(1)
    futures = [executor.submit(jobs.wait_at_gate, gate.address)]
    gate.arrival()
    futures += [executor.submit(jobs.add, 1, n) for n in range(10)]
    called: list[bool] = []
    futures[-1].add_done_callback(lambda f: called.append(f.cancelled()))
    assert futures[-1].cancel()
    assert called == [True]


# -- Waiting for several ---------------------------------------------------------------


def test_as_completed_gives_each_future_once(executor: Executor) -> None:
    """All of them, those that failed too."""
    futures = [executor.submit(values.give_or_raise, n, 3) for n in range(30)]
    given = list(as_completed(futures, LONGEST))
    assert len(given) == 30
    assert set(given) == set(futures)


def test_as_completed_gives_first_what_is_done_first(make: MakeAny, gate: Gate) -> None:
    """A job that is stuck does not hold up what was submitted after it."""
    executor = make(2)
    slow = executor.submit(jobs.wait_at_gate, gate.address)
    gate.arrival()
    fast = executor.submit(jobs.add, 1, 2)
    done = as_completed([slow, fast], LONGEST)
    assert next(done) is fast
    assert not slow.done()
    gate.open()
    assert next(done) is slow


def test_as_completed_hears_of_cancelled_jobs(make: MakeAny, gate: Gate) -> None:
    """As of those that are done."""
    executor = make(1)
    futures = [executor.submit(jobs.wait_at_gate, gate.address)]
    gate.arrival()
    futures += [executor.submit(jobs.add, 1, n) for n in range(10)]
    futures[5].cancel()
    gate.open()
    assert set(as_completed(futures, LONGEST)) == set(futures)
    assert [n for n, future in enumerate(futures) if future.cancelled()] == [5]


def test_as_completed_hears_of_jobs_that_a_shutdown_cancels(
    make_executor: MakeExecutor, gate: Gate
) -> None:
    """Ours only: the standard executor lets it wait for ever (Python 3.11 to 3.13)."""
    executor = make_executor(URL, 1)
    futures = [executor.submit(jobs.wait_at_gate, gate.address)]
    gate.arrival()
    futures += [executor.submit(jobs.add, 1, n) for n in range(10)]
    executor.shutdown(wait=False, cancel_futures=True)
    gate.open()
    assert set(as_completed(futures, LONGEST)) == set(futures)
    assert [future.cancelled() for future in futures] == [False, *[True] * 10]


def test_wait_returns_when_what_it_waits_for_is_there(
    make: MakeAny, gate: Gate
) -> None:
    """The first that is done, the first that failed, or all."""
    executor = make(2)
    slow = executor.submit(jobs.wait_at_gate, gate.address)
    gate.arrival()
    fast = executor.submit(jobs.add, 1, 2)
    done, rest = wait([slow, fast], LONGEST, FIRST_COMPLETED)
    assert (done, rest) == ({fast}, {slow})
    bad = executor.submit(values.raise_, ValueError("bad"))
    done, rest = wait([slow, bad], LONGEST, FIRST_EXCEPTION)
    assert (done, rest) == ({bad}, {slow})
    done, rest = wait([slow], 0, ALL_COMPLETED)
    assert (done, rest) == (set(), {slow})
    gate.open()
    done, rest = wait([slow, fast, bad], LONGEST, ALL_COMPLETED)
    assert (done, rest) == ({slow, fast, bad}, set())


def test_futures_of_both_kinds_can_be_waited_for_together(
    make_executor: MakeExecutor,
) -> None:
    """They are the same class of future to whoever waits."""
    ours = make_executor(URL, 1)
    with standard(1) as theirs:
        futures = [e.submit(jobs.add, 1, 2) for e in (ours, theirs) for _ in range(3)]
        assert all(isinstance(future, Future) for future in futures)
        done, rest = wait(futures, LONGEST)
    assert rest == set()
    assert {future.result() for future in done} == {3}


# -- Cancelling ----------------------------------------------------------------------


def test_job_that_waits_can_be_cancelled(make: MakeAny, gate: Gate) -> None:
    """It never runs, and its neighbours do."""
    executor = make(1)
    first = executor.submit(jobs.wait_at_gate, gate.address, "first")
    gate.arrival()
    others = [executor.submit(jobs.add, 1, n) for n in range(10)]
    assert others[8].cancel()
    assert others[8].cancelled()
    assert others[8].cancel()
    with pytest.raises(CancelledError):
        others[8].result(LONGEST)
    gate.open()
    assert first.result(LONGEST) == "first"
    assert wait(others, LONGEST).not_done == set()
    del others[8]
    assert [f.result() for f in others] == [n + 1 for n in range(10) if n != 8]


def test_job_that_is_done_cannot_be_cancelled(executor: Executor) -> None:
    """It stays as it is."""
    future = executor.submit(jobs.add, 1, 2)
    future.result(LONGEST)
    assert not future.cancel()
    assert future.result() == 3


# -- Workers ---------------------------------------------------------------------------


def test_as_many_jobs_run_at_once_as_there_may_be_workers(
    make: MakeAny, gate: Gate
) -> None:
    """Three meet at a gate, in three processes, and a fourth comes only later."""
    executor = make(3)
    futures = [executor.submit(jobs.wait_at_gate, gate.address, n) for n in range(4)]
    pids = [gate.arrival() for _ in range(3)]
    assert len({os.getpid(), *pids}) == 4
    assert [future.done() for future in futures] == [False] * 4
    gate.open()
    assert gate.arrival() in pids
    gate.open()
    assert [future.result(LONGEST) for future in futures] == [0, 1, 2, 3]


def test_workers_are_started_on_demand(make: MakeAny, gate: Gate) -> None:
    """None by the constructor, and one more for each job that finds none idle."""
    before = worker_pids()
    executor = make(3)
    assert worker_pids() == before
    futures = []
    for count in (1, 2, 3):
        futures.append(executor.submit(jobs.wait_at_gate, gate.address))
        gate.arrival()
        assert len(worker_pids() - before) == count
    gate.open()
    wait(futures, LONGEST)
    assert len(worker_pids() - before) == 3


def test_idle_worker_is_used_before_a_new_one_is_started(
    make_executor: MakeExecutor,
) -> None:
    """Ours only: the standard executor frees a worker a moment after its result."""
    executor = make_executor(URL, 4)
    before = worker_pids()
    pids = {executor.submit(os.getpid).result(LONGEST) for _ in range(20)}
    assert len(pids) == 1
    assert worker_pids() - before == pids


def test_forked_workers_are_started_all_at_once(make_executor: MakeExecutor) -> None:
    """Ours: at the first job, before there is a thread whose locks they could hold."""
    context = multiprocessing.get_context("fork")
    executor = make_executor(URL, 3, context)
    before = worker_pids()
    executor.submit(os.getpid).result(LONGEST)
    assert len(worker_pids() - before) == 3


def test_initializer_runs_in_each_worker(make: MakeAny, gate: Gate) -> None:
    """Once, before the worker's first job."""
    executor = make(2, initializer=values.remember, initargs=("word",))
    futures = [executor.submit(jobs.wait_at_gate, gate.address) for _ in range(2)]
    assert len({gate.arrival(), gate.arrival()}) == 2
    gate.open()
    wait(futures, LONGEST)
    for _ in range(4):
        assert executor.submit(values.remembered).result(LONGEST) == ["word"]


# -- Map (more of it in test_map) --------------------------------------------------


@pytest.mark.parametrize("chunksize", [1, 7])
def test_map_gives_results_in_order(executor: Executor, chunksize: int) -> None:
    """Of the inputs, and only as many as the shortest has."""
    results = executor.map(jobs.add, range(100), range(200), chunksize=chunksize)
    assert list(results) == list(range(0, 200, 2))


def test_map_raises_in_place(executor: Executor) -> None:
    """What comes before is given."""
    results = executor.map(partial(values.give_or_raise, bad=2), range(4))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(KeyError):
        next(results)


def test_map_takes_all_inputs_at_once(executor: Executor) -> None:
    """Before the first result is asked for."""
    taken: list[int] = []

    def inputs() -> Iterator[int]:
        for number in range(5):
            taken.append(number)
            yield number

    results = executor.map(jobs.give, inputs())
    assert taken == [0, 1, 2, 3, 4]
    assert list(results) == taken


def test_map_gives_up_after_its_timeout(make: MakeAny, gate: Gate) -> None:
    """Counted from the call."""
    executor = make(1)
    results = executor.map(jobs.wait_at_gate, [gate.address] * 2, timeout=0.01)
    gate.arrival()
    with pytest.raises(TimeoutError):
        next(results)


def test_map_refuses_a_chunksize_below_one(executor: Executor) -> None:
    """With the same error."""
    with pytest.raises(ValueError, match="chunksize must be >= 1"):
        executor.map(jobs.give, range(3), chunksize=0)


# -- Shutting down -----------------------------------------------------------------


def test_shutdown_waits_for_what_was_submitted(make: MakeAny) -> None:
    """All of it is done when it returns, and none is lost."""
    before = worker_pids()
    with make(2) as executor:
        futures = [executor.submit(jobs.add, 1, n) for n in range(50)]
    assert [future.done() for future in futures] == [True] * 50
    assert [future.result() for future in futures] == list(range(1, 51))
    assert worker_pids() - before == set()


def test_shutdown_without_waiting_returns_at_once(make: MakeAny, gate: Gate) -> None:
    """And what was submitted is done all the same."""
    executor = make(1)
    futures = [executor.submit(jobs.wait_at_gate, gate.address, "first")]
    gate.arrival()
    futures += [executor.submit(jobs.give, n) for n in range(5)]
    executor.shutdown(wait=False)
    assert not futures[0].done()
    gate.open()
    assert [f.result(LONGEST) for f in futures] == ["first", 0, 1, 2, 3, 4]


def test_shutdown_may_cancel_what_waits(make: MakeAny, gate: Gate) -> None:
    """The job that runs is done, the last of the queue is cancelled."""
    executor = make(1)
    futures = [executor.submit(jobs.wait_at_gate, gate.address, "first")]
    gate.arrival()
    futures += [executor.submit(jobs.give, n) for n in range(10)]
    executor.shutdown(wait=False, cancel_futures=True)
    gate.open()
    assert futures[0].result(LONGEST) == "first"
    with pytest.raises(CancelledError):
        futures[-1].result(LONGEST)


@pytest.mark.parametrize("used", [False, True])
def test_executor_that_was_shut_down_takes_no_more(make: MakeAny, used: bool) -> None:
    """Whether it ever had a job or not; a second shutdown is no mistake."""
    executor = make(1)
    if used:
        executor.submit(jobs.add, 1, 2).result(LONGEST)
    executor.shutdown()
    words = "cannot schedule new futures after shutdown"
    with pytest.raises(RuntimeError, match=words):
        executor.submit(jobs.add, 1, 2)
    with pytest.raises(RuntimeError, match=words):
        executor.map(jobs.give, [1])
    executor.shutdown()
    executor.shutdown(wait=False, cancel_futures=True)


def test_exception_in_the_with_block_is_not_swallowed(make: MakeAny) -> None:
    """And what was submitted is done by then."""
    executor = make(1)
    futures: list[Future[int]] = []

    def use() -> None:
        with executor:
            futures.append(executor.submit(jobs.add, 1, 2))
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        use()
    assert futures[0].done()


def test_nothing_of_a_finished_job_is_kept(make: MakeAny) -> None:
    """Neither its arguments nor its result, once the caller has let go of them."""
    executor = make(1)
    argument = values.Thing(a=1)
    future = executor.submit(jobs.give, argument)
    result = future.result(LONGEST)
    references = [weakref.ref(o) for o in (argument, result, future)]
    del argument, result, future
    gc.collect()
    wait_until(lambda: not any(r() for r in references), "all is collected")


# -- asyncio ---------------------------------------------------------------------------


def test_event_loop_runs_jobs(executor: Executor) -> None:
    """By ``run_in_executor`` and by ``wrap_future``, several at once."""

    async def main() -> tuple[list[int], int, BaseException | None]:
        loop = asyncio.get_running_loop()
        sums = [loop.run_in_executor(executor, jobs.add, n, n) for n in range(10)]
        wrapped = asyncio.wrap_future(executor.submit(jobs.add, 1, 2))
        failed = loop.run_in_executor(executor, values.raise_, KeyError("key"))
        async with asyncio.timeout(LONGEST):
            error = (await asyncio.gather(failed, return_exceptions=True))[0]
            return await asyncio.gather(*sums), await wrapped, error

    results, wrapped, error = asyncio.run(main())
    assert (results, wrapped) == ([2 * n for n in range(10)], 3)
    assert repr(error) == "KeyError('key')"


def test_task_that_is_cancelled_cancels_the_job_that_waits(
    make: MakeAny, gate: Gate
) -> None:
    """And leaves the one that runs alone."""
    executor = make(1)

    async def main() -> tuple[bool, bool, str]:
        running = executor.submit(jobs.wait_at_gate, gate.address, "ran")
        await asyncio.to_thread(gate.arrival)
        waiting = [executor.submit(jobs.add, 1, n) for n in range(10)]
        task = asyncio.ensure_future(asyncio.wrap_future(waiting[-1]))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        impatient = asyncio.ensure_future(asyncio.wrap_future(running))
        await asyncio.sleep(0)
        impatient.cancel()
        with pytest.raises(asyncio.CancelledError):
            await impatient
        gate.open()
        result = await asyncio.to_thread(running.result, LONGEST)
        return waiting[-1].cancelled(), running.cancelled(), result

    assert asyncio.run(main()) == (True, False, "ran")


def test_failure_in_a_task_group_is_raised_and_the_rest_cancelled(
    make: MakeAny, gate: Gate
) -> None:
    """The structured way to wait for jobs."""
    executor = make(1)
    futures: list[Future[Any]] = []

    async def main() -> None:
        async with asyncio.timeout(LONGEST), asyncio.TaskGroup() as group:

            async def run(fn: Callable[..., Any], *args: Any) -> Any:
                futures.append(executor.submit(fn, *args))
                return await asyncio.wrap_future(futures[-1])

            group.create_task(run(values.raise_, KeyError("bad")))
            for _ in range(10):
                group.create_task(run(jobs.wait_at_gate, gate.address))

    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(main())
    assert [type(error) for error in caught.value.exceptions] == [KeyError]
    gate.close()
    assert futures[-1].cancelled()
    wait(futures, LONGEST)
