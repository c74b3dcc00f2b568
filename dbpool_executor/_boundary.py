"""What may cross between processes, and its bytes.

Runs in both processes. Calls go in, results and exceptions come out; each function
here either gives bytes that are known to be plain or says what is not, and where.
"""

from __future__ import annotations

import functools
import io
import pickle
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from multiprocessing.reduction import ForkingPickler
from types import FunctionType
from typing import Any, NamedTuple

import sqlalchemy
from sqlalchemy import Connection, Engine, Result, ScalarResult
from sqlalchemy.engine import FilterResult, MappingResult
from sqlalchemy.orm import Query, Session, scoped_session, sessionmaker
from sqlalchemy.orm.state import InstanceState
from sqlalchemy.pool import PoolProxiedConnection

from ._places import asyncio_classes, full_name, innermost, place_of
from .errors import NotPlainError, Outcome

_SHORT = {type(None), bool, int, float}  # as plain as can be, and of a few bytes
_ATOMS = _SHORT | {str}

Buffer = bytes | bytearray | memoryview
"""One piece of a message; a memoryview is one of bytes."""

WITH_CODE = (
    "and functions that workers can import; for lambdas, notebooks and the prompt "
    "install dbpool-executor[cloudpickle]"
)
"""What to add where a function or class could not cross."""

_PROTOCOL = 5  # the first with out-of-band buffers (PEP 574)


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
    for names in (_DBAPI_CONNECTION, _DBAPI_CURSOR):
        if all(callable(getattr(cls, name, None)) for name in names):
            return _CONNECTION
    return None


class RefusedError(Exception):
    """Carries the value that is not plain out of the pickler."""


class BoundaryPickler(pickle.Pickler):
    """Pickles plain values and refuses the rest.

    ``reducer_override`` is called only for what the C pickler does not know by itself,
    so rows of builtin values cost nothing.
    """

    def reducer_override(self, obj: object) -> Any:
        cls = type(obj)
        if remedy_for(cls) is not None:
            raise RefusedError(obj)
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
            front_door = sys.modules[__package__]
            if calls and obj is vars(front_door).get("session"):
                return getattr, (front_door, "session")
            reduced = BoundaryPickler.reducer_override(self, obj)
            if reduced is not NotImplemented:
                return reduced
            return super().reducer_override(obj)

    return ByValuePickler


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
    pickler = by_value_pickler(calls=True)
    if pickler is None:
        if failed is not None:
            raise failed
        return bytes(dumps(value))
    try:
        return pickled(value, pickler=pickler)
    except RefusedError:
        raise
    except Exception:
        if failed is None:
            raise
        raise failed from None


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
    pickler(out, _PROTOCOL, buffer_callback=callback).dump(value)
    return out.getvalue()


def dumps_call(
    fn: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]
) -> bytes:
    """Pickle a call for a worker.

    Everything is copied here: what the caller changes later does not reach the job.

    Args:
        fn: The function.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Returns:
        Bytes for :func:`loads_call`.

    Raises:
        NotPlainError: An argument is tied to a session or connection.
        Exception: Whatever the pickling of an argument raises.
    """
    # A pickler that asks for more costs more than all the rest of a short call, and so
    # does the pickle of a function, which imports its module each time.
    if type(fn) is FunctionType and not kwargs and _ATOMS.issuperset(map(type, args)):
        module = fn.__module__
        if getattr(sys.modules.get(module), fn.__name__, None) is fn and (
            module != "__main__" or not is_interactive()
        ):
            return pickle.dumps((module, fn.__name__, args), _PROTOCOL)
    try:
        return with_code((fn, args, kwargs), pickled)
    except RefusedError as refused:
        roots = {"fn": fn, "args": args, "kwargs": kwargs}
        raise _not_plain(refused.args[0], roots, Outcome.NEVER_STARTED) from None
    except Exception as exc:
        _note_culprit(exc, {"fn": fn, "args": args, "kwargs": kwargs})
        raise


