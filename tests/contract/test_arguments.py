"""What an executor is made with: bad input fails at once and says what to do.

No worker is started, except by the last tests.
"""

from __future__ import annotations

import gc
import inspect
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import Engine, create_engine, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import sessionmaker

import jobs
import programs
import values
from dbpool_executor import DBPoolExecutor, WorkerStartError
from dbpool_executor._api.arguments import check_count, default_max_workers, factory_of
from processes import MakeExecutor
from servers import Database
from waiting import LONGEST

SECRET_URL = "postgresql+psycopg://shop:secret@localhost/shop"
WORKING_FORM = (
    "    def make_engine():\n"
    "        return create_engine(url)\n"
    "\n"
    "    DBPoolExecutor(make_engine)"
)


def make_engine() -> Engine:
    """Make an engine, as a factory that pickles."""
    return create_engine("sqlite://")


def local_factory() -> Callable[[], Engine]:
    """Make a factory that no other process can import."""

    def factory() -> Engine:
        return create_engine(SECRET_URL)

    return factory


# -- The engine factory -------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [lambda: create_engine(SECRET_URL), lambda: create_async_engine(SECRET_URL)]
)
def test_engine_is_refused_and_the_error_shows_what_to_pass(
    make: Callable[[], object],
) -> None:
    """The commonest mistake: the message holds a program that works, no password."""
    with pytest.raises(TypeError) as caught:
        DBPoolExecutor(make())  # type: ignore[arg-type]
    assert "Engine" in str(caught.value)
    assert WORKING_FORM in str(caught.value)
    assert "pass a URL" in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "factory",
    [
        lambda: create_engine(SECRET_URL),
        local_factory(),
        partial(create_engine, SECRET_URL, creator=lambda: None),
        partial(create_engine, make_url(SECRET_URL), creator=lambda: None),
        partial(create_engine, url=SECRET_URL, connect_args={"dsn": lambda: None}),
        sessionmaker(),
    ],
)
def test_factory_that_does_not_pickle_is_refused(factory: Any) -> None:
    """In the constructor, where the mistake is, with a form that works."""
    with pytest.raises(TypeError) as caught:
        DBPoolExecutor(factory)
    assert "engine_factory" in str(caught.value)
    assert "does not pickle" in str(caught.value)
    assert WORKING_FORM in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("value", [None, 5, b"sqlite://", ["sqlite://"], object()])
def test_what_is_no_factory_is_refused(value: Any) -> None:
    """Neither a callable nor a URL."""
    with pytest.raises(TypeError) as caught:
        DBPoolExecutor(value)
    assert f"engine_factory is a {type(value).__name__}, which" in str(caught.value)
    assert WORKING_FORM in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "sqlite+aiosqlite://",
        make_url("postgresql+asyncpg://shop:secret@localhost/shop"),
        "mysql+aiomysql://shop:secret@localhost/shop",
    ],
)
def test_url_of_an_asynchronous_driver_is_refused(url: Any) -> None:
    """A job has no event loop; the password stays hidden."""
    with pytest.raises(ValueError, match="asynchronous") as caught:
        DBPoolExecutor(url)
    assert "name a synchronous driver" in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["", "no url", "/path/to/shop.db"])
def test_url_that_cannot_be_parsed_is_refused(url: str) -> None:
    """With SQLAlchemy's own error."""
    with pytest.raises(ArgumentError):
        DBPoolExecutor(url)


def test_url_of_an_unknown_database_is_refused() -> None:
    """In the parent, not by the first worker."""
    with pytest.raises(ArgumentError, match="nosuchdb"):
        DBPoolExecutor("nosuchdb://localhost/shop")


@pytest.mark.parametrize(
    "url", ["sqlite:///shop.db", make_url("sqlite:///shop.db"), SECRET_URL]
)
def test_url_stands_for_an_engine_of_that_url(url: Any) -> None:
    """Text or object, with its password."""
    engine = factory_of(url)()
    assert engine.url == make_url(url)


