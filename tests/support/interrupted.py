"""A program that is interrupted again and again, and goes on.

    python interrupted.py CALL TIMES SEED

A handler of SIGALRM raises, after a random time, once or several times in a row, while
CALL is made over and over. After each interrupt all that was submitted must still come
to its end, and a new job must be done. Prints how often it was interrupted.
"""

from __future__ import annotations

import faulthandler
import gc
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import (
    FIRST_COMPLETED,
    FIRST_EXCEPTION,
    Future,
    as_completed,
    wait,
)
from types import FrameType
from typing import Any

from dbpool_executor import DBPoolExecutor

LONGEST = 30.0  # seconds, after which something hangs
EXIT_HANGS = 3
URL = "sqlite://"


class Strike(Exception):
    """What the handler raises; also where ``except Exception`` is about."""


class Interrupts:
    """Raises in the main thread, some time after it was armed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._left = 0  # how often it still raises
        self._seconds = 0.0
        self.count = 0
        signal.signal(signal.SIGALRM, self._strike)

    def _strike(self, _number: int, frame: FrameType | None) -> None:
        if not self._left:
            return
        while frame is not None and frame.f_code not in CODES:
            frame = frame.f_back
        # Only inside of a call: what this program does around it is not on trial.
        if frame is None:
            signal.setitimer(signal.ITIMER_REAL, self._seconds)
            return
        self._left -= 1
        self.count += 1
        if self._left:
            # Into what is done because of this one.
            signal.setitimer(signal.ITIMER_REAL, self._random.uniform(1e-6, 1e-4))
        raise Strike

    def during(self, call: Callable[[], object]) -> None:
        """Call something until it was interrupted."""
        before = self.count
        most = self._random.choice((0.0002, 0.001, 0.005))
        self._seconds = self._random.uniform(0.0001, most)
        self._left = self._random.choice((1, 1, 2, 3))
        signal.setitimer(signal.ITIMER_REAL, self._seconds)
        while self.count == before:
            try:
                call()
            except Exception as exc:
                # The constructor takes what is raised while an argument is pickled for a
                # fault of the argument.
                if not isinstance(exc, Strike) and not isinstance(
                    exc.__cause__, Strike
                ):
                    raise
                break
        self._left = 0
        signal.setitimer(signal.ITIMER_REAL, 0)


def double(number: int) -> int:
    """Do next to nothing."""
    return 2 * number


executor: DBPoolExecutor
futures: list[Future[int]] = []
told: list[Future[int]] = []  # by callbacks
asked: list[Future[int]] = []  # by callbacks that were taken


def submit() -> Future[int]:
    """Submit a job, and keep what comes of it."""
    future = executor.submit(double, -1)
    futures.append(future)
    return future


def call_submit() -> None:
    """Nothing else."""
    submit()


def call_result() -> None:
    """Round trip of one job."""
    submit().result(LONGEST)


def call_late_result() -> None:
    """Several are submitted, so that the dispatcher has them."""
    for future in [submit() for _ in range(3)]:
        future.result(LONGEST)


def call_exception() -> None:
    """Round trip of one that fails."""
    executor.submit(divmod, 1, 0).exception(LONGEST)


def call_callback() -> None:
    """A callback, called or about to be."""
    future = submit()
    future.add_done_callback(told.append)
    asked.append(future)


def call_cancel() -> None:
    """Cancel what may run."""
    for future in [submit() for _ in range(5)]:
        future.cancel()


def call_wait() -> None:
    """Wait for several."""
    some = [submit() for _ in range(4)]
    for how in (FIRST_COMPLETED, FIRST_EXCEPTION, "ALL_COMPLETED"):
        wait(some, LONGEST, how)


def call_wait_for_one() -> None:
    """Wait for one, which the calling thread has sent."""
    wait([submit()], LONGEST)


def call_as_completed() -> None:
    """Take several as they come."""
    for future in as_completed([submit() for _ in range(4)], LONGEST):
        future.result(0)


def call_map() -> None:
    """Map, with a buffer, and in chunks."""
    for options in ({}, {"buffersize": 2}, {"chunksize": 3}):
        assert list(executor.map(double, range(6), **options)) == [*range(0, 12, 2)]


def call_with() -> None:
    """An executor of its own."""
    with DBPoolExecutor(URL, 1) as own:
        own.submit(double, -1)


def call_shutdown() -> None:
    """The same, without the block."""
    own = DBPoolExecutor(URL, 1)
    own.submit(double, -1).result(LONGEST)
    own.shutdown(cancel_futures=True)
    own.shutdown()


CALLS: dict[str, Callable[[], Any]] = {
    name.removeprefix("call_"): call
    for name, call in list(globals().items())
    if name.startswith("call_")
}
CODES = {call.__code__ for call in CALLS.values()}


def check() -> None:
    """Everything comes to its end, and a new job is done."""
    faulthandler.dump_traceback_later(LONGEST, exit=True)
    assert executor.submit(double, -2).result() == -4
    for future in futures:
        assert future.cancelled() or future.exception() is None
    (found,) = as_completed([executor.submit(double, -3)])
    assert found.result() == -6
    assert not wait([*futures, executor.submit(double, -4)]).not_done
    assert {*asked} <= {*told}
    assert len({*told}) == len(told)
    for each in (futures, told, asked):
        each.clear()
    assert gc.isenabled()
    faulthandler.cancel_dump_traceback_later()


def main(name: str, times: int, seed: int) -> None:
    """Interrupt one call again and again."""
    global executor
    executor = DBPoolExecutor(URL, 2)
    executor.submit(double, 1).result()
    interrupts = Interrupts(seed)
    while interrupts.count < times:
        interrupts.during(CALLS[name])
        check()
    faulthandler.dump_traceback_later(LONGEST, exit=True)
    executor.shutdown()
    gc.collect()
    end = time.monotonic() + LONGEST
    while threading.active_count() > 1 and time.monotonic() < end:
        time.sleep(0.01)
    assert threading.active_count() == 1, threading.enumerate()
    print(interrupts.count, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
