"""``map()``: what it takes when, what it gives, and what it lets go of."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Iterator
from concurrent.futures import CancelledError
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import jobs
import values
from dbpool_executor import DBPoolExecutor
from processes import MakeExecutor
from waiting import LONGEST, Gate, wait_until


@pytest.fixture(scope="module")
def executor() -> Iterator[DBPoolExecutor]:
    """Two workers that live as long as this module's tests."""
    with DBPoolExecutor("sqlite://", max_workers=2) as executor:
        yield executor


class Inputs:
    """Counts from nothing, without an end unless one is given."""

    def __init__(self, end: int | None = None) -> None:
        self.end = end
        self.taken = 0

    def __iter__(self) -> Iterator[int]:
        for number in itertools.count():
            if number == self.end:
                return
            self.taken += 1
            yield number


def test_inputs_are_taken_at_once_without_a_buffer(executor: DBPoolExecutor) -> None:
    """As by the standard library, before the first result is asked for."""
    for chunksize in (1, 3):
        inputs = Inputs(20)
        results = executor.map(jobs.give, inputs, chunksize=chunksize)
        assert inputs.taken == 20
        assert list(results) == list(range(20))


@pytest.mark.parametrize("chunksize", [1, 2, 5])
@pytest.mark.parametrize("buffersize", [1, 2, 7])
def test_endless_inputs_are_taken_as_results_are(
    executor: DBPoolExecutor, buffersize: int, chunksize: int
) -> None:
    """At most ``buffersize`` jobs are ever out, the first of them at once."""
    inputs = Inputs()
    most = buffersize * chunksize
    results = executor.map(
        jobs.give, inputs, buffersize=buffersize, chunksize=chunksize
    )
    assert inputs.taken == most
    for number in range(30):
        assert next(results) == number
        assert inputs.taken - number <= most
        assert inputs.taken > number
    results.close()  # type: ignore[attr-defined]


def test_no_more_jobs_run_than_the_buffer_holds(
    make_executor: MakeExecutor, tmp_path: Path
) -> None:
    """Those that were not submitted cannot have run."""
    record = tmp_path / "record"
    record.touch()
    executor = make_executor("sqlite://", 2)
    results = executor.map(partial(jobs.note, record), Inputs(), buffersize=3)
    for count in range(4):
        assert len(record.read_text().split()) <= count + 3
        next(results)
    executor.shutdown()
    assert len(record.read_text().split()) <= 4 + 3


@pytest.mark.parametrize("buffersize", [20, 21, 1000])
def test_buffer_may_be_larger_than_the_inputs(
    executor: DBPoolExecutor, buffersize: int
) -> None:
    """Then all are taken at once."""
    inputs = Inputs(20)
    results = executor.map(jobs.give, inputs, buffersize=buffersize)
    assert inputs.taken == 20
    assert list(results) == list(range(20))


@pytest.mark.parametrize("options", [{}, {"buffersize": 2}, {"chunksize": 3}])
def test_no_inputs_give_no_results(
    executor: DBPoolExecutor, options: dict[str, Any]
) -> None:
    """An empty iterable, or none at all."""
    assert list(executor.map(jobs.add, [], [1], **options)) == []
    assert list(executor.map(jobs.add, **options)) == []


@pytest.mark.parametrize("chunksize", [1, 2, 3, 100])
def test_shortest_input_ends_them_all(executor: DBPoolExecutor, chunksize: int) -> None:
    """As for the builtin ``map``."""
    results = executor.map(jobs.add, range(5), itertools.count(), chunksize=chunksize)
    assert list(results) == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("chunksize", [1, 4])
def test_results_are_in_order(executor: DBPoolExecutor, chunksize: int) -> None:
    """Of the inputs, whichever worker was faster."""
    results = executor.map(jobs.give, range(300), chunksize=chunksize)
    assert list(results) == list(range(300))


@pytest.mark.parametrize("buffersize", [None, 2])
def test_error_of_a_call_is_raised_in_its_place(
    executor: DBPoolExecutor, buffersize: int | None
) -> None:
    """The results before it come first, and nothing comes after it."""
    job = partial(values.give_or_raise, bad=2)
    results = executor.map(job, range(5), buffersize=buffersize)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(KeyError):
        next(results)
    with pytest.raises(StopIteration):
        next(results)


