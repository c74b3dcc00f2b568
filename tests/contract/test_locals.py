"""What a caller has at hand is let go of when it returns, without a collection."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import suppress
from typing import Any, NoReturn

import pytest
import sqlalchemy

import jobs
from dbpool_executor import DBPoolExecutor
from processes import MakeExecutor
from servers import Database
from waiting import LONGEST, wait_until


class Held:
    """Is in a local variable of a caller."""


class DoesNotPickle:
    """Raises where it is pickled."""

    def __reduce__(self) -> NoReturn:
        raise ValueError("no")


def reads_map(executor: DBPoolExecutor) -> None:
    """To its end, and beyond."""
    for options in ({}, {"chunksize": 2}, {"buffersize": 1}):
        results = executor.map(jobs.give, range(3), **options)
        assert list(results) == [0, 1, 2]
        assert next(results, None) is None


def reads_map_of_failing(executor: DBPoolExecutor) -> None:
    """In chunks, too."""
    for chunksize in (1, 2):
        with suppress(ZeroDivisionError):
            list(executor.map(divmod, [1, 1], [1, 0], chunksize=chunksize))


def maps_what_raises(executor: DBPoolExecutor) -> None:
    """The iterable itself."""

    def numbers() -> Iterator[int]:
        yield 1
        raise LookupError

    with suppress(LookupError):
        list(executor.map(jobs.give, numbers(), buffersize=1))


def reads_failure(executor: DBPoolExecutor) -> None:
    """From a future that is not kept."""
    with suppress(ZeroDivisionError):
        executor.submit(divmod, 1, 0).result(LONGEST)


def gives_up(executor: DBPoolExecutor) -> None:
    """After no time at all."""
    with suppress(TimeoutError):
        executor.submit(jobs.give, 1).result(0)


def cancels(executor: DBPoolExecutor) -> None:
    """And asks for the result."""
    some = [executor.submit(jobs.give, number) for number in range(50)]
    for future in some:
        future.cancel()
        with suppress(CancelledError):
            future.result(LONGEST)


def submits_what_does_not_pickle(executor: DBPoolExecutor) -> None:
    """Nor is it plain."""
    engine = sqlalchemy.create_engine("sqlite://")
    for culprit in (DoesNotPickle(), engine, lambda: 1, [{"inside": engine}]):
        kept.append(executor.submit(jobs.give, [Held(), culprit]))
        assert kept[-1].exception(LONGEST) is not None


def makes_what_does_not_pickle(_: DBPoolExecutor) -> None:
    """Arguments of the constructor."""
    for initargs in ((Held(), DoesNotPickle()), (Held(), lambda: 1)):
        with suppress(TypeError):
            DBPoolExecutor("sqlite://", 1, initializer=print, initargs=initargs)
    with suppress(TypeError):
        DBPoolExecutor(lambda: None, 1)  # type: ignore[arg-type, return-value]


def submits_too_late(_: DBPoolExecutor) -> None:
    """Both ways."""
    executor = DBPoolExecutor("sqlite://", 1)
    executor.shutdown()
    with suppress(RuntimeError):
        executor.submit(jobs.give, 1)
    with suppress(RuntimeError):
        list(executor.map(jobs.give, [1]))


kept: list[Any] = []  # not let go of


@pytest.mark.parametrize(
    "call",
    [
        reads_map,
        reads_map_of_failing,
        maps_what_raises,
        reads_failure,
        gives_up,
        cancels,
        submits_what_does_not_pickle,
        makes_what_does_not_pickle,
        submits_too_late,
    ],
)
def test_callers_locals_are_let_go_of(
    sqlite_database: Database,
    make_executor: MakeExecutor,
    call: Callable[[DBPoolExecutor], None],
) -> None:
    """No cycle holds the frame that has called, whatever came of it."""
    executor = make_executor(sqlite_database.make_engine, 1)
    executor.submit(jobs.give, 1).result(LONGEST)

    def caller() -> weakref.ref[Held]:
        held = Held()
        call(executor)
        return weakref.ref(held)

    gc.collect()
    gc.disable()
    try:
        ref = caller()
        wait_until(lambda: ref() is None, "the dispatcher to let go")
    finally:
        gc.enable()
        kept.clear()


def test_results_of_a_map_do_not_keep_a_forgotten_executor(
    sqlite_database: Database,
) -> None:
    """Nothing more is submitted then, and the results of what was are there."""
    gc.collect()
    gc.disable()
    try:
        executor = DBPoolExecutor(sqlite_database.make_engine, 1)
        results = executor.options(retries=1).map(jobs.give, range(9), buffersize=2)
        ref = weakref.ref(executor)
        del executor
        assert ref() is None
        assert [next(results), next(results)] == [0, 1]
        with pytest.raises(RuntimeError, match="after shutdown"):
            next(results)
    finally:
        gc.enable()
