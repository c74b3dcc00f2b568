"""The bytes of calls and results.

Runs in both processes. Calls go in, results come out; each function here either gives
bytes that are known to be plain or says what is not, and where.
"""

from __future__ import annotations

import io
import pickle
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from types import FunctionType

from ..errors import NotPlainError, Outcome
from .locate import full_name, innermost, name_of, place_of
from .picklers import (
    PROTOCOL,
    BoundaryPickler,
    RefusedError,
    by_value_pickler,
    importable,
    is_interactive,
    pickled,
    with_code,
)

_SHORT = {type(None), bool, int, float}  # as plain as can be, and of a few bytes
_ATOMS = _SHORT | {str}
# The pickle of a number of 32 bits. pickle.dumps() makes a pickler each time.
_pack_int = struct.Struct("<3sic").pack
_PROTO_BININT = pickle.PROTO + bytes([PROTOCOL]) + pickle.BININT
_find_module = sys.modules.get
_FEW = 8  # arguments of a short call
_SHORT_TEXT = 64  # characters of one of them

Buffer = bytes | bytearray | memoryview
"""One piece of a message; a memoryview is one of bytes."""

Function = Callable[..., object]

Call = tuple[object, ...] | Buffer
"""A call on its way: a few short atoms as the arguments of a module's function, or else
the pickle of all of it."""

Name = tuple[str, str]
"""The module of a function, and what it is called there."""

Label = str
"""The name of a function as people read it, where it is a part of a pickle as well."""

Run = tuple[Function | None, list[Call]]
"""Calls of one function in a row; those that are pickles have none."""

# The function of the last short call and its name. Most jobs call the same one, and one
# tuple for all of them is less for the collector of garbage to look at.
_last: tuple[Function | None, Name] = None, ("", "")


