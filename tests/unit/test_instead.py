"""What is said of values that do not pickle: where they are, and what to write instead."""

from __future__ import annotations

import multiprocessing
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from pickle import PicklingError
from typing import Any

import pytest
from sqlalchemy import ForeignKey, insert, inspect, select
from sqlalchemy.ext.associationproxy import association_proxy
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    aliased,
    mapped_column,
    relationship,
    selectinload,
)

from dbpool_executor import DBPoolExecutor, NotPlainError
from dbpool_executor._api import arguments
from dbpool_executor._wire import calls
from dbpool_executor._wire.calls import dumps_result, loads_result, pack_call
from models import Item


class Base(DeclarativeBase):
    """Of the tables here, which no database has."""


class Album(Base):
    """Something with a proxy."""

    __tablename__ = "album"
    id: Mapped[int] = mapped_column(primary_key=True)
    tracks: Mapped[list[Track]] = relationship()
    names = association_proxy("tracks", "name")


class Track(Base):
    """What the proxy is for."""

    __tablename__ = "track"
    id: Mapped[int] = mapped_column(primary_key=True)
    album_id: Mapped[int] = mapped_column(ForeignKey("album.id"))
    name: Mapped[str]


async def wait() -> None:
    """Give a coroutine."""


def coroutine() -> Any:
    """Give one that nobody need wait for."""
    given = wait()
    given.close()
    return given


SPAWN = multiprocessing.get_context("spawn")
STATEMENT = "build the statement inside the job"
LOCK = "with_for_update"
SHARED = "pass it in initargs"

VALUES: dict[str, tuple[Callable[[], Any], str]] = {
    "statement": (lambda: select(Item), STATEMENT),
    "options": (lambda: select(Album).options(selectinload(Album.tracks)), STATEMENT),
    "criterion": (lambda: Item.id == 3, STATEMENT),
    "column": (lambda: Item.name, STATEMENT),
    "insert": (lambda: insert(Item), STATEMENT),
    "mapper": (lambda: inspect(Item), STATEMENT),
    "alias": (lambda: aliased(Item), STATEMENT),
    "generator": (lambda: (n for n in range(3)), "pass a list of its items"),
    "coroutine": (coroutine, "awaited"),
    "lock": (threading.Lock, LOCK),
    "rlock": (threading.RLock, LOCK),
    "event": (threading.Event, LOCK),
    "shared lock": (SPAWN.Lock, SHARED),
    "shared event": (SPAWN.Event, SHARED),
    "shared queue": (SPAWN.SimpleQueue, SHARED),
    "queue": (queue.Queue, "pass a list"),
    "future": (Future, "pass its result()"),
    "file": (lambda: Path(__file__).open(), "pass its path"),  # noqa: SIM115
}


@pytest.mark.parametrize(("make", "instead"), VALUES.values(), ids=VALUES)
def test_note_tells_the_place_and_what_to_write_instead(
    make: Callable[[], Any], instead: str
) -> None:
    """Of the value that the program knows, and not of something inside it."""
    value = make()
    with pytest.raises(Exception) as caught:
        pack_call(print, ({"x": [0, 1, 2, value]},), {})
    note = caught.value.__notes__[-1]
    assert note.startswith("args[0]['x'][3] is a ")
    assert type(value).__name__ in note.partition(",")[0]
    assert instead in note
    assert "dbpool_executor" not in note
    assert "cloudpickle" not in note
    if hasattr(value, "close"):
        value.close()


def test_statement_without_mapped_classes_crosses() -> None:
    """It has always done so."""
    statement = select(Item.__table__)
    assert str(loads_result(dumps_result(statement))) == str(statement)


def test_association_proxy_is_told_of_itself() -> None:
    """And not by the instance that it belongs to."""
    album = Album(tracks=[Track(name="one")])
    with pytest.raises(NotPlainError) as caught:
        pack_call(print, ([album.names],), {})
    assert caught.value.place == "args[0][0]"
    assert "list" in caught.value.remedy


def test_nobody_is_told_to_install_what_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With cloudpickle there is nothing to install."""
    for has_it, pickler in ((True, object), (False, None)):
        for module in (calls, arguments):
            monkeypatch.setattr(module, "by_value_pickler", lambda p=pickler, **_: p)
        with pytest.raises((AttributeError, PicklingError)) as caught:
            dumps_result(lambda: None)
        assert ("[cloudpickle]" in caught.value.__notes__[-1]) is not has_it
        with pytest.raises(TypeError) as refused:
            DBPoolExecutor("sqlite://", 1, SPAWN, lambda: None)
        assert ("[cloudpickle]" in str(refused.value)) is not has_it


def nothing(*_args: object) -> None:
    """As an initializer."""


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
@pytest.mark.parametrize("name", ["Lock", "RLock", "Event", "Queue", "Condition"])
def test_lock_of_another_start_method_is_refused_in_the_constructor(
    method: str, name: str
) -> None:
    """By its place; a lock of the same context is taken."""
    context = multiprocessing.get_context(method)
    other = getattr(multiprocessing.get_context("fork"), name)()
    with pytest.raises(
        TypeError, match=r"initargs\[1\]\['x'\] is a multiproc"
    ) as caught:
        DBPoolExecutor("sqlite://", 1, context, nothing, (1, {"x": other}))
    assert "mp_context.Lock()" in str(caught.value)
    own = getattr(context, name)()
    DBPoolExecutor("sqlite://", 1, context, nothing, (1, {"x": own})).shutdown()


@pytest.mark.parametrize(
    ("value", "instead"),
    [(threading.Lock(), LOCK), ((n for n in range(3)), "pass a list of its items")],
    ids=["lock", "generator"],
)
def test_constructor_tells_the_place_and_what_to_write_instead(
    value: Any, instead: str
) -> None:
    """Of what is wrong among its arguments."""
    with pytest.raises(TypeError, match=r"initargs\[0\]\[0\] is a") as caught:
        DBPoolExecutor("sqlite://", 1, SPAWN, nothing, ([value],))
    assert instead in str(caught.value)