def test_factory_is_not_called_in_this_process(
    tmp_path: Path, make_executor: MakeExecutor
) -> None:
    """Who makes an engine is the worker alone."""
    record = tmp_path / "calls"
    executor = make_executor(partial(jobs.recording_engine, "sqlite://", record), 1)
    assert not record.exists()
    pid = executor.submit(os.getpid).result(LONGEST)
    assert record.read_text().split() == [str(pid)]


# -- Numbers -------------------------------------------------------------------------

NUMBERS = ["max_workers", "max_tasks_per_child"]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [0, -1, -(10**9)])
def test_number_below_one_is_refused(name: str, value: int) -> None:
    """With the words of the standard pool."""
    with pytest.raises(ValueError, match=f"{name} must be greater than 0"):
        DBPoolExecutor(make_engine, **{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [1.5, "2", [1], 2.0])
def test_what_is_no_whole_number_is_refused(name: str, value: object) -> None:
    """Before anything is compared with it."""
    with pytest.raises(TypeError, match=f"{name} must be an integer, not "):
        DBPoolExecutor(make_engine, **{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [1, 2, 61, 1000])
def test_whole_number_above_zero_is_taken(value: int) -> None:
    """There is no upper bound."""
    assert check_count("max_workers", value) == value


def test_default_number_of_workers_is_that_of_the_processors(
    make_executor: MakeExecutor,
) -> None:
    """As in the standard pool."""
    with ProcessPoolExecutor() as standard:
        assert default_max_workers() == standard._max_workers  # type: ignore[attr-defined]
    executor = make_executor(make_engine)
    assert f"max_workers={default_max_workers()}" in repr(executor)


# -- Start methods ---------------------------------------------------------------------


def test_default_start_method_is_never_fork(tmp_path: Path) -> None:
    """Not after a Queue has fixed the program's, nor where the program chose it."""
    text = (
        "import multiprocessing\n"
        "from dbpool_executor._api.arguments import default_context\n"
        "\n"
        "def default():\n"
        "    return default_context().get_start_method()\n"
        "\n"
        "print('untouched', default(),\n"
        "      multiprocessing.get_start_method(allow_none=True))\n"
        "queue = multiprocessing.Queue()\n"
        "print('queue', default(), multiprocessing.get_start_method() != 'spawn')\n"
        "for method in ('fork', 'forkserver', 'spawn'):\n"
        "    multiprocessing.set_start_method(method, force=True)\n"
        "    print(method, default())\n"
    )
    with programs.running(tmp_path / "program.py", text) as program:
        out, err = program.communicate(timeout=LONGEST)
    assert err == ""
    assert out.splitlines() == [
        "untouched forkserver None",
        "queue forkserver True",
        "fork forkserver",
        "forkserver forkserver",
        "spawn spawn",
    ]


def test_start_method_is_that_of_the_context(
    start_method: str, make_executor: MakeExecutor
) -> None:
    """The worker is started as the context says."""
    context = multiprocessing.get_context(start_method)
    executor = make_executor(make_engine, 1, context)
    told = executor.submit(values.start_method).result(LONGEST)
    expected = {start_method}
    if start_method == "fork":
        # It has the parent's own default, unless multiprocessing has told it its own.
        expected.add(multiprocessing.get_start_method())
    assert told in expected


@pytest.mark.parametrize("value", ["spawn", 5, ProcessPoolExecutor])
def test_what_is_no_context_is_refused(value: Any) -> None:
    """A method's name in particular, which is not what the argument takes."""
    with pytest.raises(TypeError, match="mp_context"):
        DBPoolExecutor(make_engine, mp_context=value)


# -- Initializer, sessions, the parent's engines --------------------------------------


@pytest.mark.parametrize("value", [5, "jobs.note", ()])
@pytest.mark.parametrize("name", ["initializer", "finalizer"])
def test_initializer_that_cannot_be_called_is_refused(name: str, value: Any) -> None:
    """With the words of the standard pool."""
    with pytest.raises(TypeError, match=f"{name} must be a callable"):
        DBPoolExecutor(make_engine, **{name: value})


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_setup_that_does_not_pickle_is_refused(method: str) -> None:
    """In the constructor; under fork, where nothing is pickled, it is taken."""
    context = multiprocessing.get_context(method)
    arguments: list[tuple[str, Any]] = [
        ("initializer", lambda: None),
        ("session_options", {"info": {"key": lambda: None}}),
        ("initargs", (lambda: None,)),
        ("finalizer", lambda: None),
        ("finalargs", (lambda: None,)),
    ]
    for name, value in arguments:
        options = {"initializer": print, "finalizer": print, name: value}
        with pytest.raises(TypeError, match=f"^{name} ") as caught:
            DBPoolExecutor(make_engine, 1, context, **options)
        assert "does not pickle" in str(caught.value)
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_session_options_that_name_an_engine_are_refused(method: str) -> None:
    """A worker's sessions use the worker's engine, also where nothing is pickled."""
    context = multiprocessing.get_context(method)
    options = {"bind": create_engine(SECRET_URL)}
    with pytest.raises(TypeError, match=r"session_options\['bind'\]") as caught:
        DBPoolExecutor(make_engine, 1, context, session_options=options)
    assert "secret" not in str(caught.value)


def test_fork_takes_an_initializer_that_does_not_pickle(
    make_executor: MakeExecutor,
) -> None:
    """A closure, which the forked worker inherits."""
    context = multiprocessing.get_context("fork")
    seen: list[str] = []
    executor = make_executor(
        make_engine, 1, context, initializer=lambda word: seen.extend([word]),
        initargs=("word",),
    )  # fmt: skip
    assert executor.submit(os.getpid).result(LONGEST) != os.getpid()
    assert seen == []


def test_engine_for_the_sessions_is_the_workers_own() -> None:
    """Under fork, where nothing is pickled, one of the parent's would get through."""
    context = multiprocessing.get_context("fork")
    options = {"bind": create_engine(SECRET_URL)}
    with pytest.raises(TypeError, match="session_options") as caught:
        DBPoolExecutor(make_engine, 1, context, session_options=options)
    assert "secret" not in str(caught.value)


class PicklesOnce:
    """An argument that is in order when it is checked, and is not any more later."""

    def __init__(self) -> None:
        self.checks = 0

    def __reduce__(self) -> tuple[Any, ...]:
        self.checks += 1
        if self.checks > 1:
            raise LookupError("this does not pickle again")
        return PicklesOnce, ()

    def __call__(self) -> Engine:
        """Make an engine, which it never comes to."""
        raise NotImplementedError


def test_worker_that_cannot_be_started_breaks_the_executor(
    make_executor: MakeExecutor,
) -> None:
    """Where the start itself fails in this process, its jobs fail as for any other."""
    executor = make_executor(PicklesOnce(), 1)
    futures = [executor.submit(os.getpid) for _ in range(2)]
    errors = [future.exception(LONGEST) for future in futures]
    for error in errors:
        assert isinstance(error, WorkerStartError)
        assert "this does not pickle again" in str(error)
    assert errors[0] is not errors[1]
    with pytest.raises(WorkerStartError):
        executor.submit(os.getpid)


@pytest.mark.parametrize("value", [5, "info", ["ab", 5]])
def test_session_options_that_are_no_mapping_are_refused(value: Any) -> None:
    """As keyword arguments they would mean nothing."""
    with pytest.raises((TypeError, ValueError)):
        DBPoolExecutor(make_engine, session_options=value)


@pytest.mark.parametrize(
    "value", [5, "sqlite://", sessionmaker(), [5], ["sqlite://"], make_engine]
)
def test_parent_engine_that_is_none_is_refused(value: Any) -> None:
    """The error names what came and what is meant."""
    with pytest.raises(TypeError, match="parent_engine must be an Engine") as caught:
        DBPoolExecutor(make_engine, parent_engine=value)
    assert type(value).__name__ in str(caught.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: None,
        make_engine,
        lambda: create_async_engine(SECRET_URL),
        lambda: [make_engine(), create_async_engine(SECRET_URL)],
        lambda: (make_engine() for _ in range(2)),
        list,
    ],
)
def test_parent_engine_may_be_one_or_several(
    make: Callable[[], Any], make_executor: MakeExecutor
) -> None:
    """Of either kind, in any iterable."""
    make_executor(make_engine, parent_engine=make())


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_workers": 0},
        {"max_tasks_per_child": 0},
        {"initializer": 5},
        {"parent_engine": 5},
        {"session_options": {"info": {1: lambda: None}}},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_refused_executor_leaves_nothing_open(arguments: dict[str, Any]) -> None:
    """No descriptor, and no complaint when its remains are collected."""
    gc.collect()
    before = psutil.Process().num_fds()
    with pytest.raises((TypeError, ValueError)):
        DBPoolExecutor(make_engine, **arguments)
    gc.collect()  # a complaint would be an error here
    assert psutil.Process().num_fds() == before


# -- Options of a job ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"commit": 1}, TypeError),
        ({"commit": "no"}, TypeError),
        ({"timeout": "5"}, TypeError),
        ({"timeout": True}, TypeError),
        ({"timeout": 0}, ValueError),
        ({"timeout": -1.0}, ValueError),
        ({"timeout": float("nan")}, ValueError),
        ({"timeout": float("inf")}, ValueError),
        ({"retries": 1.5}, TypeError),
        ({"retries": True}, TypeError),
        ({"retries": -1}, ValueError),
        ({"isolation_level": 5}, TypeError),
        ({"read_only": 1}, TypeError),
        ({"commit": False, "retries": 1}, ValueError),
        ({"comit": False}, TypeError),
    ],
    ids=str,
)
def test_option_that_makes_no_sense_is_refused(
    options: dict[str, Any], error: type[Exception], make_executor: MakeExecutor
) -> None:
    """By ``options()``, before any job has it."""
    executor = make_executor(make_engine)
    with pytest.raises(error, match=next(iter(options))):
        executor.options(**options)


