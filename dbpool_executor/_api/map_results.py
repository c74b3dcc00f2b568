"""The results of ``map()``, in order, as they are asked for.

Runs in the parent. Classes and not generators: a generator that was never begun does
nothing when it is closed, and here close() must cancel what has not started.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Generic, NoReturn, TypeVar

T = TypeVar("T")


class Results(Iterator[T], Generic[T]):
    """Gives the result of each job, and submits the next one when one is taken.

    Args:
        jobs: Submits a job at each step.
        buffersize: How many to submit at once, now; None for all.
        deadline: On ``time.monotonic()``, for all of them; None for no bound.
    """

    def __init__(
        self,
        jobs: Iterator[Future[T]],
        buffersize: int | None,
        deadline: float | None,
    ) -> None:
        self._jobs = jobs
        self._deadline = deadline
        self._stopped: Exception | None = None  # what the submitting ended with
        self._owes_one = False  # a result was taken since the last was submitted
        self._is_begun = False  # a result was asked for
        self._futures: deque[Future[T]] = deque()
        self._futures.extend(itertools.islice(jobs, buffersize))

    def __next__(self) -> T:
        self._is_begun = True
        try:
            if self._owes_one and self._stopped is None:
                self._submit_next()
            if not self._futures:
                self._stop()
            self._owes_one = True
            return _result(self._futures.popleft(), self._deadline)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Cancel what has not started, and end."""
        while self._futures:
            self._futures.popleft().cancel()
        self._jobs = iter(())

    def __del__(self) -> None:
        # executor.map(write, rows) is a usual way to do something for each row: who has
        # asked for no result wants none, and the jobs done. It is missing if the
        # arguments of map() raised.
        if getattr(self, "_is_begun", False):
            self.close()

    def _stop(self) -> NoReturn:
        if self._stopped is None:
            raise StopIteration
        try:
            raise self._stopped
        finally:
            self._stopped = None  # else its traceback and this hold each other

    def _submit_next(self) -> None:
        self._owes_one = False
        try:
            self._futures.extend(itertools.islice(self._jobs, 1))
        except Exception as exc:
            # The results of what was submitted come first.
            self._stopped = exc


class ChunkResults(Iterator[T], Generic[T]):
    """Gives the results of each chunk one by one.

    Args:
        chunks: Gives a chunk's results at each step.
    """

    def __init__(self, chunks: Results[list[T]]) -> None:
        self._chunks = chunks
        self._items: list[T] = []  # of the chunk, the last one first

    def __next__(self) -> T:
        while not self._items:
            self._items = next(self._chunks)
            self._items.reverse()
        return self._items.pop()

    def close(self) -> None:
        """Cancel what has not started, and end."""
        self._items.clear()
        self._chunks.close()


def _result(future: Future[T], deadline: float | None) -> T:
    try:
        if deadline is None:
            return future.result()
        return future.result(deadline - time.monotonic())
    except BaseException:
        future.cancel()  # it may be the time that was up
        raise
    finally:
        del future  # else the traceback and this frame hold each other
