"""What crosses between processes, and what is refused by name and place.

In this process for the most part; the last tests send values to two workers and back.
"""

from __future__ import annotations

import datetime as dt
import gc
import math
import multiprocessing
import operator
import os
import pickle
import sqlite3
import subprocess
import sys
import threading
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from decimal import Decimal
from fractions import Fraction
from functools import partial
from ipaddress import ip_address
from pathlib import PurePosixPath
from types import MappingProxyType, SimpleNamespace
from typing import Any
from uuid import UUID

import numpy as np
import pandas as pd
import psycopg
import psycopg2.extensions
import psycopg2.extras
import pymysql
import pymysql.cursors
import pytest
import sqlalchemy
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, create_engine, inspect, make_url, select
from sqlalchemy.dialects.mysql import aiomysql
from sqlalchemy.dialects.postgresql import asyncpg
from sqlalchemy.dialects.postgresql import psycopg as psycopg_dialect
from sqlalchemy.dialects.sqlite import aiosqlite
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncResult,
    AsyncScalarResult,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.pool import StaticPool

import jobs
import servers
import values
from dbpool_executor import DBPoolExecutor, NotPlainError, Outcome
from dbpool_executor._wire import calls
from dbpool_executor._wire.calls import (
    Function,
    dumps_calls,
    dumps_result,
    loads_calls,
    loads_result,
    pack_call,
    unpack_call,
)
from dbpool_executor._wire.picklers import remedy_for
from dbpool_executor.errors import ArgumentsLostError, ResultLostError
from models import Base, Item
from servers import Database
from values import Access, Box, Colour, Customer, FrozenBox, Pair, Slotted, Thing
from waiting import LONGEST

# -- What is refused ------------------------------------------------------------


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """A database in memory that holds one item."""
    engine = create_engine("sqlite://", poolclass=StaticPool)
    Base.metadata.create_all(engine)
    with Session(engine) as session, session.begin():
        session.add(Item(id=1, name="one", amount=7))
    yield engine
    engine.dispose()


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    """A session of this process."""
    with Session(engine) as session:
        yield session


MAPPED = "return its primary key or a dict"
READ = "return the values that you read with it"
ROWS = "return its rows, result.all()"

REFUSED: dict[str, tuple[Callable[[Session], object], str]] = {
    "mapped instance": (lambda s: s.get(Item, 1), MAPPED),
    "pending instance": (lambda _: Item(id=2), MAPPED),
    "instance state": (lambda s: inspect(s.get(Item, 1)), MAPPED),
    "session": (lambda s: s, READ),
    "scoped session": (lambda _: scoped_session(sessionmaker()), READ),
    "sessionmaker": (lambda _: sessionmaker(), READ),
    "engine": (lambda s: s.get_bind(), READ),
    "connection": (lambda s: s.connection(), READ),
    "pool's connection": (lambda s: s.connection().connection, READ),
    "sqlite3 connection": (lambda s: s.connection().connection.dbapi_connection, READ),
    "sqlite3 cursor": (lambda s: s.connection().connection.cursor(), READ),
    "result": (lambda s: s.execute(select(Item)), ROWS),
    "core result": (lambda s: s.connection().execute(select(Item.id)), ROWS),
    "scalars": (lambda s: s.scalars(select(Item)), ROWS),
    "mappings": (lambda s: s.execute(select(Item)).mappings(), ROWS),
    "unique": (lambda s: s.execute(select(Item)).unique(), ROWS),
    "query": (lambda s: s.query(Item), ROWS),
    "async session": (lambda _: AsyncSession(), READ),
    "async sessionmaker": (lambda _: async_sessionmaker(), READ),
    "async scoped session": (
        lambda _: async_scoped_session(async_sessionmaker(), threading.get_ident),
        READ,
    ),
    "async engine": (lambda _: async_engine(), READ),
    "async connection": (lambda _: async_engine().connect(), READ),
}


def async_engine() -> AsyncEngine:
    """Make an asynchronous engine, which connects to nothing yet."""
    return create_async_engine("postgresql+psycopg://user:secret@localhost/db")


