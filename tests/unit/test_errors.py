"""The error tree: each class pickles, copies, and reads well.

No worker, no database.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor
from concurrent.futures.process import BrokenProcessPool

import pytest

import dbpool_executor
from dbpool_executor import errors
from dbpool_executor.errors import (
    ArgumentsLostError,
    DBPoolError,
    ForkedConnectionError,
    JobExitedError,
    JobFailedError,
    JobTimeoutError,
    KeyReusedError,
    LedgerError,
    NotPlainError,
    NotStorableError,
    OpenConnectionsError,
    Outcome,
    OutcomeUnknownError,
    OutsideJobError,
    ResolveNotSupportedError,
    ResultLostError,
    TransactionAbortedError,
    WorkerDiedError,
    WorkerStartError,
    WorkLostError,
    describe_exit,
)

URL = "Engine(postgresql+psycopg://shop:***@db.example/shop)"

SAMPLES: list[DBPoolError] = [
    KeyReusedError("a", "shop.charge", "shop.refund"),
    LedgerError("the table is missing; make it by ledger.create(engine)"),
    NotStorableError("result[0]", bytes, "return a string"),
    NotPlainError(
        "result['rows'][3]",
        "shop.models.Order",
        "return its primary key or a dict",
        Outcome.ROLLED_BACK,
    ),
    NotPlainError(
        "args[0]", "sqlite3.Cursor", "pass what it read", Outcome.NEVER_STARTED
    ),
    OutsideJobError("session"),
    OutsideJobError("current_engine()"),
    OpenConnectionsError((f"{URL} has 2 connections in use", "shop.db is open")),
    ForkedConnectionError(4711, 4712),
    JobFailedError("shop.LocalError", "no stock"),
    JobFailedError("shop.LocalError", "no stock", Outcome.UNKNOWN),
    JobExitedError("SystemExit(3)"),
    JobTimeoutError(2.5),
    JobTimeoutError(2.5, Outcome.UNKNOWN, "its worker was killed"),
    ResolveNotSupportedError("sqlite"),
    WorkLostError("the job closed its session with work that was not committed"),
    TransactionAbortedError("a database error aborted the transaction"),
    ArgumentsLostError("ModuleNotFoundError: No module named 'shop'"),
    ResultLostError("unpickling it raised LookupError()"),
    OutcomeUnknownError("the connection was lost"),
    WorkerDiedError(-9, 4711),
    WorkerDiedError(3, 4711, Outcome.NEVER_STARTED),
    WorkerDiedError(0, 4711, Outcome.UNKNOWN),
    WorkerDiedError(None, 4711),
    WorkerDiedError(-9, 4711, Outcome.UNKNOWN, "kill_workers() was called"),
    WorkerDiedError(None, None, Outcome.NEVER_STARTED, "kill_workers() was called"),
    WorkerStartError("OperationalError: connection refused", 3),
]


def descendants(cls: type[DBPoolError]) -> Iterator[type[DBPoolError]]:
    """Give the classes of the package that derive from one, at any depth."""
    for child in cls.__subclasses__():
        if child.__module__.split(".")[0] == dbpool_executor.__name__:
            yield child
            yield from descendants(child)


CLASSES = sorted(set(descendants(DBPoolError)), key=lambda cls: cls.__name__)

each_sample = pytest.mark.parametrize(
    "error", SAMPLES, ids=lambda error: type(error).__name__
)
each_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)


@each_class
def test_each_class_has_a_sample(cls: type[DBPoolError]) -> None:
    """A new class is not looked at by any other test until it has one."""
    assert cls in {type(error) for error in SAMPLES}


@each_class
def test_each_class_is_public(cls: type[DBPoolError]) -> None:
    """It is defined in ``errors`` and importable from the package, by lists too."""
    name = cls.__name__
    assert cls.__module__ == "dbpool_executor.errors"
    assert name.endswith("Error")
    for module in (dbpool_executor, errors):
        assert getattr(module, name) is cls
        assert name in module.__all__


def test_lists_of_names_are_sorted_and_true() -> None:
    """Nothing is listed that is not there, and nothing twice."""
    for module in (dbpool_executor, errors):
        assert sorted(set(module.__all__)) == sorted(module.__all__)
        assert [n for n in module.__all__ if not hasattr(module, n)] == []


@each_sample
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_each_error_pickles(error: DBPoolError, protocol: int) -> None:
    """Type, attributes, arguments and text are what they were."""
    assert_equal(pickle.loads(pickle.dumps(error, protocol)), error)


@each_sample
def test_each_error_copies(error: DBPoolError) -> None:
    """Shallow and deep."""
    assert_equal(copy.copy(error), error)
    assert_equal(copy.deepcopy(error), error)


def assert_equal(twin: DBPoolError, error: DBPoolError) -> None:
    """Compare all that an error is."""
    assert twin is not error
    assert type(twin) is type(error)
    assert vars(twin) == vars(error)
    assert twin.args == error.args
    assert str(twin) == str(error)
    assert twin.outcome is error.outcome


@each_sample
def test_each_error_keeps_what_was_added_to_it(error: DBPoolError) -> None:
    """Notes and attributes of the caller's travel too."""
    twin = copy.copy(error)
    twin.add_note("while loading shop 7")
    twin.shop = 7  # type: ignore[attr-defined]
    assert_equal(pickle.loads(pickle.dumps(twin)), twin)


