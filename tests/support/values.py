"""Classes whose instances cross between processes, or should not, and jobs for them.

Imported by tests and by workers, so it imports no pytest.
"""

from __future__ import annotations

import enum
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from decimal import Decimal
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

from pydantic import BaseModel
from sqlalchemy import select

import jobs
from dbpool_executor import session
from models import Item

# -- Plain ------------------------------------------------------------------------


class Colour(enum.Enum):
    """Two colours."""

    RED = "red"
    BLUE = "blue"


class Access(enum.Flag):
    """A flag."""

    READ = enum.auto()
    WRITE = enum.auto()


class Pair(NamedTuple):
    """A named tuple."""

    left: Any
    right: Any


@dataclass
class Box:
    """A dataclass."""

    content: Any
    label: str = ""


@dataclass(frozen=True, slots=True)
class FrozenBox:
    """A dataclass without a dictionary."""

    content: Any


@dataclass(eq=True)
class Invoice:
    """A dataclass of all that a database gives."""

    number: UUID
    day: date
    total: Decimal
    colour: Colour
    lines: list[Pair] = field(default_factory=list)


class Thing:
    """An object with attributes, equal to another one with the same."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Thing) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]

    def method(self) -> Any:
        """Give the attributes."""
        return vars(self)


class Slotted:
    """An object that has slots and no dictionary."""

    __slots__ = ("content",)

    def __init__(self, content: Any) -> None:
        self.content = content


class SlottedThing(Thing):
    """An object that has a dictionary and slots."""

    __slots__ = ("content",)

    def __init__(self, content: Any) -> None:
        super().__init__(name="thing")
        self.content = content


class ListWithAttributes(list[Any]):
    """A list that carries more than its elements."""


class Customer(BaseModel):
    """A pydantic model."""

    name: str
    born: date
    tags: dict[str, list[int]] = {}


# -- Not plain, by itself or in one process only ---------------------------------


class Unpicklable:
    """Its pickling raises."""

    def __reduce__(self) -> str:
        raise LookupError("this does not pickle")


class UnpicklesWith:
    """Its unpickling calls something that raises."""

    def __init__(self, raiser: Callable[[], object]) -> None:
        self.raiser = raiser

    def __reduce__(self) -> tuple[Callable[[], object], tuple[()]]:
        return self.raiser, ()


class Hostile:
    """It pickles, and raises when its attributes are looked at."""

    def __getattribute__(self, name: str) -> Any:
        if name in ("__reduce_ex__", "__class__"):
            return super().__getattribute__(name)
        raise RuntimeError("not outside of a request")

    def __reduce_ex__(self, protocol: object) -> tuple[type, tuple[()]]:
        return Hostile, ()


class HostileMapping(Mapping[str, int]):
    """It pickles, and raises when its items are looked at."""

    def __getitem__(self, key: str) -> int:
        raise RuntimeError("not outside of a request")

    def __iter__(self) -> Iterator[str]:
        raise RuntimeError("not outside of a request")

    def __len__(self) -> int:
        return 1


def raise_lookup_error() -> None:
    """Raise what a class's own unpickling may raise."""
    raise LookupError("this does not unpickle")


def raise_system_exit() -> None:
    """Try to end the process."""
    raise SystemExit(3)


# -- Exceptions --------------------------------------------------------------------