def loads_call(
    data: Buffer,
) -> tuple[Callable[..., object], tuple[object, ...], dict[str, object]]:
    """Rebuild what :func:`dumps_call` pickled.

    Raises:
        Exception: Whatever the unpickling of an argument raises.
    """
    call: tuple[Any, Any, Any] = pickle.loads(data)
    module, name, args = call
    if type(name) is not str:
        return call
    try:
        return getattr(sys.modules[module], name), args, {}
    except (KeyError, AttributeError):
        return getattr(import_module(module), name), args, {}


def dumps_result(value: object) -> list[Buffer]:
    """Pickle a job's result.

    Args:
        value: What the job returned.

    Returns:
        The pickle, then its out-of-band buffers without a copy (PEP 574).

    Raises:
        NotPlainError: Something in the value is tied to a session or connection.
        Exception: Whatever the pickling of the value raises.
    """
    if type(value) in _SHORT:
        return [pickle.dumps(value, _PROTOCOL)]
    try:
        return _parts_of(value)
    except RefusedError as refused:
        roots = {"result": value}
        raise _not_plain(refused.args[0], roots, Outcome.ROLLED_BACK) from None
    except Exception as exc:
        _note_culprit(exc, {"result": value})
        raise


def _parts_of(value: object) -> list[Buffer]:
    buffers: list[pickle.PickleBuffer] = []
    try:
        body = _pickled_in_spare(value, buffers)
    except (pickle.PicklingError, AttributeError) as exc:
        # A class of a notebook, which only its code has brought here. Of no other error
        # is the text asked for: that of a refused value would be the value's own.
        pickler = by_value_pickler(calls=False) if "__main__" in str(exc) else None
        if pickler is None:
            raise
        buffers.clear()
        body = pickled(value, buffers, pickler)
    return [body, *(buffer.raw() for buffer in buffers)]


# Memory for the next pickle of a result. To have the system make as many new pages for
# a large one costs more than the pickling.
_spares: list[io.BytesIO] = []
_SPARE_MOST = 1 << 23  # bytes


def _pickled_in_spare(value: object, buffers: list[pickle.PickleBuffer]) -> Buffer:
    try:
        out = _spares.pop()
        out.seek(0)
        out.write(b"")  # refused as long as there is a view of it
    except (IndexError, BufferError):
        out = io.BytesIO()
    BoundaryPickler(out, _PROTOCOL, buffer_callback=buffers.append).dump(value)
    size = out.tell()
    body = out.getbuffer()[:size]
    if size <= _SPARE_MOST:
        _spares.append(out)
    return body


def loads_result(parts: Sequence[Buffer]) -> object:
    """Rebuild what :func:`dumps_result` pickled.

    Raises:
        Exception: Whatever the unpickling of the value raises.
    """
    if len(parts) == 1:
        return pickle.loads(parts[0])
    # What is made over bytes is read-only; what was large has arrived in a bytearray.
    buffers = [b if isinstance(b, bytearray) else bytearray(b) for b in parts[1:]]
    return pickle.loads(parts[0], buffers=buffers)


# -- What is said of it ---------------------------------------------------------


def _not_plain(
    culprit: object, roots: Mapping[str, object], outcome: Outcome
) -> NotPlainError:
    remedy = remedy_for(type(culprit)) or _MAPPED
    place = place_of(culprit, roots) or f"something inside {' or '.join(roots)}"
    text = remedy.as_result if outcome is Outcome.ROLLED_BACK else remedy.as_argument
    return NotPlainError(place, full_name(type(culprit)), text, outcome)


def _note_culprit(error: Exception, roots: Mapping[str, object]) -> None:
    # Too deep to pickle is too deep to search.
    found = None
    if not isinstance(error, RecursionError):
        found = innermost(lambda value: not _pickles(value), roots)
    if found is not None:
        place, value = found
        with suppress(Exception):  # a frozen exception takes no notes
            error.add_note(
                f"{place} is a {full_name(type(value))}, which does not pickle; only "
                "plain values cross between processes"
                + (f", {WITH_CODE}" if hasattr(value, "__qualname__") else "")
            )


def _pickles(value: object) -> bool:
    try:
        pickled(value)
    except RefusedError:
        return True  # what is refused is told of otherwise
    except Exception:
        return False
    return True