@each_sample
def test_each_text_says_what_which_why_and_what_now(error: DBPoolError) -> None:
    """One sentence: what happened to which thing, and after a semicolon the remedy."""
    text = str(error)
    account, _, remedy = text.rpartition("; ")
    assert len(account) > 20
    assert len(remedy.split()) >= 3
    assert not text.endswith(".")
    assert "\n" not in text
    assert "  " not in text
    assert "None" not in text


@each_sample
def test_each_text_names_what_it_was_made_with(error: DBPoolError) -> None:
    """Each text and number among the arguments is told."""
    for arg in error.args:
        for part in arg if isinstance(arg, tuple) else (arg,):
            if isinstance(part, str) or (isinstance(part, int) and part > 0):
                assert str(part) in str(error)


@each_sample
def test_no_text_shows_a_password(error: DBPoolError) -> None:
    """An engine's own ``repr`` hides it, and nothing here shows more."""
    assert "secret" not in str(error) + repr(error)


@each_sample
def test_each_error_that_ends_a_job_tells_its_outcome(error: DBPoolError) -> None:
    """Only those that end no job have none, and the text agrees with it."""
    if isinstance(error, (OutsideJobError, ForkedConnectionError)):
        assert error.outcome is None
        return
    assert isinstance(error.outcome, Outcome)
    said = {
        Outcome.ROLLED_BACK: "rolled back",
        Outcome.NEVER_STARTED: ("never started", "before it could", "no worker"),
        Outcome.COMMITTED: "committed",
        Outcome.UNKNOWN: ("not known", "unknown"),
    }[error.outcome]
    words = (said,) if isinstance(said, str) else said
    assert any(word in str(error) for word in words)


@pytest.mark.parametrize(
    ("cls", "caught"),
    [
        (NotPlainError, TypeError),
        (OutsideJobError, RuntimeError),
        (OpenConnectionsError, RuntimeError),
        (JobTimeoutError, TimeoutError),
        (ResolveNotSupportedError, ValueError),
        (ArgumentsLostError, BrokenProcessPool),
        (ResultLostError, BrokenProcessPool),
        (OutcomeUnknownError, BrokenProcessPool),
        (WorkerDiedError, BrokenProcessPool),
        (WorkerStartError, BrokenProcessPool),
        (WorkerStartError, BrokenExecutor),
    ],
)
def test_each_class_is_caught_by_what_callers_catch_already(
    cls: type[DBPoolError], caught: type[Exception]
) -> None:
    """A program written for the standard pool handles it."""
    assert issubclass(cls, caught)
    assert issubclass(cls, DBPoolError)


def test_article_fits_the_name() -> None:
    """An order is "an", a line is "a"."""
    for name, words in [("app.Order", "is an app.Order"), ("Line", "is a Line")]:
        assert words in str(NotPlainError("x", name, "y", Outcome.ROLLED_BACK))


@pytest.mark.parametrize(
    ("exitcode", "words"),
    [
        (None, "ended, and its exit status is not to be had"),
        (0, "exited with code 0"),
        (3, "exited with code 3"),
        (-9, "was killed by SIGKILL: out of memory (OOM killer), or kill -9"),
        (-15, "was killed by SIGTERM: sent by another process"),
        (-11, "was killed by SIGSEGV: a fault in an extension module"),
        (-6, "was killed by SIGABRT: an assertion in an extension module"),
        (-1, "was killed by SIGHUP"),
        (-99, "was killed by signal 99"),
    ],
)
def test_end_of_a_process_is_told_in_words(exitcode: int | None, words: str) -> None:
    """A code as a code, a signal by its name and likely cause; no more than is known."""
    assert describe_exit(exitcode) == words
