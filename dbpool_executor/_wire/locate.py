"""Where in a value something sits, told as the code that would reach it.

Runs in both processes, and only after something was found that cannot cross.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

from sqlalchemy.engine import Row, RowMapping


def full_name(cls: type) -> str:
    """Give a class's module and qualified name, without ``builtins``."""
    if cls.__module__ == "builtins":
        return cls.__qualname__
    return f"{cls.__module__}.{cls.__qualname__}"


def name_of(fn: object, args: Sequence[object] = ()) -> str:
    """Give the name by which people know the function of a call; never raises.

    Args:
        fn: What is called.
        args: Its arguments: where they begin with a function that is called for each of
            the others, it is that one's name.
    """
    try:
        while isinstance(fn, partial):
            fn = fn.func
        if getattr(fn, "is_called_for_another", False) is True:
            return name_of(args[0])
        name = fn.__qualname__  # type: ignore[attr-defined]
        # As which spawned workers import the main module.
        module = "__main__" if fn.__module__ == "__mp_main__" else fn.__module__
        if isinstance(name, str):
            return name if module in (None, "builtins") else f"{module}.{name}"
    except Exception:  # an attribute of the caller's own that raises
        return full_name(type(fn))
    return full_name(type(fn))


def asyncio_classes(*names: str) -> tuple[type, ...]:
    """Give classes of SQLAlchemy's asyncio extension, for ``isinstance``.

    Args:
        names: Of the classes.

    Returns:
        None of them if the extension was not imported: then nothing is one of theirs.
        It needs greenlet, which SQLAlchemy 2.1 does not bring along.
    """
    extension = sys.modules.get("sqlalchemy.ext.asyncio")
    found = (getattr(extension, name, None) for name in names)
    return tuple(cls for cls in found if isinstance(cls, type))


def place_of(culprit: object, roots: Mapping[str, object]) -> str | None:
    """Find an object inside some values.

    Args:
        culprit: The object itself.
        roots: The values by name.

    Returns:
        Such as ``result['rows'][3]``; None if it is not found.
    """
    stack = list(roots.items())[::-1]
    seen: dict[int, object] = {}  # holds the values: an id is good while they live
    while stack:
        place, value = stack.pop()
        if value is culprit:
            return place
        if id(value) not in seen:
            seen[id(value)] = value
            stack.extend(_listed(place, value)[::-1])
    return None


def innermost(
    is_culprit: Callable[[object], bool],
    roots: Mapping[str, object],
    is_whole: Callable[[object], bool] = lambda _: False,
) -> tuple[str, object] | None:
    """Find the innermost value of which something is true.

    Args:
        is_culprit: True of a value if it is true of something inside.
        roots: The values by name.
        is_whole: True of a value that is not to be looked into.

    Returns:
        Its place, and the value.
    """
    found: tuple[str, object] | None = None
    seen: dict[int, object] = {}
    candidates: Iterator[tuple[str, object]] = iter(roots.items())
    while True:
        inner = next(
            (c for c in candidates if id(c[1]) not in seen and is_culprit(c[1])), None
        )
        if inner is None:
            break
        found = inner
        if is_whole(inner[1]):
            break
        seen[id(inner[1])] = inner[1]
        candidates = iter(_listed(*inner))
    return found


_LEAVES = (
    type, str, bytes, bytearray, int, float, complex, type(None),
    FunctionType, BuiltinFunctionType, ModuleType,
)  # fmt: skip


def _listed(place: str, value: object) -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    with suppress(Exception):  # a value that raises when it is looked at
        found.extend(_children(place, value))
    return found


def _children(place: str, value: object) -> Iterator[tuple[str, object]]:
    """Give the places and values directly inside a value."""
    if isinstance(value, _LEAVES):
        return
    if place.startswith(("a key of ", "an element of ")):
        place = f"({place})"
    if isinstance(value, (RowMapping, Mapping)):
        yield from _items(place, value)
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        yield from (
            (f"{place}.{k}", v) for k, v in zip(value._fields, value, strict=True)
        )
    elif isinstance(value, (list, tuple, deque, Row)):
        yield from ((f"{place}[{i}]", v) for i, v in enumerate(value))
    elif isinstance(value, AbstractSet):
        yield from ((f"an element of {place}", v) for v in value)
    elif isinstance(value, partial):
        yield f"{place}.func", value.func
        yield f"{place}.args", value.args
        yield f"{place}.keywords", value.keywords
    elif isinstance(value, MethodType):
        yield f"{place}.__self__", value.__self__
    if isinstance(value, BaseException):
        yield f"{place}.args", value.args
    yield from _slots(place, value)
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict):
        yield from ((f"{place}.{k}", v) for k, v in attributes.items())
    elif not isinstance(value, (list, tuple, dict, set, frozenset, RowMapping)):
        # Slots, and whatever else a class hands to its pickle by itself.
        with suppress(Exception):
            reduced = value.__reduce_ex__(5)
            if isinstance(reduced, tuple):
                yield from _reduced(place, reduced[1:])


def _slots(place: str, value: object) -> Iterator[tuple[str, object]]:
    for cls in type(value).__mro__:
        names = cls.__dict__.get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            with suppress(AttributeError):
                yield f"{place}.{name}", getattr(value, name)


def _items(
    place: str, mapping: Mapping[Any, object] | RowMapping
) -> Iterator[tuple[str, object]]:
    for key, value in mapping.items():
        yield f"{place}[{key!r}]", value
        yield f"a key of {place}", key


def _reduced(place: str, parts: tuple[object, ...]) -> Iterator[tuple[str, object]]:
    for part in parts:
        for item in part if isinstance(part, tuple) else (part,):
            if isinstance(item, dict):
                yield from ((f"{place}.{k}", v) for k, v in item.items())
            else:
                yield place, item
