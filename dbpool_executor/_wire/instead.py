"""What to write instead of a value that does not pickle.

Runs in both processes, and only after something did not pickle.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Coroutine, Generator, Iterator
from concurrent.futures import Future
from io import IOBase
from multiprocessing import queues, synchronize
from types import FrameType, MappingProxyType, TracebackType

from sqlalchemy.orm import Mapper
from sqlalchemy.orm.attributes import QueryableAttribute
from sqlalchemy.orm.interfaces import MapperProperty
from sqlalchemy.orm.util import AliasedClass
from sqlalchemy.sql.base import ExecutableOption
from sqlalchemy.sql.elements import ClauseElement

# As argument, and as result.
_ITERATOR = ("pass a list of its items", "return a list of its items")
_LOCK = (
    "leave it out and lock a row of the database, by with_for_update",
    "leave it out: a lock belongs to one process",
)
_SHARED_LOCK = (
    "pass it in initargs and have the initializer keep it in a global",
    "leave it out: the program has made it and holds it",
)
_STATEMENT = (
    "build the statement inside the job and pass the values that go into it",
    "return the rows, session.execute(statement).all()",
)
_FUTURE = ("pass its result()", "return its result()")

_INSTEAD: tuple[tuple[tuple[type, ...], tuple[str, str]], ...] = (
    ((IOBase,), ("pass its path and open it in the job", "return what it holds")),
    ((Generator, Iterator), _ITERATOR),
    ((AsyncGenerator,), _ITERATOR),
    ((Coroutine,), ("pass what it gives, awaited", "return what it gives, awaited")),
    ((Future, asyncio.Future), _FUTURE),
    ((type(threading.Lock()), type(threading.RLock()), threading.Condition), _LOCK),
    ((threading.Event, threading.Semaphore, threading.Barrier), _LOCK),
    ((threading.local, threading.Thread), ("leave it out", "leave it out")),
    ((synchronize.SemLock, synchronize.Condition, synchronize.Event), _SHARED_LOCK),
    ((queues.Queue, queues.SimpleQueue), _SHARED_LOCK),
    ((queue.Queue, queue.SimpleQueue), ("pass a list", "return a list")),
    ((MappingProxyType,), ("pass dict(...) of it", "return dict(...) of it")),
    (
        (TracebackType, FrameType),
        ("pass traceback.format_tb(...)", "return traceback.format_tb(...)"),
    ),
    ((Mapper, QueryableAttribute, MapperProperty, ExecutableOption), _STATEMENT),
    ((ClauseElement, AliasedClass), _STATEMENT),
)


def instead_of(value: object, *, is_result: bool) -> str | None:
    """Say what to write instead of a value that does not pickle.

    Args:
        value: The value, or one that holds what does not pickle.
        is_result: Whether a job returns it; otherwise it is an argument.

    Returns:
        The advice; None if nothing is known of its class.
    """
    for classes, texts in _INSTEAD:
        if isinstance(value, classes):
            return texts[is_result]
    return None
