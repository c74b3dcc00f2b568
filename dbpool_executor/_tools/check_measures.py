"""How the check asks the workers, and measures them.

Runs in the parent.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from .. import DBPoolExecutor, JobTimeoutError, WorkerStartError
from . import check_jobs as jobs

_PATIENCE = 15.0  # seconds for one answer, a worker's start included
_SLICE = 0.3  # seconds that each measurement takes
_RAMP = 0.15  # before it: by then the executor knows that these jobs are short
_AHEAD = 100  # jobs per worker that are submitted ahead
_BUSY = 0.02  # seconds that keep a worker from a second job
_KILL_AFTER = 2.0

TIMEOUT = 0.2
"""Seconds, of the job whose statement is to be cancelled."""


class NoAnswerError(Exception):
    """A job of the check did not return.

    Args:
        text: Why; it may hold a password.
    """


class Cancelled(NamedTuple):
    """What became of a job that exceeded its timeout.

    Attributes:
        seconds: From its start to its end.
        runs_on: Whether the server went on with its statement.
        was_killed: Whether its worker was killed.
    """

    seconds: float
    runs_on: bool
    was_killed: bool


def answer(executor: DBPoolExecutor, job: Callable[[], Any]) -> Any:
    """Run a job and give its result.

    Raises:
        NoAnswerError: It raised, or did not end.
    """
    with _no_answer(executor):
        return executor.submit(job).result(_PATIENCE)


def cancelled(executor: DBPoolExecutor, slow: str) -> Cancelled:
    """Run a statement for longer than its job may.

    Args:
        executor: With one worker.
        slow: What takes longer than the job's timeout.

    Raises:
        NoAnswerError: The job ended in any other way than by its timeout.
    """
    before = answer(executor, os.getpid)
    limited = executor.options(timeout=TIMEOUT, kill_after=_KILL_AFTER)
    started = time.monotonic()
    with _no_answer(executor):
        try:
            limited.submit(jobs.run_slow, slow).result(_PATIENCE)
        except JobTimeoutError:
            seconds = time.monotonic() - started
        else:
            raise NoAnswerError("a statement that is slow was not slow")
    after, runs_on = answer(executor, partial(jobs.runs_on, slow))
    return Cancelled(seconds, runs_on, was_killed=before != after)


def round_trips(executor: DBPoolExecutor) -> list[float]:
    """Run one job after the other for a while.

    Args:
        executor: With one worker.

    Returns:
        How many seconds each took, at least one.

    Raises:
        NoAnswerError: A job raised, or did not end.
    """
    _warm(executor, 1)
    taken: list[float] = []
    deadline = time.monotonic() + _SLICE
    while not taken or time.monotonic() < deadline:
        started = time.perf_counter()
        answer(executor, jobs.read_one)
        taken.append(time.perf_counter() - started)
    return taken


def rate_of(executor: DBPoolExecutor, workers: int) -> float:
    """Run as many jobs as the workers can do for a while, and shut the executor down.

    Args:
        executor: With nothing to do.
        workers: How many it may have; all of them are started first.

    Returns:
        Jobs per second.

    Raises:
        NoAnswerError: A job raised or did not end, or not all workers started.
    """
    _warm(executor, workers)
    with _no_answer(executor):
        results = executor.map(
            jobs.read_one_of,
            itertools.count(),
            timeout=_PATIENCE,
            buffersize=_AHEAD * workers,
        )
        _count_for(_RAMP, results)
        started = time.monotonic()
        done = _count_for(_SLICE, results)
        seconds = time.monotonic() - started
        executor.shutdown(wait=False, cancel_futures=True)
    return done / seconds


def _count_for(seconds: float, results: Iterator[object]) -> int:
    """Take results for a while, and count them."""
    deadline = time.monotonic() + seconds
    for count, _ in enumerate(results, 1):
        if time.monotonic() > deadline:
            return count
    return 0


def _warm(executor: DBPoolExecutor, workers: int) -> None:
    """Have all workers started and connected."""
    deadline = time.monotonic() + _PATIENCE
    seen: set[int] = set()
    while len(seen) < workers:
        if time.monotonic() > deadline:
            text = f"only {len(seen)} of them did jobs within {_PATIENCE:g} s"
            raise NoAnswerError(text)
        with _no_answer(executor):
            busy = [_BUSY] * workers
            seen |= set(executor.map(jobs.read_one_slowly, busy, timeout=_PATIENCE))


@contextmanager
def _no_answer(executor: DBPoolExecutor) -> Iterator[None]:
    """Raise the one error of this module for whatever a job raises."""
    try:
        yield
    except NoAnswerError:
        raise
    except WorkerStartError as exc:
        raise NoAnswerError(f"no worker could start: {exc.text}") from exc
    except TimeoutError as exc:
        executor.kill_workers()  # nobody waits for what does not end
        raise NoAnswerError(f"no answer within {_PATIENCE:g} s") from exc
    except Exception as exc:
        raise NoAnswerError(str(getattr(exc, "orig", None) or exc)) from exc
