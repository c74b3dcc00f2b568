"""What may cross between processes, and the picklers that refuse the rest.

Runs in both processes.
"""

from __future__ import annotations

import functools
import io
import pickle
import sys
import weakref
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple, cast

import sqlalchemy
from sqlalchemy import Connection, Engine, Result, ScalarResult
from sqlalchemy.engine import FilterResult, MappingResult
from sqlalchemy.orm import Query, Session, scoped_session, sessionmaker
from sqlalchemy.orm.state import InstanceState
from sqlalchemy.pool import PoolProxiedConnection

from .locate import asyncio_classes

_FRONT_DOOR = __package__.partition(".")[0]

PROTOCOL = 5
"""Of pickle, the first with out-of-band buffers (PEP 574)."""


class Remedy(NamedTuple):
    """What to do instead of letting a value cross."""

    as_result: str
    as_argument: str


_MAPPED = Remedy("return its primary key or a dict", "pass its primary key or a dict")
_SESSION = Remedy(
    "return the values that you read with it",
    "import session from dbpool_executor inside the job",
)
_CONNECTION = Remedy(
    "return the values that you read with it",
    "use dbpool_executor.current_engine() inside the job",
)
_COLLECTION = Remedy(
    "return a list or dict of its items", "pass a list or dict of its items"
)
_RESULT = Remedy("return its rows, result.all()", "pass its rows, result.all()")

_REMEDIES: tuple[tuple[tuple[type, ...], Remedy], ...] = (
    ((Session, scoped_session, sessionmaker), _SESSION),
    ((Engine, Connection), _CONNECTION),
    ((PoolProxiedConnection,), _CONNECTION),
    ((Result, ScalarResult, MappingResult, FilterResult), _RESULT),
    ((Query,), _RESULT),
    ((InstanceState,), _MAPPED),
)
_ASYNCIO_REMEDIES: tuple[tuple[tuple[str, ...], Remedy], ...] = (
    (("AsyncSession", "async_scoped_session", "async_sessionmaker"), _SESSION),
    (("AsyncEngine", "AsyncConnection"), _CONNECTION),
    (("AsyncResult", "AsyncScalarResult", "AsyncMappingResult"), _RESULT),
)
_DBAPI_CONNECTION = ("cursor", "commit", "rollback", "close")  # PEP 249
_DBAPI_CURSOR = ("execute", "executemany", "fetchone", "fetchmany", "close")  # PEP 249

# How sockets, pipes and the like cross in the standard pool. Looked up here, because
# each ForkingPickler copies this table and copyreg's when it is made.
_multiprocessing_reducers = ForkingPickler._extra_reducers  # type: ignore[attr-defined]

# The verdict on each class that was met, so that a class is examined once.
_known: weakref.WeakKeyDictionary[type, Remedy | None] = weakref.WeakKeyDictionary()


def remedy_for(cls: type) -> Remedy | None:
    """Say what to do instead of letting an instance of a class cross.

    Args:
        cls: The class of a value.

    Returns:
        The remedy; None if its instances are plain.
    """
    try:
        return _known[cls]
    except KeyError:
        remedy = _known[cls] = _examine(cls)
        return remedy


def _examine(cls: type) -> Remedy | None:
    for classes, remedy in _REMEDIES:
        if issubclass(cls, classes):
            return remedy
    for names, remedy in _ASYNCIO_REMEDIES:
        if issubclass(cls, asyncio_classes(*names)):
            return remedy
    if sqlalchemy.inspect(cls, raiseerr=False) is not None:
        return _MAPPED
    # Of an association proxy: it holds the instance that it belongs to.
    proxies = sys.modules.get("sqlalchemy.ext.associationproxy")
    if proxies is not None and issubclass(cls, proxies._AssociationCollection):
        return _COLLECTION
    for names in (_DBAPI_CONNECTION, _DBAPI_CURSOR):
        if all(callable(getattr(cls, name, None)) for name in names):
            return _CONNECTION
    return None