def test_error_in_a_chunk_is_that_of_the_chunk(executor: DBPoolExecutor) -> None:
    """A chunk is one job: of it there is no other result."""
    job = partial(values.give_or_raise, bad=4)
    results = executor.map(job, range(9), chunksize=3)
    assert list(itertools.islice(results, 3)) == [0, 1, 2]
    with pytest.raises(KeyError):
        next(results)


def test_argument_that_does_not_pickle_fails_in_its_place(
    executor: DBPoolExecutor,
) -> None:
    """As what the call itself would raise."""
    results = executor.map(jobs.give, [1, values.Unpicklable(), 3])
    assert next(results) == 1
    with pytest.raises(LookupError):
        next(results)


@pytest.mark.parametrize("buffersize", [1, 2])
def test_error_of_the_inputs_comes_after_the_results_before_it(
    executor: DBPoolExecutor, buffersize: int
) -> None:
    """What was submitted is not lost because the next input cannot be had."""

    def inputs() -> Iterator[int]:
        yield from range(4)
        raise OSError("the inputs are gone")

    results = executor.map(jobs.give, inputs(), buffersize=buffersize)
    assert list(itertools.islice(results, 4)) == [0, 1, 2, 3]
    with pytest.raises(OSError, match="the inputs are gone"):
        next(results)


@pytest.mark.parametrize("chunksize", [1, 2])
@pytest.mark.parametrize("buffersize", [1, 3])
def test_shutdown_neither_truncates_the_results_nor_hides_itself(
    make_executor: MakeExecutor, buffersize: int, chunksize: int
) -> None:
    """The results of what was submitted come first, then the refusal of the rest."""
    executor = make_executor("sqlite://", 1)
    inputs = Inputs()
    results = executor.map(
        jobs.give, inputs, buffersize=buffersize, chunksize=chunksize
    )
    assert next(results) == 0
    submitted = inputs.taken
    executor.shutdown()
    rest = list(itertools.islice(results, submitted - 1))
    assert rest == list(range(1, submitted))
    with pytest.raises(RuntimeError, match="after shutdown"):
        next(results)
    with pytest.raises(StopIteration):
        next(results)


def test_shutdown_after_the_last_input_ends_the_results_in_peace(
    make_executor: MakeExecutor,
) -> None:
    """Nothing is refused where nothing is left."""
    executor = make_executor("sqlite://", 1)
    results = executor.map(jobs.give, range(5), buffersize=2)
    assert list(itertools.islice(results, 4)) == [0, 1, 2, 3]
    executor.shutdown()
    assert list(results) == [4]


def test_map_after_shutdown_is_refused(make_executor: MakeExecutor) -> None:
    """At once, with a buffer and without."""
    executor = make_executor("sqlite://", 1)
    executor.shutdown()
    for buffersize in (None, 1):
        with pytest.raises(RuntimeError, match="after shutdown"):
            executor.map(jobs.give, range(3), buffersize=buffersize)


# -- What is cancelled --------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"buffersize": 3}])
def test_closing_the_iterator_cancels_what_has_not_started(
    make_executor: MakeExecutor, gate: Gate, tmp_path: Path, options: dict[str, Any]
) -> None:
    """The job that runs goes on, those that wait are never run."""
    record = tmp_path / "record"
    executor = make_executor("sqlite://", 1)
    gates = [None, gate.address, gate.address, gate.address]
    job = partial(values.note_and_wait, record)
    results = executor.map(job, range(4), gates, **options)
    assert next(results) == 0
    gate.arrival()
    results.close()  # type: ignore[attr-defined]
    gate.open()
    executor.shutdown()
    assert record.read_text().split() == ["0", "1"]


@pytest.mark.parametrize("options", [{}, {"buffersize": 3}, {"chunksize": 2}])
def test_closing_an_iterator_that_was_not_begun_cancels_too(
    make_executor: MakeExecutor, gate: Gate, tmp_path: Path, options: dict[str, Any]
) -> None:
    """No result was asked for, and now none will be."""
    record = tmp_path / "record"
    executor = make_executor("sqlite://", 1)
    job = partial(values.note_and_wait, record)
    results = executor.map(job, range(4), [gate.address] * 4, **options)
    gate.arrival()
    results.close()  # type: ignore[attr-defined]
    if "chunksize" in options:  # its chunk is one job, which goes on
        gate.open()
        gate.arrival()
    gate.close()
    executor.shutdown()
    assert record.read_text().split() == ["0", "1"][: options.get("chunksize", 1)]


