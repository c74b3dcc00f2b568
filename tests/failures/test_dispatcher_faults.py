"""What raises in the dispatcher's thread costs a job, and never the thread."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import selectors
import time
from collections.abc import Callable
from concurrent.futures import wait
from typing import Any

import pytest

from dbpool_executor import DBPoolExecutor, Outcome
from dbpool_executor._dispatch import dispatcher, fleet, job
from dbpool_executor._launch.local import LocalWorker
from dbpool_executor._wire.channel import Channel
from dbpool_executor._wire.short_answers import AnswerReader
from processes import MakeExecutor
from servers import Database
from waiting import LONGEST


class _Full(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        raise SystemExit(record.getMessage())


def test_log_handler_that_always_raises(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """A worker that dies is logged of, and a later job is done."""
    handler = _Full()
    log = logging.getLogger("dbpool_executor")
    log.addHandler(handler)
    try:
        executor = make_executor(sqlite_database.make_engine, max_workers=1)
        with pytest.raises(concurrent.futures.BrokenExecutor):
            executor.submit(eval, "__import__('os')._exit(1)").result(LONGEST)
        assert executor.submit(abs, -1).result(LONGEST) == 1
    finally:
        log.removeHandler(handler)


PLACES = [
    (Channel, "receive"),
    (Channel, "send"),
    (AnswerReader, "read"),
    (LocalWorker, "__init__"),
    (LocalWorker, "bury"),
    (LocalWorker, "progress"),
    (selectors.DefaultSelector, "register"),
    (selectors.DefaultSelector, "unregister"),
    (selectors.DefaultSelector, "select"),
    (dispatcher, "read"),
    (fleet, "messages_for"),
    (job, "loads_result"),
    (job, "loads_failure"),
]


@pytest.mark.parametrize(
    ("where", "name"), PLACES, ids=[f"{w.__name__}.{n}" for w, n in PLACES]
)
def test_call_that_raises_once(
    where: Any,
    name: str,
    sqlite_database: Database,
    make_executor: MakeExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All futures end, each with an outcome, and so does the executor."""
    original: Callable[..., Any] = getattr(where, name)
    raised: list[BaseException] = []
    executor = make_executor(sqlite_database.make_engine, max_workers=1)
    patched = where is not selectors.DefaultSelector or name != "register"
    if patched and name != "__init__":
        executor.submit(abs, -1).result(LONGEST)

    def raise_once(*args: Any, **kwargs: Any) -> Any:
        if not raised:
            raised.append(MemoryError("made up"))
            raise raised[0]
        return original(*args, **kwargs)

    monkeypatch.setattr(where, name, raise_once)
    futures = [executor.submit(divmod, 7, n % 2) for n in range(4)]
    futures.append(executor.submit(eval, "'x' * 100_000"))
    futures.append(executor.submit(eval, "__import__('os')._exit(1)"))
    assert not wait(futures, LONGEST).not_done
    assert raised
    assert all(isinstance(future.outcome, Outcome) for future in futures)
    executor.shutdown()
    assert not executor.stats().workers


@pytest.mark.parametrize(
    "cls",
    [
        SystemExit,
        GeneratorExit,
        asyncio.CancelledError,
        concurrent.futures.CancelledError,
    ],
)
def test_what_forces_an_end_cancels_what_waits(
    cls: type[BaseException], sqlite_database: Database
) -> None:
    """As Ctrl-C does; the job that runs ends by itself."""
    with (
        pytest.raises(cls),
        DBPoolExecutor(sqlite_database.make_engine, 1) as executor,
    ):
        executor.submit(abs, -1).result(LONGEST)
        running = executor.submit(time.sleep, 0.5)
        # As long as the suite may last: it must not be begun.
        waiting = [executor.submit(time.sleep, LONGEST) for _ in range(3)]
        while not running.running():
            time.sleep(0.001)
        raise cls
    assert running.outcome is Outcome.COMMITTED
    assert all(future.cancelled() for future in waiting)
