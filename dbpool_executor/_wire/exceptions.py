"""Exceptions as they cross between processes.

Runs in both processes. What a job raised arrives as itself wherever that is possible,
and always with the traceback that the worker saw.
"""

from __future__ import annotations

import pickle
import traceback
from collections import UserList
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from sqlalchemy.exc import StatementError

from ..errors import (
    OUTCOME_ATTRIBUTE,
    DBPoolError,
    JobFailedError,
    Outcome,
    WorkerTraceback,
    fields_of,
)
from .calls import Buffer
from .locate import full_name
from .picklers import BoundaryPickler, pickled

REPEAT = b"1"
"""What a worker advises where the job may succeed when it is run again."""
ASK_LEDGER = b"2"
"""And where contact was lost during the COMMIT of a claim."""

_PARTS = 3  # of an exception, before the advice


def dumps_exception(
    exc: BaseException, outcome: Outcome = Outcome.ROLLED_BACK
) -> list[Buffer]:
    """Pickle an exception so that the other process can always tell what it was.

    The exception travels as itself where its pickle gives it back; else rebuilt
    without its constructor, with the parts that do not pickle replaced by their
    ``repr``; else as its name and text.

    Args:
        exc: What the job raised.
        outcome: What happened to its transaction, if the exception does not say.

    Returns:
        An account that is always readable, then the exception itself and its cause,
        each empty where it cannot be rebuilt.
    """
    cause = None
    if isinstance(exc, DBPoolError):
        # In the other process __cause__ holds the worker's traceback, which tells of
        # the whole chain; only for our own errors is the cause a part of what is said.
        outcome, cause = exc.outcome or outcome, exc.__cause__
    account = (full_name(type(exc)), _text_of(exc, str), _traceback_of(exc), outcome)
    return [
        pickle.dumps(account),
        _portable(exc),
        b"" if cause is None else _portable(cause),
    ]


def loads_exception(parts: Sequence[Buffer]) -> BaseException:
    """Rebuild what :func:`dumps_exception` pickled; never raises.

    Returns:
        The exception, or a JobFailedError in its place, with the worker's traceback
        as its cause.
    """
    return loads_failure(parts)[0]


def loads_failure(parts: Sequence[Buffer]) -> tuple[BaseException, Outcome]:
    """Rebuild what :func:`dumps_exception` pickled; never raises.

    Returns:
        The exception, as of :func:`loads_exception`, and what happened to the
        transaction of the job that raised it.
    """
    class_name, text, worker_traceback, outcome = pickle.loads(parts[0])
    exc, inner = (_rebuilt(part) for part in parts[1:3])
    if exc is None:
        exc = JobFailedError(class_name, text, outcome)
    cause: BaseException = WorkerTraceback(worker_traceback)
    if inner is not None:
        set_cause(inner, cause)
        cause = inner
    set_cause(exc, cause)
    return exc, outcome


def text_of_failure(parts: Sequence[Buffer]) -> str:
    """Read of which class an exception is that was pickled; for a log."""
    class_name: str = pickle.loads(parts[0])[0]
    return class_name


def note_outcome(exc: BaseException, outcome: Outcome, note: str) -> None:
    """Write into an exception what :func:`outcome_of` reads, and a note for people.

    In the parent alone: what has something in its ``__dict__`` is pickled otherwise by
    some drivers.

    Args:
        exc: What a future is about to raise.
        outcome: What happened to the transaction of its job.
        note: A line below its traceback (PEP 678), which is added once.
    """
    carrier = exc
    if isinstance(exc, DBPoolError):
        if exc.outcome is not outcome:
            fields_of(exc)["outcome"] = outcome
    else:
        carrier = _carrier_of(exc)
        fields_of(carrier)[OUTCOME_ATTRIBUTE] = outcome.value
        if isinstance(exc, StatementError):
            _note_in_detail(exc, outcome)
    # Not add_note(): a class may guard its attributes.
    notes = fields_of(carrier).get("__notes__")
    notes = notes if isinstance(notes, list) else []
    if note not in notes:
        fields_of(carrier)["__notes__"] = [*notes, note]


def _carrier_of(exc: BaseException) -> BaseException:
    """Give the exception itself, or its cause if it would unpickle no more."""
    cause = exc.__cause__
    if not fields_of(exc) and isinstance(cause, WorkerTraceback):
        try:
            setattr(exc, OUTCOME_ATTRIBUTE, "")  # as unpickling does
        except Exception:
            return cause
    return exc