@pytest.mark.parametrize("kind", REFUSED)
def test_result_with_a_tie_to_a_database_is_refused(
    session: Session, kind: str
) -> None:
    """Alone or inside something, it is named with its place and what to return."""
    make, remedy = REFUSED[kind]
    value = make(session)
    for result, place in [(value, "result"), ({"a": [value]}, "result['a'][0]")]:
        with pytest.raises(NotPlainError) as caught:
            dumps_result(result)
        cls = type(value)
        assert caught.value.place == place
        assert caught.value.type_name == f"{cls.__module__}.{cls.__qualname__}"
        assert caught.value.remedy == remedy
        assert caught.value.outcome is Outcome.ROLLED_BACK


@pytest.mark.parametrize("kind", REFUSED)
def test_argument_with_a_tie_to_a_database_is_refused(
    session: Session, kind: str
) -> None:
    """The job never starts, and the remedy speaks of passing, not of returning."""
    make, _ = REFUSED[kind]
    value = make(session)
    with pytest.raises(NotPlainError) as caught:
        pack_call(print, (1, value), {})
    assert caught.value.place == "args[1]"
    assert caught.value.outcome is Outcome.NEVER_STARTED
    assert "return" not in caught.value.remedy
    with pytest.raises(NotPlainError) as caught:
        pack_call(print, (), {"end": [value]})
    assert caught.value.place == "kwargs['end'][0]"


@pytest.mark.parametrize(
    "cls",
    [
        psycopg.Connection,
        psycopg.AsyncConnection,
        psycopg.Cursor,
        psycopg.AsyncCursor,
        psycopg.ClientCursor,
        psycopg.ServerCursor,
        psycopg2.extensions.connection,
        psycopg2.extensions.cursor,
        psycopg2.extras.DictCursor,
        pymysql.connections.Connection,
        pymysql.cursors.Cursor,
        pymysql.cursors.SSDictCursor,
        sqlite3.Connection,
        sqlite3.Cursor,
        asyncpg.AsyncAdapt_asyncpg_connection,
        asyncpg.AsyncAdapt_asyncpg_cursor,
        aiosqlite.AsyncAdapt_aiosqlite_connection,
        aiosqlite.AsyncAdapt_aiosqlite_cursor,
        aiomysql.AsyncAdapt_aiomysql_connection,
        aiomysql.AsyncAdapt_aiomysql_cursor,
        psycopg_dialect.AsyncAdapt_psycopg_connection,
        psycopg_dialect.AsyncAdapt_psycopg_cursor,
        AsyncResult,
        AsyncScalarResult,
        AsyncConnection,
    ],
    ids=lambda cls: f"{cls.__module__}.{cls.__qualname__}",
)
def test_class_of_a_driver_is_known_for_what_it_is(cls: type) -> None:
    """Connections and cursors are told by their methods, whoever made them."""
    assert remedy_for(cls) is not None


@pytest.mark.parametrize(
    "cls",
    [
        int, dict, type, Box, Pair, Colour, Customer, Thing, np.ndarray, pd.DataFrame,
        sqlalchemy.Row, sqlalchemy.RowMapping, sqlalchemy.URL, sqlalchemy.Table,
        threading.Thread, type(Item),
    ],
)  # fmt: skip
def test_other_classes_are_plain(cls: type) -> None:
    """Whether their instances pickle is their own affair."""
    assert remedy_for(cls) is None


def test_message_says_what_which_why_and_what_now() -> None:
    """The sentence, word by word."""
    with pytest.raises(NotPlainError) as caught:
        dumps_result({"rows": [1, 2, 3, Item(id=1)]})
    assert str(caught.value) == (
        "result['rows'][3] is a models.Item, which is tied to the process that made it "
        "and cannot leave it (the job's outcome: rolled back); return its primary key "
        "or a dict"
    )
    with pytest.raises(NotPlainError) as caught:
        pack_call(print, (), {"end": Item(id=1)})
    assert str(caught.value) == (
        "kwargs['end'] is a models.Item, which is tied to the process that made it and "
        "cannot leave it (the job's outcome: never started); pass its primary key or a "
        "dict"
    )