def test_options_give_a_view_on_the_same_workers(
    sqlite_database: Database, make_executor: MakeExecutor
) -> None:
    """Itself an executor; options that are not given stay as they were."""
    executor = make_executor(sqlite_database.make_engine, 1)
    view = executor.options(commit=False)
    again = view.options()
    pids = [e.submit(os.getpid).result(LONGEST) for e in (executor, view, again)]
    assert len(set(pids)) == 1
    for each in (view, again):
        assert isinstance(each, Executor)
        each.submit(jobs.insert_item, "not committed").result(LONGEST)
    executor.submit(jobs.insert_item, "committed").result(LONGEST)
    assert sqlite_database.names() == {"committed"}


# -- Signatures ------------------------------------------------------------------------


def parameters(function: Any) -> list[tuple[str, Any, Any]]:
    """Give what a call may look like, without annotations."""
    signature = inspect.signature(function)
    return [(p.name, p.kind, p.default) for p in signature.parameters.values()]


@pytest.mark.parametrize("name", ["submit", "shutdown"])
def test_method_takes_what_that_of_the_standard_library_takes(
    name: str, make_executor: MakeExecutor
) -> None:
    """The same parameters of the same kinds with the same defaults."""
    expected = parameters(getattr(Executor, name))
    view = make_executor(make_engine).options(commit=False)
    assert parameters(getattr(DBPoolExecutor, name)) == expected
    assert parameters(getattr(type(view), name)) == expected


def test_map_takes_what_that_of_the_standard_library_takes() -> None:
    """And ``buffersize``, which came with Python 3.14."""
    ours, expected = parameters(DBPoolExecutor.map), parameters(Executor.map)
    assert ours[: len(expected)] == expected
    rest = [("buffersize", inspect.Parameter.KEYWORD_ONLY, None)]
    assert ours[len(expected) :] in ([], rest)


def test_constructor_takes_what_that_of_the_standard_pool_takes() -> None:
    """After the engine factory, in the same order; ours can only be named."""
    ours, expected = parameters(DBPoolExecutor), parameters(ProcessPoolExecutor)
    assert ours[0][0] == "engine_factory"
    assert ours[1 : 1 + len(expected)] == expected
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    assert {kind for _, kind, _ in ours[1 + len(expected) :]} == {keyword_only}