def _note_in_detail(error: StatementError, outcome: Outcome) -> None:
    # What else is in its dictionary, its own __reduce__ leaves out; and the driver's error
    # in it must have nothing in its own. So a list that may have attributes, of a class
    # that every process can unpickle.
    detail: UserList[str] = UserList(error.detail)
    setattr(detail, OUTCOME_ATTRIBUTE, outcome.value)
    fields_of(error)["detail"] = detail


def advice_of(parts: Sequence[Buffer]) -> bytes:
    """Give the worker's advice that follows an exception; empty if there is none."""
    return bytes(parts[_PARTS]) if len(parts) > _PARTS else b""


def set_cause(exc: BaseException, cause: BaseException) -> None:
    """Set ``__cause__``, also where a class guards its attributes."""
    # A frozen dataclass refuses plain assignment.
    BaseException.__setattr__(exc, "__cause__", cause)


def _rebuilt(data: Buffer) -> BaseException | None:
    try:
        exc = pickle.loads(data)
    except BaseException:  # it runs the class's own code, which may do anything
        return None
    return exc if isinstance(exc, BaseException) else None


def _portable(exc: BaseException) -> Buffer:
    # BaseException, here and below: pickling runs the class's own code, which may do
    # anything, and must not end the worker.
    try:
        data = pickled(exc, pickler=partial(_ExceptionPickler, {}))
        return data if type(pickle.loads(data)) is type(exc) else b""
    except BaseException:
        return b""


class _ExceptionPickler(BoundaryPickler):
    """Takes apart every exception that its own pickle does not give back.

    Args:
        known: By ``id()``, how each exception is pickled that was met, and itself.
        *args: As for ``pickle.Pickler``.
        **options: The same.
    """

    def __init__(
        self, known: dict[int, tuple[BaseException, Any]], *args: Any, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self._known = known

    def reducer_override(self, obj: object) -> Any:
        if not isinstance(obj, BaseException):
            return super().reducer_override(obj)
        if id(obj) not in self._known:
            # Met again inside itself, it is told as text.
            self._known[id(obj)] = obj, (str, (_text_of(obj, repr),))
            self._known[id(obj)] = obj, self._reduced(obj)
        return self._known[id(obj)][1]

    def _reduced(self, exc: BaseException) -> Any:
        if _gives_itself_back(exc):
            return NotImplemented
        # The builtin class knows the fields that it keeps outside of `args`, such as
        # the file name of an OSError.
        base = next(c for c in type(exc).__mro__ if c.__module__ == "builtins")
        reduced: tuple[Any, ...] = base.__reduce__(exc)  # type: ignore[call-arg, assignment]
        made_with, fields = reduced[1], reduced[2] if len(reduced) > 2 else None
        state = {**(fields or {}), **vars(exc)}
        return _put_together, (
            type(exc),
            base,
            tuple(map(self._or_text, made_with)),
            tuple(map(self._or_text, exc.args)),
            {name: self._or_text(value) for name, value in state.items()},
        )

    def _or_text(self, value: object) -> object:
        try:
            again = partial(_ExceptionPickler, self._known)
            pickle.loads(pickled(value, pickler=again))
        except BaseException:
            return _text_of(value, repr)
        return value


def _put_together(
    cls: type[BaseException],
    base: type[BaseException],
    made_with: tuple[object, ...],
    args: tuple[object, ...],
    state: dict[str, object],
) -> BaseException:
    # A constructor that takes other arguments than it leaves in `args` cannot be
    # called with them, so none is but the builtin one.
    exc = cls.__new__(cls, *made_with)
    base.__init__(exc, *made_with)
    BaseException.__setattr__(exc, "args", args)
    try:
        exc.__setstate__(state)
    except Exception:  # a class that guards its attributes
        vars(exc).update(state)
    return exc


def _gives_itself_back(exc: BaseException) -> bool:
    try:
        twin = pickle.loads(pickled(exc))
        return (
            type(twin) is type(exc)
            and str(twin) == str(exc)
            and repr(twin.args) == repr(exc.args)
        )
    except BaseException:
        return False


def _text_of(value: object, to_text: Callable[[object], str]) -> str:
    try:
        return str.__str__(to_text(value))  # not a subclass, which may not pickle
    except BaseException:
        return object.__repr__(value)


def _traceback_of(exc: BaseException) -> str:
    try:
        return "".join(traceback.format_exception(exc))
    except BaseException:  # a class whose notes or attributes raise
        return "".join(traceback.format_tb(exc.__traceback__))