def pack_short(
    fn: Function, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[Name | Label, Call] | None:
    """Pack a call of a module's function with a few atoms; none of its code is run.

    A short call is made of what nobody can change, and is pickled with others when it is
    sent, for a fifth of the cost.

    Args:
        fn: The function.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Returns:
        As of :func:`pack_call`; None if it is another call.
    """
    global _last
    # A pickler that asks for more costs more than all the rest of a short call, and so
    # does the pickle of a function, which imports its module each time.
    is_short = len(args) <= _FEW
    for arg in args:
        if type(arg) not in _SHORT and not (
            type(arg) is str and len(arg) <= _SHORT_TEXT
        ):
            is_short = False
            break
    if (
        type(fn) is FunctionType
        and not kwargs
        and (is_short or _ATOMS.issuperset(map(type, args)))
    ):
        last, name = _last
        if last is not fn:
            name = fn.__module__, fn.__name__
        module, attribute = name
        # Also if it is the last one: another may have its name by now.
        if getattr(_find_module(module), attribute, None) is fn and (
            module != "__main__" or not is_interactive()
        ):
            if last is not fn:
                _last = fn, name
            if is_short:
                return name, args
            return f"{module}.{attribute}", _dumps_call(name, args)
    return None


def pack_call(
    fn: Function, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[Name | Label, Call]:
    """Pickle a call for a worker, unless it is short.

    Everything is copied here: what the caller changes later does not reach the job.

    Args:
        fn: The function.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Returns:
        The function's name and the call, if it is a short one; else its label and the
        pickle, for :func:`unpack_call`.

    Raises:
        NotPlainError: An argument is tied to a session or connection.
        Exception: Whatever the pickling of an argument raises.
    """
    packed = pack_short(fn, args, kwargs)
    if packed is not None:
        return packed
    try:
        return name_of(fn, args), with_code((fn, args, kwargs), pickled)
    except RefusedError as refused:
        roots = {"fn": fn, "args": args, "kwargs": kwargs}
        raise _not_plain(refused, roots, Outcome.NEVER_STARTED) from None
    except Exception as exc:
        _note_culprit(exc, {"fn": fn, "args": args, "kwargs": kwargs})
        raise


def _dumps_call(name: Name, args: Call) -> bytes:
    return pickle.dumps((*name, args), PROTOCOL)


def unpack_call(data: Buffer) -> tuple[Function, tuple[object, ...], dict[str, object]]:
    """Rebuild a call that :func:`pack_call` has pickled.

    Raises:
        Exception: Whatever the unpickling of an argument raises.
    """
    module, name, args = pickle.loads(data)
    if type(name) is not str:
        return (module, name, args)
    try:
        return getattr(sys.modules[module], name), args, {}
    except (KeyError, AttributeError):
        return getattr(import_module(module), name), args, {}


def dumps_calls(runs: list[tuple[Name | None, list[Call]]]) -> bytes:
    """Pickle calls that go together; of those that are pickles already, a copy."""
    return pickle.dumps(runs, PROTOCOL)


def loads_calls(data: Buffer) -> list[Run]:
    """Rebuild what :func:`dumps_calls` pickled; runs no code of the caller's.

    The calls of a function whose module is not imported here become pickles.
    """
    runs: list[Run] = []
    for name, calls in pickle.loads(data):
        module, attribute = name or ("", "")
        fn = getattr(sys.modules.get(module), "__dict__", {}).get(attribute)
        if fn is None and name is not None:
            runs.append((None, [_dumps_call(name, args) for args in calls]))
        else:
            runs.append((fn, calls))
    return runs


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
    if type(value) is int:
        try:
            return [_pack_int(_PROTO_BININT, value, b".")]
        except struct.error:
            pass  # it takes more than 32 bits
    if type(value) in _SHORT:
        return [pickle.dumps(value, PROTOCOL)]
    try:
        return _parts_of(value)
    except RefusedError as refused:
        roots = {"result": value}
        raise _not_plain(refused, roots, Outcome.ROLLED_BACK) from None
    except Exception as exc:
        _note_culprit(exc, {"result": value}, is_result=True)
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


class _Spare(io.BytesIO):
    """Memory for a pickle, which may become garbage together with a view of it."""

    def close(self) -> None:
        # Called by the garbage collector, which may come to the view later. The memory
        # is freed after both, closed or not.
        with suppress(BufferError):
            super().close()


# Memory for the next pickle of a result. To have the system make as many new pages for
# a large one costs more than the pickling.
_spares: list[_Spare] = []
_SPARE_MOST = 1 << 23  # bytes


def _pickled_in_spare(value: object, buffers: list[pickle.PickleBuffer]) -> Buffer:
    try:
        out = _spares.pop()
        out.seek(0)
        out.write(b"")  # refused as long as there is a view of it
    except (IndexError, BufferError):
        out = _Spare()
    BoundaryPickler(out, PROTOCOL, buffer_callback=buffers.append).dump(value)
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
    refused: RefusedError, roots: Mapping[str, object], outcome: Outcome
) -> NotPlainError:
    value, remedy = refused.value, refused.remedy
    place = place_of(value, roots) or f"something inside {' or '.join(roots)}"
    text = remedy.as_result if outcome is Outcome.ROLLED_BACK else remedy.as_argument
    return NotPlainError(place, full_name(type(value)), text, outcome)


def _note_culprit(
    error: Exception, roots: Mapping[str, object], *, is_result: bool = False
) -> None:
    if isinstance(error, RecursionError):
        return  # too deep to pickle is too deep to search
    # Only where something fails: it imports much that no job needs.
    from .instead import instead_of

    advice = partial(instead_of, is_result=is_result)
    found = innermost(
        lambda value: not _pickles(value), roots, lambda value: bool(advice(value))
    )
    if found is not None:
        place, value = found
        told = advice(value) or "only plain values cross between processes" + (
            f", and {importable(advise=by_value_pickler(calls=True) is None)}"
            if hasattr(value, "__qualname__")
            else ""
        )
        note = f"{place} is a {full_name(type(value))}, which does not pickle; {told}"
    elif is_interactive():
        note = (
            "something that is defined in the main module cannot be sent with its "
            "code; define it in a module that workers can import"
        )
    else:
        return
    with suppress(Exception):  # a frozen exception takes no notes
        error.add_note(note)


def _pickles(value: object) -> bool:
    try:
        pickled(value)
    except RefusedError:
        return True  # what is refused is told of otherwise
    except Exception:
        return False
    return True