class PickyError(Exception):
    """Its constructor takes other arguments than it leaves in ``args``."""

    def __init__(self, code: int, *, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail


class PickyOSError(OSError):
    """The same for a class whose fields are not in its dictionary."""

    def __init__(self, path: str) -> None:
        super().__init__(2, "no such file", path)


class PickyDecodeError(UnicodeDecodeError):
    """The same for a class that needs five arguments."""

    def __init__(self, codec: str) -> None:
        super().__init__(codec, b"\xff", 0, 1, "invalid start byte")


class FalsyError(Exception):
    """An exception that is false."""

    def __bool__(self) -> bool:
        return False


class EmptyError(Exception):
    """An exception that is false because it has no elements."""

    def __len__(self) -> int:
        return 0


@dataclass(frozen=True)
class FrozenError(Exception):
    """An exception whose attributes cannot be set."""

    code: int


class MuteError(Exception):
    """Neither its text nor its representation can be had."""

    def __str__(self) -> str:
        raise RuntimeError("no text")

    def __repr__(self) -> str:
        raise RuntimeError("no representation")


class StrangeText(str):
    """Text whose pickling raises."""

    __slots__ = ()

    def __reduce__(self) -> str:
        raise LookupError("this text does not pickle")


class StrangeTextError(Exception):
    """Its text is of a class that does not pickle."""

    def __str__(self) -> str:
        return StrangeText("strange")


class ReduceRaisesError(Exception):
    """Its pickling raises."""

    def __reduce__(self) -> str:
        raise RuntimeError("no pickle")


class UnpicklesWithExitError(Exception):
    """Its unpickling tries to end the process."""

    def __reduce__(self) -> tuple[Callable[[], object], tuple[()]]:
        return raise_system_exit, ()


class UnpicklesAsTextError(Exception):
    """Its unpickling gives something else."""

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return str, ("not an exception",)


class EqualToNothingError(Exception):
    """Its comparison raises, as an array's truth does."""

    def __eq__(self, other: object) -> bool:
        raise ValueError("ambiguous")

    __hash__ = Exception.__hash__


def error_with(base: type[BaseException], *args: Any, **attributes: Any) -> Any:
    """Make an exception that has attributes."""
    exc = base(*args)
    vars(exc).update(attributes)
    return exc


def error_with_lock() -> Exception:
    """Make an exception that carries what does not pickle."""
    error: Exception = error_with(ValueError, "text", 7, code=5, lock=threading.Lock())
    return error


def error_that_holds_itself() -> BaseException:
    """Make a cycle that pickles."""
    error: BaseException = error_with(ValueError, "text")
    vars(error)["me"] = error
    return error


def picky_error_that_holds_itself() -> BaseException:
    """Make a cycle that does not unpickle."""
    error = PickyError(1, detail="text")
    vars(error)["me"] = error
    return error


def errors_that_hold_each_other() -> BaseException:
    """Make a cycle of two, through containers."""
    error, other = PickyError(1, detail="first"), error_with_lock()
    vars(error)["others"] = [other]
    vars(other)["back"] = {"back": error}
    return error


def long_chain_of_errors() -> BaseException:
    """Make thirty, each of which holds the one before it."""
    error: BaseException = error_with_lock()
    for code in range(30):
        outer = PickyError(code, detail="link")
        vars(outer)["inner"] = error
        error = outer
    return error


def deep_group_of_errors() -> BaseException:
    """Make a group in a group, thirty times."""
    error: Exception = PickyError(1, detail="leaf")
    for _ in range(30):
        error = ExceptionGroup("group", [error])
    return error


# -- Jobs --------------------------------------------------------------------------


def identity(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """Give back all that came."""
    return args, kwargs


def insert_and_give_itself(name: str, wrap: Callable[[Any], Any]) -> Any:
    """Write an item and try to give the mapped instance away."""
    item = Item(name=name, amount=0)
    session.add(item)
    session.flush()
    return wrap(item)


def as_rows(item: Any) -> dict[str, list[Any]]:
    """Put something at ``['rows'][3]``."""
    return {"rows": [1, 2, 3, item]}


def insert_and_select(name: str, *, mappings: bool) -> Any:
    """Write an item and give the row as the database tells it."""
    session.add(Item(name=name, amount=7))
    result = session.execute(select(Item.id, Item.name, Item.amount))
    return result.mappings().all() if mappings else result.all()


def insert_and_give_called(name: str, call: Callable[[], Any]) -> Any:
    """Write an item and give what a function makes in the worker."""
    session.add(Item(name=name, amount=0))
    session.flush()
    return call()


def make_lock() -> dict[str, Any]:
    """Make something that no process can give away."""
    return {"locks": [threading.Lock()]}


def start_method() -> str | None:
    """Tell how this process was started, as far as it was told."""
    return multiprocessing.get_start_method(allow_none=True)


def raise_(exc: BaseException) -> None:
    """Raise what the caller made."""
    raise exc


def raise_called(call: Callable[[], BaseException]) -> None:
    """Raise what a function makes in the worker."""
    raise call()


def add_one(array: Any) -> Any:
    """Change an array in place, which needs memory that may be written."""
    array += 1
    return array


def say_through(connection: Connection, word: str) -> None:
    """Send a word through a pipe that came as an argument."""
    with connection:
        connection.send(word)


def make_thing(number: int) -> Thing:
    """Make an object that can be referred to weakly."""
    return Thing(number=number)


def give_or_raise(value: int, bad: int) -> int:
    """Give back what came, unless it is bad."""
    if value == bad:
        raise KeyError(value)
    return value


def note_and_wait(record: Path, number: int, gate: tuple[str, int] | None) -> int:
    """Note which job this is; then wait at a gate, or be a job that takes a while."""
    jobs.note(record, number)
    if gate is None:
        time.sleep(0.05)
    else:
        jobs.wait_at_gate(gate)
    return number


def note_and_raise_or_wait(
    record: Path, number: int, gate: tuple[str, int] | None
) -> int:
    """Do the same, but the job that takes a while raises."""
    note_and_wait(record, number, gate)
    if gate is None:
        raise KeyError(number)
    return number


def remember(word: str) -> None:
    """As an initializer: keep a word in this process."""
    _remembered.append(word)


def remembered() -> list[str]:
    """Give the words that this process was told to keep."""
    return _remembered


_remembered: list[str] = []