def test_timeout_counts_from_the_call_and_cancels_the_rest(
    make_executor: MakeExecutor, gate: Gate, tmp_path: Path
) -> None:
    """The iterator raises TimeoutError once, and is then at its end."""
    record = tmp_path / "record"
    executor = make_executor("sqlite://", 1)
    job = partial(values.note_and_wait, record)
    results = executor.map(job, range(4), [gate.address] * 4, timeout=0.01)
    gate.arrival()
    with pytest.raises(TimeoutError):
        next(results)
    with pytest.raises(StopIteration):
        next(results)
    gate.open()
    executor.shutdown()
    assert record.read_text().split() == ["0"]


def test_timeout_cancels_the_job_that_was_waited_for(
    make_executor: MakeExecutor, gate: Gate, tmp_path: Path
) -> None:
    """If it has not started, as those behind it."""
    record = tmp_path / "record"
    executor = make_executor("sqlite://", 1)
    executor.submit(jobs.wait_at_gate, gate.address)
    gate.arrival()
    job = partial(values.note_and_wait, record)
    results = executor.map(job, range(2), [None] * 2, timeout=0.01)
    with pytest.raises(TimeoutError):
        next(results)
    gate.open()
    executor.shutdown()
    assert not record.exists()


def test_timeout_that_is_not_reached_changes_nothing(executor: DBPoolExecutor) -> None:
    """Nor does one that is over when every result is there."""
    results = executor.map(jobs.give, range(10), timeout=LONGEST)
    assert list(results) == list(range(10))


def test_error_cancels_what_has_not_started(
    make_executor: MakeExecutor, gate: Gate, tmp_path: Path
) -> None:
    """As by the standard library: who gets an error gets no more results."""
    record = tmp_path / "record"
    executor = make_executor("sqlite://", 1)
    job = partial(values.note_and_raise_or_wait, record)
    results = executor.map(job, range(4), [None, *[gate.address] * 3])
    with pytest.raises(KeyError):
        next(results)
    gate.arrival()
    gate.open()
    executor.shutdown()
    assert record.read_text().split() == ["0", "1"]


def test_cancelled_executor_cancels_the_iterator(
    make_executor: MakeExecutor, gate: Gate
) -> None:
    """``cancel_futures`` reaches what a map has submitted."""
    executor = make_executor("sqlite://", 1)
    results = executor.map(jobs.wait_at_gate, [gate.address] * 3, "abc")
    gate.arrival()
    executor.shutdown(wait=False, cancel_futures=True)
    gate.open()
    assert next(results) == "a"
    with pytest.raises(CancelledError):
        next(results)


# -- What is kept ---------------------------------------------------------------------


@pytest.mark.parametrize("chunksize", [1, 3])
@pytest.mark.parametrize("buffersize", [None, 1, 2])
def test_no_result_is_kept_that_was_given(
    executor: DBPoolExecutor, buffersize: int | None, chunksize: int
) -> None:
    """When the caller lets go of a result, nobody holds it."""
    given = 0
    for thing in executor.map(
        values.make_thing, range(6), buffersize=buffersize, chunksize=chunksize
    ):
        reference = weakref.ref(thing)
        del thing
        gc.collect()
        wait_until(partial(_is_dead, reference), f"result {given} is collected")
        given += 1
    assert given == 6


def _is_dead(reference: weakref.ref[Any]) -> bool:
    return reference() is None


def test_iterator_that_is_forgotten_is_collected(executor: DBPoolExecutor) -> None:
    """Half read, with results that nobody will take."""
    results = executor.map(values.make_thing, range(50), buffersize=4)
    next(results)
    reference = weakref.ref(results)
    del results
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("chunksize", [0, -1])
def test_chunksize_below_one_is_refused(
    executor: DBPoolExecutor, chunksize: int
) -> None:
    """Before any input is taken."""
    inputs = Inputs()
    with pytest.raises(ValueError, match="chunksize must be >= 1"):
        executor.map(jobs.give, inputs, chunksize=chunksize)
    assert inputs.taken == 0


@pytest.mark.parametrize(
    ("buffersize", "error"),
    [(0, ValueError), (-1, ValueError), (1.5, TypeError), ("2", TypeError)],
)
def test_buffersize_that_makes_no_sense_is_refused(
    executor: DBPoolExecutor, buffersize: Any, error: type[Exception]
) -> None:
    """As by Python 3.14."""
    inputs = Inputs()
    with pytest.raises(error, match="buffersize"):
        executor.map(jobs.give, inputs, buffersize=buffersize)
    assert inputs.taken == 0
