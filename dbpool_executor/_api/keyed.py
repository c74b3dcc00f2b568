"""Jobs with keys: whose key is whose, and ``map()`` that skips what the ledger has.

Runs in the parent, in callers' threads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from .._ledger.claims import Entry
from .._ledger.ledger import Ledger, check_key
from .._wire.locate import name_of
from ..errors import KeyReusedError

Key = str | Callable[..., str]
"""Of one job, or what gives that of a job's arguments."""

_LOOK_AHEAD = 1000  # keys in one query

_MISSING = object()  # stands for a result that is still to come


class _Refused(NamedTuple):
    """Stands for the result of a call whose key is another function's."""

    error: KeyReusedError


class Keys:
    """Gives each job its key.

    Args:
        key: A key for one job, or a callable that takes a job's arguments.

    Raises:
        TypeError: It is neither.
        ValueError: It is a key that no database could keep.
    """

    def __init__(self, key: Key) -> None:
        self._key = key if callable(key) else check_key(key)

    def of(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        """Give the key of a job.

        Raises:
            TypeError: What the callable gives is no string.
            ValueError: It is a string that no database could keep.
            Exception: Whatever the callable raises.
        """
        if isinstance(self._key, str):
            return self._key
        return check_key(self._key(*args, **kwargs))


class Part:
    """Calls in a row, some of which the ledger has; the others are one job.

    Args:
        results: Of the calls in order; what is to come is ``_MISSING``.
        future: Of the job; None if there is nothing left to do.
    """

    def __init__(self, results: list[Any], future: Future[Any] | None) -> None:
        self._results = results
        self._future = future

    def result(self, timeout: float | None = None) -> list[Any]:
        """Give all results, as ``Future.result()`` does."""
        for each in self._results:
            if isinstance(each, _Refused):
                self.cancel()
                raise each.error
        if self._future is None:
            return self._results
        new = iter(self._future.result(timeout))
        return [next(new) if each is _MISSING else each for each in self._results]

    def cancel(self) -> bool:
        """Cancel the job, as ``Future.cancel()`` does."""
        return self._future is not None and self._future.cancel()


def parts(
    calls: Iterator[tuple[Any, ...]],
    keys: Keys,
    chunksize: int,
    look_ahead: int | None,
    look_up: Callable[[list[str]], Mapping[str, Any]],
    submit: Callable[[tuple[tuple[Any, ...], ...], tuple[str, ...]], Future[Any]],
) -> Iterator[Part]:
    """Divide calls into jobs, and leave out those that the ledger has.

    Args:
        calls: Their arguments.
        keys: Gives each its key.
        chunksize: Calls in a job, which is one transaction.
        look_ahead: Jobs whose calls may be taken ahead; None for no bound.
        look_up: Gives the results that are there, by key.
        submit: Submits the calls of one job with their keys.
    """
    jobs = max(1, _LOOK_AHEAD // chunksize)
    count = chunksize * (jobs if look_ahead is None else min(jobs, look_ahead))
    while window := list(itertools.islice(calls, count)):
        keyed = [(keys.of(call, {}), call) for call in window]
        known = look_up(list(dict.fromkeys(key for key, _ in keyed)))
        results: list[Any] = []
        chunk: list[tuple[str, tuple[Any, ...]]] = []
        for key, call in keyed:
            results.append(known.get(key, _MISSING))
            if results[-1] is _MISSING:
                chunk.append((key, call))
            if len(chunk) == chunksize:
                yield Part(results, _submitted(chunk, submit))
                results, chunk = [], []
        if results:
            yield Part(results, _submitted(chunk, submit) if chunk else None)


def _submitted(
    chunk: list[tuple[str, tuple[Any, ...]]],
    submit: Callable[[tuple[tuple[Any, ...], ...], tuple[str, ...]], Future[Any]],
) -> Future[Any]:
    keys, calls = zip(*chunk, strict=True)
    return submit(calls, keys)


def results_of(
    entries: Mapping[str, Entry], ledger: Ledger, fn: Callable[..., Any]
) -> dict[str, Any]:
    """Give the results that the ledger has, by key."""
    name, loads = name_of(fn), ledger.encoding.loads
    return {
        key: loads(entry.result)
        if ledger.is_same_job(entry.job, name)
        else _Refused(KeyReusedError(key, entry.job, name))
        for key, entry in entries.items()
    }