class RefusedError(Exception):
    """Carries a value that is not plain out of the pickler, and the remedy."""

    def __init__(self, value: object, remedy: Remedy) -> None:
        super().__init__(value, remedy)
        self.value = value
        self.remedy = remedy


class BoundaryPickler(pickle.Pickler):
    """Pickles plain values and refuses the rest.

    ``reducer_override`` is called only for what the C pickler does not know by itself,
    so rows of builtin values cost nothing.
    """

    def reducer_override(self, obj: object) -> Any:
        cls = type(obj)
        remedy = remedy_for(cls)
        if remedy is not None:
            raise RefusedError(obj, remedy)
        if cls is memoryview:  # psycopg2 reads binary columns as such
            return bytes, (bytes(cast("memoryview", obj)),)
        reduce = _multiprocessing_reducers.get(cls)
        return NotImplemented if reduce is None else reduce(obj)


@functools.cache
def by_value_pickler(*, calls: bool) -> Callable[..., pickle.Pickler] | None:
    """Give the pickler that sends functions and classes along with their code.

    Args:
        calls: Whether for calls, whose functions may mean the job's session by a
            global name.

    Returns:
        It; None without the extra ``cloudpickle``.
    """
    try:
        import cloudpickle
    except ImportError:
        return None

    class ByValuePickler(cloudpickle.Pickler):  # type: ignore[misc]
        def reducer_override(self, obj: object) -> Any:
            front_door = sys.modules[_FRONT_DOOR]
            if calls and obj is vars(front_door).get("session"):
                return getattr, (front_door, "session")
            reduced = BoundaryPickler.reducer_override(self, obj)
            if reduced is not NotImplemented:
                return reduced
            return super().reducer_override(obj)

    return ByValuePickler


def importable(*, advise: bool) -> str:
    """Say how functions and classes cross, where one could not.

    Args:
        advise: Whether to name what sends them with their code. Not to one who has it.
    """
    return "functions that workers can import" + advise * (
        "; for lambdas, notebooks and the prompt install dbpool-executor[cloudpickle]"
    )


def is_interactive() -> bool:
    """Say whether no other process can import this one's main module.

    So it is in a notebook, at the prompt, and in ``python -c``.
    """
    return not hasattr(sys.modules.get("__main__"), "__file__")


def with_code(value: object, dumps: Callable[[object], Any]) -> bytes:
    """Pickle a value, with the code of what the other process could not import.

    Args:
        value: The value, often a call.
        dumps: Pickles it without any code.

    Raises:
        RefusedError: Holds the value that is not plain.
        Exception: Whatever ``dumps`` raises.
    """
    failed: Exception | None = None
    # At the prompt it would pickle by its name, and not be found by that in a worker.
    if not is_interactive():
        try:
            return bytes(dumps(value))
        except RefusedError:
            raise
        except Exception as exc:
            failed = exc
    try:
        pickler = by_value_pickler(calls=True)
        if pickler is not None:
            return pickled(value, pickler=pickler)
        if failed is not None:
            raise failed
        return bytes(dumps(value))
    except RefusedError:
        raise
    except Exception:
        if failed is None:
            raise
        raise failed from None
    finally:
        del failed  # else its traceback and this frame hold each other


def pickled(
    value: object,
    buffers: list[pickle.PickleBuffer] | None = None,
    pickler: Callable[..., pickle.Pickler] = BoundaryPickler,
) -> bytes:
    """Pickle a plain value.

    Args:
        value: The value.
        buffers: Gets the out-of-band buffers; None keeps them in the pickle.
        pickler: Makes the pickler to do it with.

    Raises:
        RefusedError: Holds the value that is not plain.
        Exception: Whatever the pickling of the value raises.
    """
    out = io.BytesIO()
    callback = None if buffers is None else buffers.append
    pickler(out, PROTOCOL, buffer_callback=callback).dump(value)
    return out.getvalue()