def test_mapped_instance_in_a_row_is_refused(session: Session) -> None:
    """A row is plain, what it holds need not be; the place leads to it."""
    rows = session.execute(select(Item.id, Item)).all()
    mappings = session.execute(select(Item.id, Item)).mappings().all()
    for result in (rows, rows[0], mappings, mappings[0]):
        with pytest.raises(NotPlainError) as caught:
            dumps_result(result)
        assert eval(caught.value.place, {"result": result}) is session.get(Item, 1)


def test_mapped_instance_in_a_set_is_refused() -> None:
    """A set has no places, so the error says that it is an element."""
    item = Item(id=1)
    for result in ({1, item}, frozenset([item])):
        with pytest.raises(NotPlainError, match=r"^an element of result is a models\."):
            dumps_result(result)


def test_mapped_instance_in_an_array_or_frame_is_refused() -> None:
    """Also where only numpy and pandas know how to reach it."""
    item = Item(id=1)
    with pytest.raises(NotPlainError) as caught:
        dumps_result(np.array([1, item], dtype=object))
    assert caught.value.place == "result[1]"
    with pytest.raises(NotPlainError, match=r"result is a models\.Item"):
        dumps_result(pd.DataFrame({"items": pd.Series([item], dtype=object)}))


def test_mapped_class_itself_is_plain() -> None:
    """A job may be told which class to work on, or to call one of its methods."""
    assert loads_result(dumps_result([Item, {"of": Item}])) == [Item, {"of": Item}]
    fn, args, kwargs = crossed(Item, (), {"name": "a"})
    assert (fn, args, kwargs) == (Item, (), {"name": "a"})


def test_memory_of_a_pickle_may_be_garbage_together_with_a_view_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The collector complains of neither; from Python 3.13 on it would."""
    told: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    monkeypatch.setattr(calls, "_spares", [])
    cycle: list[object] = [dumps_result(["x" * 100])]
    cycle.append(cycle)
    calls._spares.clear()
    del cycle
    gc.collect()
    assert told == []


# -- What does not pickle ---------------------------------------------------------


def test_value_that_does_not_pickle_fails_as_itself_and_says_where() -> None:
    """The error is the value's own; a note adds the innermost place."""
    with pytest.raises(LookupError, match="this does not pickle") as caught:
        dumps_result({"a": [0, Box(values.Unpicklable())]})
    note = caught.value.__notes__[-1]  # Python 3.14 has said more before it
    assert note == (
        "result['a'][1].content is a values.Unpicklable, which does not pickle; only "
        "plain values cross between processes"
    )
    with pytest.raises(TypeError) as lock:
        pack_call(print, (1, {2: threading.Lock()}), {})
    note = lock.value.__notes__[-1]
    assert note.startswith("args[1][2] is a _thread.lock, which does not pickle")


def test_function_that_does_not_pickle_is_named() -> None:
    """The commonest case: a lambda."""
    with pytest.raises((pickle.PicklingError, AttributeError)) as caught:
        pack_call(lambda: None, (), {})
    note = caught.value.__notes__[-1]
    assert note.startswith("fn is a function, which does not pickle")


def test_note_does_not_look_inside_what_is_refused() -> None:
    """What does not pickle by itself may hold what is refused, but no more."""
    with pytest.raises(TypeError, match="cannot pickle 'mappingproxy'") as caught:
        dumps_result({"a": MappingProxyType({"b": Item(id=1)})})
    note = caught.value.__notes__[-1]
    assert note.startswith(("result['a'] is a mapp", "result['a']['b'] is a models"))


def test_value_that_is_nested_too_deeply_fails_alone() -> None:
    """The pickler's own limit is an error of this job and nothing else."""
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    with pytest.raises(RecursionError):
        dumps_result(value)
    while value:  # taken apart by hand: its own end would nest as deeply
        value = value.pop()


# -- What crosses, in this process -------------------------------------------------

