"""Short answers over a pipe, and workers that die after them."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

import faults
import jobs
from dbpool_executor import DBPoolExecutor, WorkerDiedError
from dbpool_executor._forks.ends import make_pipe
from dbpool_executor._wire.calls import dumps_result
from dbpool_executor._wire.short_answers import (
    _ANSWER,
    _MOST,
    AnswerReader,
    AnswerWriter,
)
from processes import MakeExecutor
from servers import Database
from waiting import LONGEST, wait_until


@pytest.fixture
def ends() -> Iterator[tuple[AnswerReader, AnswerWriter]]:
    """The parent's end of a pipe, and the worker's."""
    read, written = make_pipe()
    with read, written:
        yield AnswerReader(read), AnswerWriter(written)


def test_answers_are_read_together(ends: tuple[AnswerReader, AnswerWriter]) -> None:
    """Whatever number there is, in order."""
    reader, writer = ends
    reader.read()
    assert not reader.count
    sent = [(number, number * 1000, dumps_result(number)) for number in range(1, 300)]
    for number, nanoseconds, parts in sent:
        assert writer.write(number, parts, nanoseconds)
    reader.read()
    assert reader.count == len(sent)
    numbers = list(range(1, 300))
    assert reader.take(numbers) == (numbers, sum(numbers) * 1000)
    assert not reader.count
    assert reader.bytes_received == len(sent) * _ANSWER.size


SMALL = [0, 1, -1, 255, 2**31 - 1, -(2**31)]


@pytest.mark.parametrize(
    "values",
    [
        [*SMALL, 2**31],
        [-(2**31) - 1, *SMALL],
        [1, True],
        [None, 1],
        [1, 2.5, "2"],
        [b"\x80\x05J\0\0\0\0.", 1],
    ],
    ids=repr,
)
def test_only_where_all_are_small_numbers_no_answer_is_unpickled(
    ends: tuple[AnswerReader, AnswerWriter], values: list[object]
) -> None:
    """They come without their pickles, and what else comes is what it was."""
    reader, writer = ends
    for answers, are_numbers in ((SMALL, True), (values, False), (SMALL[:1], True)):
        numbers = list(range(1, len(answers) + 1))
        for number, answer in zip(numbers, answers, strict=True):
            assert writer.write(number, dumps_result(answer), 1)
        reader.read()
        taken, _ = reader.take(numbers)
        values_taken = taken if are_numbers else [pickle.loads(p) for p in taken]
        assert list(map(repr, values_taken)) == list(map(repr, answers))
        assert {type(value) for value in taken} == {int if are_numbers else bytes}


@pytest.mark.parametrize(
    "body",
    [b"\x80\x05J\0\0\0\0J\1\0\0\0\x86.", b"\x80\x05C\3abc."],
    ids=["begins as a number does", "ends as a number does"],
)
def test_what_looks_like_a_number_in_part_is_none(
    ends: tuple[AnswerReader, AnswerWriter], body: bytes
) -> None:
    """Our pickler writes neither, but a pickle may be either."""
    reader, writer = ends
    assert writer.write(1, [body], 1)
    reader.read()
    ((taken,), _) = reader.take([1])
    assert isinstance(taken, bytes)
    assert pickle.loads(taken) == pickle.loads(body)


def test_answer_that_was_read_in_part_is_no_answer_yet(
    ends: tuple[AnswerReader, AnswerWriter],
) -> None:
    """A pipe may give any piece of what is in it."""
    reader, writer = ends
    data = b"".join(_ANSWER.pack(n, 7, b"12345") for n in (1, 2))
    for piece in range(len(data)):
        writer._end.send(data[piece : piece + 1])
        reader.read()
        assert reader.count == (piece + 1) // (len(data) // 2)
    assert reader.take([1, 2]) == ([b"12345".ljust(_MOST, b"\0")] * 2, 14)


def test_answers_for_later_jobs_wait(ends: tuple[AnswerReader, AnswerWriter]) -> None:
    """The one before them is answered over the channel."""
    reader, writer = ends
    for number in (1, 2, 4, 5):
        assert writer.write(number, dumps_result(number), 1)
    reader.read()
    assert reader.count == 4
    assert reader.take([1, 2, 3, 4])[0] == [1, 2]
    assert reader.take([3]) == ([], 0)
    assert reader.take([4])[0] == [4]
    assert reader.take([5])[0] == [5]
    assert not reader.count


def test_long_answer_is_refused(ends: tuple[AnswerReader, AnswerWriter]) -> None:
    """It might be written in part; and one with buffers is not for the pipe either."""
    reader, writer = ends
    longest = bytes(range(_MOST))
    assert not writer.write(1, [longest + b"\0"], 1)
    assert not writer.write(1, [b"pickle", b"buffer"], 1)
    assert writer.write(1, [longest], 1)
    assert writer.write(2, [memoryview(b"pickle")], 1)
    reader.read()
    pickles, _ = reader.take([1, 2])
    assert pickles == [longest, b"pickle".ljust(_MOST, b"\0")]


def test_parent_that_is_gone_is_no_error(
    ends: tuple[AnswerReader, AnswerWriter],
) -> None:
    """The worker hears of it over the channel, and ends."""
    reader, writer = ends
    reader.close()
    assert writer.write(1, [b"pickle"], 1)


def test_end_that_is_closed_touches_no_other_file(
    ends: tuple[AnswerReader, AnswerWriter], tmp_path: Path
) -> None:
    """Its number goes to the next one that is opened."""
    reader, writer = ends
    numbers = {reader.fileno(), writer._end.fileno()}
    reader.close()
    writer._end.close()
    path = tmp_path / "of somebody else"
    path.write_bytes(_ANSWER.pack(1, 1, b"pickle"))
    with path.open("r+b") as first, path.open("r+b") as second:
        assert {first.fileno(), second.fileno()} == numbers
        assert writer.write(2, [b"pickle"], 1)
        reader.read()
        assert not reader.count
    assert path.read_bytes() == _ANSWER.pack(1, 1, b"pickle")


# -- With workers ----------------------------------------------------------------------


def in_groups(executor: DBPoolExecutor) -> DBPoolExecutor:
    """Have an executor know that jobs are short, so that they go in groups."""

    def goes_in_groups() -> bool:
        for future in [executor.submit(jobs.give, number) for number in range(300)]:
            future.result(LONGEST)
        return executor._dispatcher._workers._seconds_per_job < 0.001

    wait_until(goes_in_groups, "jobs to go in groups")
    return executor


def test_answers_of_all_kinds_come_to_their_jobs(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """Over the pipe and over the channel in turns; and some are exceptions."""
    executor = in_groups(make_executor(sqlite_database.make_engine, 2))
    lengths = [10, 150, None, 0, 5_000, None, 100, 200_000]
    futures = []
    for number in range(400):
        length = lengths[number * number % 13 % 8]
        if length is None:
            error = LookupError(f"job {number}")
            futures.append(executor.submit(jobs.insert_and_raise, "lost", error))
        else:
            value = number, bytes(length)
            futures.append(executor.submit(jobs.give, value))
    for number, future in enumerate(futures):
        length = lengths[number * number % 13 % 8]
        if length is None:
            with pytest.raises(LookupError, match=rf"(?m)^job {number}$"):
                future.result(LONGEST)
        else:
            assert future.result(LONGEST) == (number, bytes(length))
    wait_until(lambda: executor.stats().idle == 2, "both workers to be idle")
    assert executor.stats().queued == 0


def test_death_costs_no_answer_that_was_given(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """They are in the pipe when the channel ends, and are read before it is judged."""
    executor = in_groups(make_executor(sqlite_database.make_engine, 1))
    for _ in range(5):
        before = [executor.submit(jobs.give, number) for number in range(50)]
        dies = executor.submit(faults.die)
        after = [executor.submit(jobs.give, number) for number in range(50)]
        assert [future.result(LONGEST) for future in before] == list(range(50))
        with pytest.raises(WorkerDiedError):
            dies.result(LONGEST)
        assert [future.result(LONGEST) for future in after] == list(range(50))