PLAIN: dict[str, Any] = {
    "none": None,
    "number": 1 << 200,
    "text": "naïve \0 \N{SNOWMAN} \ud800",
    "bytes": (b"\0" * 70_000, bytearray(b"ab")),
    "nested": {"a": [(1, {2, 3}), frozenset({"x"}), {None: [[]]}]},
    "slice and range": [slice(1, 2), range(3), ...],
    "decimal": [Decimal("1.10"), Fraction(1, 3), 1j, math.inf],
    "dates": [
        dt.date(2024, 2, 29),
        dt.datetime(2024, 2, 29, 12, 30, 1, 5, tzinfo=dt.UTC),
        dt.time(1, 2),
        dt.timedelta(days=1, microseconds=3),
    ],
    "uuid": UUID("12345678123456781234567812345678"),
    "address": [ip_address("::1"), PurePosixPath("/etc/x"), make_url("sqlite://")],
    "enum": [Colour.RED, Access.READ | Access.WRITE, {Colour.BLUE: 1}],
    "named tuple": Pair(1, [Pair("a", None)]),
    "dataclass": [Box([1], "label"), FrozenBox((1,))],
    "invoice": values.Invoice(
        UUID(int=1), dt.date(2024, 1, 1), Decimal("9.99"), Colour.RED, [Pair(1, 2)]
    ),
    "object": Thing(a=1, b=Thing(c=[2])),
    "pydantic": Customer(name="Ada", born=dt.date(1815, 12, 10), tags={"a": [1]}),
    "containers": [
        deque([1, 2], maxlen=3),
        OrderedDict(b=1, a=2),
        defaultdict(list, {"a": [1]}),
        SimpleNamespace(a=[1]),
    ],
    "function": [operator.add, len, values.identity, [].append.__name__],
    "exception type": [ValueError, values.PickyError],
}


def crossed(
    fn: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Function, tuple[Any, ...], dict[str, Any]]:
    """Give a call as it comes to a worker."""
    name, call = pack_call(fn, args, kwargs)
    # A label names the function of a pickle, for people alone.
    sent = None if isinstance(name, str) else name
    ((function, (call,)),) = loads_calls(dumps_calls([(sent, [call])]))
    if not isinstance(call, tuple):
        return unpack_call(call)
    assert function is not None
    return function, call, {}


@pytest.mark.parametrize(
    "value",
    [sign * (1 << bits) + more for bits in (7, 8, 15, 16, 31, 32, 63, 64, 900)
     for sign in (1, -1) for more in (-1, 0, 1)] + [0, True, False, None, 0.5],
)  # fmt: skip
def test_number_comes_back_as_it_is(value: object) -> None:
    """Of those that take few bits the pickle is made by hand."""
    found = loads_result(dumps_result(value))
    assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_value_comes_back_equal(kind: str) -> None:
    """As a result and as an argument, with the type it had."""
    value = PLAIN[kind]
    for twin in (
        loads_result(dumps_result(value)),
        crossed(print, (value,), {})[1][0],
        crossed(print, (), {"end": value})[2]["end"],
    ):
        assert twin == value
        assert repr(twin) == repr(value) or isinstance(value, Thing)


def test_objects_that_are_shared_stay_shared() -> None:
    """Two names of one list are one list on the other side, and a cycle is a cycle."""
    shared: list[Any] = [1]
    shared.append(shared)
    twin: Any = loads_result(dumps_result({"a": shared, "b": shared}))
    assert twin["a"] is twin["b"]
    assert twin["a"][1] is twin["a"]


def test_array_crosses_beside_the_pickle() -> None:
    """The memory of an array is a part of its own, not copied into the pickle."""
    array = np.arange(100_000)
    body, *buffers = dumps_result({"array": array})
    assert len(body) < 1000
    assert [memoryview(buffer).nbytes for buffer in buffers] == [array.nbytes]


def test_pickle_that_is_still_held_is_not_overwritten() -> None:
    """The memory of a pickle is used again, but not while somebody looks into it."""
    values = [[str(n)] * size for n, size in enumerate([100_000, 200_000, 50_000])]
    pickles = [dumps_result(value) for value in values]
    assert [loads_result(parts) for parts in pickles] == values


@pytest.mark.parametrize("value", [None, True, 7, -1.5, 10**40])
def test_short_value_comes_back_as_it_was(value: object) -> None:
    """Those that need no look at what is inside; also as an argument."""
    back = loads_result(dumps_result(value))
    assert (type(back), back) == (type(value), value)
    assert crossed(max, (value, "text"), {})[1] == (value, "text")
    assert crossed(jobs.pid, (value, "text"), {})[1] == (value, "text")


SHORT = [(), (None, True, 7, -1.5), ("x" * 64,), (1,) * 8]
LONG = [("x" * 65,), (1,) * 9, (1, "x" * 100_000), ([1],), (b"x",)]


@pytest.mark.parametrize("args", [*SHORT, *LONG])
def test_call_is_pickled_at_once_unless_it_is_short(args: tuple[object, ...]) -> None:
    """A short one goes with hundreds of others, and must not make their message long."""
    name, call = pack_call(jobs.give, args, {})
    if args in SHORT:
        assert (name, call) == (("jobs", "give"), args)
    else:
        assert name == "jobs.give"
        assert isinstance(call, bytes)
    assert crossed(jobs.give, args, {}) == (jobs.give, args, {})


def test_call_is_copied_when_it_is_made() -> None:
    """What the caller changes after submit() does not reach the job."""
    array, items = np.zeros(10_000), [1]
    _, call = pack_call(print, (array, items), {})
    array += 1
    items.append(2)
    assert isinstance(call, bytes)
    _, (array_then, items_then), _ = unpack_call(call)
    np.testing.assert_array_equal(array_then, np.zeros(10_000))
    assert items_then == [1]


def test_function_that_gets_another_name_is_still_the_one_that_is_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also if that happens before the call is sent, with others."""
    name, call = pack_call(jobs.add, (1, 2), {})
    monkeypatch.setattr(jobs.add, "__name__", "give")
    monkeypatch.setattr(jobs.add, "__module__", threading.Lock())
    assert loads_calls(dumps_calls([(name, [call])])) == [(jobs.add, [(1, 2)])]


def test_name_that_another_function_has_by_now_is_not_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also if the function was called by it a moment ago."""
    add = jobs.add
    names = [pack_call(add, (1, number), {})[0] for number in range(2)]
    assert names == [("jobs", "add")] * 2
    assert names[0] is names[1]
    with monkeypatch.context() as other:
        other.setattr(jobs, "add", jobs.give)
        with pytest.raises(pickle.PicklingError, match="not the same object"):
            pack_call(add, (1, 2), {})
    assert pack_call(add, (1, 2), {}) == (("jobs", "add"), (1, 2))
    # Another module of that name, and so another function.
    monkeypatch.setitem(sys.modules, "jobs", SimpleNamespace(add=jobs.give))
    with pytest.raises(pickle.PicklingError, match="not the same object"):
        pack_call(add, (1, 2), {})


def test_function_that_has_no_name_is_not_kept() -> None:
    """What it closes over may be large."""

    def local() -> None: ...

    kept = weakref.ref(local)
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pack_call(local, (), {})
    del local
    gc.collect()  # the frames of the exception
    assert kept() is None


# -- What crosses, with workers ------------------------------------------------------


@pytest.fixture(scope="module")
def shared_file(tmp_path_factory: pytest.TempPathFactory) -> Database:
    """A SQLite file that the tests of this module share."""
    return servers.sqlite_file(tmp_path_factory.mktemp("boundary") / "test.db")


@pytest.fixture(scope="module")
def executor(shared_file: Database) -> Iterator[DBPoolExecutor]:
    """Two workers that live as long as this module's tests."""
    with DBPoolExecutor(shared_file.make_engine, max_workers=2) as executor:
        yield executor


@pytest.fixture
def file(shared_file: Database) -> Database:
    """The same file, with empty tables."""
    shared_file.empty_tables()
    return shared_file


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_value_survives_the_way_to_a_worker_and_back(
    executor: DBPoolExecutor, kind: str
) -> None:
    """As an argument by position and by keyword, and as the result."""
    value = PLAIN[kind]
    args, kwargs = executor.submit(values.identity, value, key=value).result(LONGEST)
    assert args == (value,)
    assert kwargs == {"key": value}


HASHABLE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(max_size=20),
    st.binary(max_size=20),
    st.decimals(allow_nan=False),
    st.dates(),
    st.datetimes(timezones=st.none() | st.just(dt.UTC)),
    st.timedeltas(),
    st.uuids(),
    st.sampled_from(Colour),
)
VALUES = st.recursive(
    HASHABLE | st.binary(max_size=20).map(bytearray),
    lambda children: st.one_of(
        st.lists(children, max_size=4),
        st.lists(children, max_size=4).map(tuple),
        st.dictionaries(HASHABLE, children, max_size=4),
        st.sets(HASHABLE, max_size=4),
        st.frozensets(HASHABLE, max_size=4),
        st.builds(Pair, children, children),
        st.builds(Box, children),
        st.builds(Thing, a=children),
        st.lists(children, max_size=3).map(deque),
    ),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(value=VALUES)
def test_random_plain_values_come_back_equal(
    executor: DBPoolExecutor, value: object
) -> None:
    """Whatever plain value a job gets and gives back."""
    twin = executor.submit(jobs.give, value).result(LONGEST)
    assert type(twin) is type(value)
    assert twin == value


@settings(max_examples=25, deadline=None)
@given(
    size=st.sampled_from([0, 1, 1000, 8191, 8192, 100_000]),
    dtype=st.sampled_from(["u1", "<f4", "<i8", "<M8[s]", "?"]),
    order=st.sampled_from("CF"),
)
def test_arrays_come_back_equal_and_writable(
    executor: DBPoolExecutor, size: int, dtype: str, order: Any
) -> None:
    """Of every size and kind, and as in the standard pool they can be changed."""
    raw = np.arange(size * 8, dtype="u1")[: size * np.dtype(dtype).itemsize]
    array = np.resize(raw, size * np.dtype(dtype).itemsize).view(dtype)
    array = np.asarray(array.reshape(-1, 1 if size % 2 else 2), order=order)
    twin = executor.submit(jobs.give, array).result(LONGEST)
    np.testing.assert_array_equal(twin, array)
    assert twin.dtype == array.dtype
    assert twin.flags.f_contiguous == array.flags.f_contiguous
    assert twin.flags.writeable


@pytest.mark.parametrize("size", [3, 100_000])
def test_job_may_change_the_array_that_it_gets(
    executor: DBPoolExecutor, size: int
) -> None:
    """Small arrays and large ones, there and back."""
    result = executor.submit(values.add_one, np.zeros(size)).result(LONGEST)
    result += 1
    assert result.sum() == 2 * size


@pytest.mark.parametrize("size", [3, 100_000])
def test_frames_come_back_equal_and_can_be_changed(
    executor: DBPoolExecutor, size: int
) -> None:
    """A DataFrame of several kinds of columns, small and large."""
    frame = pd.DataFrame(
        {
            "number": np.arange(size),
            "share": np.linspace(0, 1, size),
            "name": ["a", "b", None] * (size // 3) + ["c"] * (size % 3),
            "day": pd.Timestamp("2024-01-01"),
        }
    )
    twin = executor.submit(jobs.give, frame).result(LONGEST)
    pd.testing.assert_frame_equal(twin, frame)
    twin.loc[0, "number"] = -1
    assert twin["number"].iloc[0] == -1


def test_rows_keep_their_names(executor: DBPoolExecutor, file: Database) -> None:
    """A row read in a job is a row in the parent."""
    call = partial(values.insert_and_select, mappings=False)
    (row,) = executor.submit(call, "a").result(LONGEST)
    assert isinstance(row, sqlalchemy.Row)
    assert (row.name, row.amount, row[0]) == ("a", 7, row.id)
    assert row._fields == ("id", "name", "amount")
    assert row._mapping["name"] == "a"
    assert row == (row.id, "a", 7)
    again = executor.submit(jobs.give, [row]).result(LONGEST)
    assert again == [row]
    assert again[0].name == "a"
    assert file.names() == {"a"}


def test_row_mappings_keep_their_keys(executor: DBPoolExecutor, file: Database) -> None:
    """And a row mapping is a row mapping."""
    call = partial(values.insert_and_select, mappings=True)
    (row,) = executor.submit(call, "a").result(LONGEST)
    assert isinstance(row, sqlalchemy.RowMapping)
    assert (row["name"], row["amount"]) == ("a", 7)
    assert list(row) == ["id", "name", "amount"]
    again = executor.submit(jobs.give, {"row": row}).result(LONGEST)
    assert dict(again["row"]) == dict(row)
    assert file.names() == {"a"}


def test_megabytes_go_both_ways_at_once(executor: DBPoolExecutor) -> None:
    """Large arguments and large results do not wait for each other."""
    blocks = [bytes([n]) * 8_000_000 for n in range(6)]
    futures = [executor.submit(jobs.give, block) for block in blocks]
    assert [f.result(LONGEST) for f in futures] == blocks


@pytest.mark.parametrize("size", [1 << 16, (1 << 16) + 1, 1 << 20, 10_000_001])
def test_bytes_come_back_as_bytes(executor: DBPoolExecutor, size: int) -> None:
    """However they crossed, and several at once."""
    futures = [executor.submit(operator.mul, bytes([n]), size) for n in range(1, 5)]
    for n, future in enumerate(futures, 1):
        result = future.result(LONGEST)
        assert type(result) is bytes
        assert result == bytes([n]) * size


def test_pipe_crosses_as_in_the_standard_pool(executor: DBPoolExecutor) -> None:
    """A ``multiprocessing`` connection still works in the worker."""
    reader, writer = multiprocessing.Pipe(duplex=False)
    with reader, writer:
        executor.submit(values.say_through, writer, "hello").result(LONGEST)
        assert reader.poll(LONGEST)
        assert reader.recv() == "hello"


@pytest.mark.parametrize(
    ("wrap", "place"),
    [
        (jobs.give, "result"),
        (values.as_rows, "result['rows'][3]"),
        (Box, "result.content"),
        (Slotted, "result.content"),
        (partial(Pair, 1), "result.right"),
    ],
)
def test_refused_result_rolls_the_job_back(
    executor: DBPoolExecutor, file: Database, wrap: Callable[[Any], Any], place: str
) -> None:
    """A job that gives its mapped instance away leaves no row behind."""
    future = executor.submit(values.insert_and_give_itself, "a", wrap)
    error = future.exception(LONGEST)
    assert isinstance(error, NotPlainError)
    assert (error.place, error.outcome) == (place, Outcome.ROLLED_BACK)
    assert file.count() == 0


def test_refused_argument_starts_no_job(
    executor: DBPoolExecutor, file: Database
) -> None:
    """It fails its own future, not submit(), and no worker hears of it."""
    future = executor.submit(jobs.insert_and_give, "a", [Item(id=1)])
    error = future.exception(LONGEST)
    assert isinstance(error, NotPlainError)
    assert (error.place, error.outcome) == ("args[1][0]", Outcome.NEVER_STARTED)
    executor.submit(jobs.insert_item, "b").result(LONGEST)
    assert file.names() == {"b"}


def test_result_that_does_not_pickle_rolls_the_job_back(
    executor: DBPoolExecutor, file: Database
) -> None:
    """Its error comes as itself, with the note that names the place."""
    job = partial(jobs.insert_and_give, "a")
    future = executor.submit(values.insert_and_give_called, "a", values.make_lock)
    error = future.exception(LONGEST)
    assert isinstance(error, TypeError)
    told = "result['locks'][0] is a _thread.lock"
    assert [note for note in error.__notes__ if note.startswith(told)]
    future = executor.submit(values.insert_and_give_called, "b", values.Unpicklable)
    assert isinstance(future.exception(LONGEST), LookupError)
    assert file.count() == 0
    assert executor.submit(job, 1).result(LONGEST) == 1


def test_argument_that_does_not_pickle_fails_its_own_future(
    executor: DBPoolExecutor, file: Database
) -> None:
    """And the neighbours that were submitted before and after it are untouched."""
    before = executor.submit(jobs.insert_item, "before")
    error = executor.submit(jobs.give, values.Unpicklable()).exception(LONGEST)
    local = executor.submit(lambda: None).exception(LONGEST)
    after = executor.submit(jobs.insert_item, "after")
    assert isinstance(error, LookupError)
    assert local is not None
    assert [note for note in local.__notes__ if note.startswith("fn is a function")]
    before.result(LONGEST)
    after.result(LONGEST)
    assert file.names() == {"before", "after"}


RAISERS = [values.raise_lookup_error, values.raise_system_exit]


@pytest.mark.parametrize("raiser", RAISERS)
def test_argument_that_does_not_unpickle_fails_its_own_job(
    executor: DBPoolExecutor, file: Database, raiser: Callable[[], object]
) -> None:
    """The function was never called, and the worker goes on."""
    workers = {executor.submit(jobs.pid).result(LONGEST) for _ in range(4)}
    bad = values.UnpicklesWith(raiser)
    error = executor.submit(jobs.insert_and_give, "a", bad).exception(LONGEST)
    assert isinstance(error, ArgumentsLostError)
    assert isinstance(error, BrokenProcessPool)
    assert error.outcome is Outcome.NEVER_STARTED
    assert isinstance(error.__cause__, (LookupError, SystemExit))
    assert executor.submit(jobs.pid).result(LONGEST) in workers
    assert file.count() == 0


@pytest.mark.parametrize("raiser", RAISERS)
def test_result_that_does_not_unpickle_is_lost_alone(
    executor: DBPoolExecutor, file: Database, raiser: Callable[[], object]
) -> None:
    """The job was committed, the error says so, and the parent goes on."""
    call = partial(values.UnpicklesWith, raiser)
    error = executor.submit(values.insert_and_give_called, "a", call).exception(LONGEST)
    assert isinstance(error, ResultLostError)
    assert error.outcome is Outcome.COMMITTED
    assert isinstance(error.__cause__, (LookupError, SystemExit))
    assert file.names() == {"a"}
    assert executor.submit(jobs.add, 1, 2).result(LONGEST) == 3


class WordlessSession(Session):
    """A session that cannot be shown."""

    def __repr__(self) -> str:
        raise LookupError("no words")

    __str__ = __repr__


def test_refused_result_is_not_asked_for_its_text() -> None:
    """Its own code would run, and what that raises would stand for the refusal."""
    with pytest.raises(NotPlainError, match=r"result\[0\] is a .*WordlessSession"):
        dumps_result([WordlessSession()])


def test_function_is_called_by_its_name_only_if_it_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another one of that name is not called in its place."""
    fn, args, kwargs = crossed(jobs.add, (1, 2), {})
    assert (fn, args, kwargs) == (jobs.add, (1, 2), {})
    before = jobs.add
    monkeypatch.setattr(jobs, "add", lambda a, b: a * b)
    with pytest.raises(pickle.PicklingError, match="not the same object"):
        pack_call(before, (3, 4), {})


def test_text_is_not_taken_for_the_name_of_a_module() -> None:
    """It is no function, and the job says so."""
    assert crossed("os", (1,), {}) == ("os", (1,), {})  # type: ignore[arg-type]


def test_module_that_was_not_imported_is_imported_for_a_call() -> None:
    """A worker comes by the modules of its jobs in this way."""
    calls = dumps_calls([(("jobs", "add"), [(1, 2)])])
    program = (
        "import sys; from dbpool_executor._wire.calls import loads_calls, unpack_call\n"
        "((fn, (call,)),) = loads_calls(sys.stdin.buffer.read())\n"
        "assert fn is None and 'jobs' not in sys.modules\n"
        "fn, args, kwargs = unpack_call(call)\n"
        "print(fn(*args, **kwargs))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=calls,
        capture_output=True,
        check=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stdout.split() == [b"3"]
