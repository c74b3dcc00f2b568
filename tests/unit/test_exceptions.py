"""What a job raised, as it arrives on the other side.

No worker: each exception makes the way there and back in this process.
"""

from __future__ import annotations

import pickle
import sqlite3
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, exc, text
from sqlalchemy.orm import Session
from sqlalchemy.orm.exc import StaleDataError

import programs
import values
from dbpool_executor import (
    JobFailedError,
    NotPlainError,
    Outcome,
    OutcomeUnknownError,
    WorkerDiedError,
)
from dbpool_executor._wire.exceptions import dumps_exception, loads_exception, set_cause
from dbpool_executor._wire.locate import full_name
from dbpool_executor.errors import WorkerTraceback
from models import Item
from waiting import LONGEST


def raised(exc: BaseException) -> BaseException:
    """Raise an exception and catch it, so that it has a traceback."""
    try:
        values.raise_(exc)
    except BaseException as caught:
        return caught
    raise AssertionError("nothing was raised")


def round_trip(exc: BaseException) -> Any:
    """Send an exception over, as a worker's answer is sent."""
    parts = [bytes(part) for part in dumps_exception(raised(exc))]
    return loads_exception(parts)


def text_of(exc: BaseException) -> str:
    """Give what an exception says, if it says anything."""
    try:
        return str(exc)
    except Exception:
        return "?"


def statement_error(statement: str, params: Any = None) -> BaseException:
    """Give what SQLAlchemy raises for a statement on SQLite."""
    engine = create_engine("sqlite://")
    try:
        with engine.connect() as connection:
            connection.execute(text(statement), params or {})
    except exc.SQLAlchemyError as error:
        return error
    finally:
        engine.dispose()
    raise AssertionError("the statement did not fail")


def decode_error() -> UnicodeDecodeError:
    """Give a real one, with its five fields."""
    try:
        b"ab\xff".decode()
    except UnicodeDecodeError as error:
        return error
    raise AssertionError("that is not UTF-8")


ITSELF: dict[str, Callable[[], BaseException]] = {
    "builtin": lambda: ValueError("text", 7),
    "no arguments": RuntimeError,
    "key": lambda: KeyError("key"),
    "stop": lambda: StopIteration(5),
    "file not found": lambda: FileNotFoundError(2, "no such file", "/path", None, "b"),
    "connection refused": lambda: ConnectionRefusedError(111, "refused"),
    "decode": decode_error,
    "import": lambda: ImportError("no module", name="shop", path="/shop.py"),
    "syntax": lambda: SyntaxError("bad", ("f.py", 1, 2, "x =", 1, 3)),
    "attributes": lambda: values.error_with(ValueError, "text", code=5),
    "integrity": lambda: exc.IntegrityError(
        "INSERT", {"a": 1}, sqlite3.IntegrityError("UNIQUE constraint failed")
    ),
    "operational": lambda: statement_error("SELECT 1 FROM nowhere"),
    "no result": lambda: exc.NoResultFound("none"),
    "stale": lambda: StaleDataError("stale"),
    "picky": lambda: values.PickyError(5, detail="bad"),
    "falsy": lambda: values.FalsyError("falsy"),
    "empty": lambda: values.EmptyError("empty"),
    "frozen": lambda: values.FrozenError(5),
    "group": lambda: ExceptionGroup("group", [ValueError(1), KeyError("k")]),
    "group of picky": lambda: ExceptionGroup(
        "outer", [ExceptionGroup("inner", [values.PickyError(1, detail="d")])]
    ),
    "equal to nothing": lambda: values.EqualToNothingError("a"),
    "broken pool": lambda: BrokenProcessPool("broken"),
    "exit": lambda: SystemExit(3),
}


@pytest.mark.parametrize("kind", ITSELF)
def test_exception_arrives_as_itself(kind: str) -> None:
    """Type, text, arguments and attributes are what they were."""
    exc = ITSELF[kind]()
    twin = round_trip(exc)
    assert type(twin) is type(exc)
    assert str(twin) == str(exc)
    assert repr(twin.args) == repr(exc.args)
    assert {k: str(v) for k, v in vars(twin).items()} == {
        k: str(v) for k, v in vars(exc).items()
    }


@pytest.mark.parametrize("kind", ITSELF)
def test_cause_is_the_traceback_of_the_worker(kind: str) -> None:
    """It shows the lines that raised, in the function that raised."""
    cause = round_trip(ITSELF[kind]()).__cause__
    assert isinstance(cause, WorkerTraceback)
    assert "in raise_\n" in str(cause)
    assert "Traceback (most recent call last)" in str(cause)
    assert type(ITSELF[kind]()).__name__ in str(cause)


def test_chain_of_causes_is_told_in_the_traceback() -> None:
    """What came before it is text, since no pickle keeps it."""
    try:
        try:
            values.raise_(KeyError("first"))
        except KeyError as error:
            raise ValueError("second") from error
    except ValueError as error:
        twin: Any = loads_exception(dumps_exception(error))
    assert "KeyError: 'first'" in str(twin.__cause__)
    assert "direct cause" in str(twin.__cause__)


def test_notes_arrive() -> None:
    """What was added to an exception on its way stays with it."""
    error = values.PickyError(1, detail="d")
    error.add_note("while loading shop 7")
    twin = round_trip(error)
    assert twin.__notes__ == ["while loading shop 7"]
    assert "while loading shop 7" in str(twin.__cause__)


def test_fields_of_builtin_exceptions_arrive() -> None:
    """Those that no dictionary holds, too."""
    missing: Any = round_trip(FileNotFoundError(2, "no such file", "/a", None, "/b"))
    assert (missing.errno, missing.filename, missing.filename2) == (2, "/a", "/b")
    decode: Any = round_trip(decode_error())
    assert (decode.encoding, decode.object, decode.start) == ("utf-8", b"ab\xff", 2)
    module: Any = round_trip(ImportError("no module", name="shop", path="/shop.py"))
    assert (module.name, module.path) == ("shop", "/shop.py")


def test_fields_of_picky_builtin_exceptions_arrive() -> None:
    """A class with a constructor of its own keeps what its base keeps in C."""
    missing: Any = round_trip(values.PickyOSError("/a"))
    assert type(missing) is values.PickyOSError
    assert (missing.errno, missing.strerror, missing.filename) == (
        2,
        "no such file",
        "/a",
    )
    assert str(missing) == str(values.PickyOSError("/a"))
    decode: Any = round_trip(values.PickyDecodeError("utf-8"))
    assert type(decode) is values.PickyDecodeError
    assert str(decode) == str(values.PickyDecodeError("utf-8"))


def test_fields_of_builtin_exceptions_arrive_beside_what_does_not_pickle() -> None:
    """One attribute that cannot travel costs that attribute alone."""
    for error in (
        FileNotFoundError(2, "no such file", "/a"),
        decode_error(),
        ImportError("no module", name="shop", path="/shop.py"),
        StopIteration(5),
    ):
        vars(error)["item"] = Item(id=1)
        twin = round_trip(error)
        assert type(twin) is type(error)
        assert str(twin) == str(error)
        for name in ("errno", "filename", "encoding", "start", "path", "value"):
            assert getattr(twin, name, None) == getattr(error, name, None)


def test_error_of_a_driver_arrives_inside_that_of_sqlalchemy() -> None:
    """``orig`` is the driver's exception, statement and parameters are there."""
    error: Any = statement_error("SELECT 1 FROM nowhere WHERE a = :a", {"a": 5})
    twin = round_trip(error)
    assert type(twin) is exc.OperationalError
    assert type(twin.orig) is sqlite3.OperationalError
    assert str(twin.orig) == "no such table: nowhere"
    assert (twin.statement, twin.params) == (error.statement, error.params)
    assert twin.code == error.code
    assert twin.connection_invalidated is False


def test_parameter_that_does_not_pickle_does_not_hide_the_error() -> None:
    """The database's error arrives; the parameter is replaced by its text."""
    for params in ({"a": values.Unpicklable()}, [{"a": Item(id=1)}, {"a": 2}]):
        error = exc.IntegrityError(
            "INSERT", params, sqlite3.IntegrityError("UNIQUE constraint failed")
        )
        twin = round_trip(error)
        assert type(twin) is exc.IntegrityError
        assert type(twin.orig) is sqlite3.IntegrityError
        assert "UNIQUE constraint failed" in str(twin)
        assert twin.statement == "INSERT"


def test_exception_made_by_a_picky_constructor_keeps_its_attributes() -> None:
    """It is rebuilt without its constructor."""
    twin = round_trip(values.PickyError(5, detail="bad"))
    assert (twin.code, twin.detail) == (5, "bad")


def test_attribute_that_does_not_pickle_is_replaced_by_its_text() -> None:
    """The exception arrives as itself with the rest of what it carries."""
    twin = round_trip(values.error_with_lock())
    assert type(twin) is ValueError
    assert (twin.args, vars(twin)["code"]) == (("text", 7), 5)
    assert "lock" in vars(twin)["lock"]


def test_mapped_instance_in_an_exception_is_replaced_by_its_text() -> None:
    """As an argument, as an attribute and inside either."""
    item = Item(id=1)
    twin = round_trip(values.error_with(ValueError, item, [item], item=item))
    assert type(twin) is ValueError
    assert "Item object" in twin.args[0]
    assert "Item object" in twin.args[1]
    assert "Item object" in vars(twin)["item"]


def test_session_in_an_exception_is_replaced_by_its_text() -> None:
    """Nothing that is tied to a connection crosses in disguise."""
    with Session() as session:
        twin = round_trip(values.error_with(KeyError, "key", session=session))
    assert type(twin) is KeyError
    assert "Session" in vars(twin)["session"]


def local_error() -> Exception:
    """Make an exception of a class that no other process can import."""

    class LocalError(Exception):
        pass

    return LocalError("only here")


STAND_IN: dict[str, tuple[Callable[[], BaseException], str]] = {
    "local class": (local_error, "only here"),
    "pickling raises": (lambda: values.ReduceRaisesError("text"), "text"),
    "unpickles as text": (lambda: values.UnpicklesAsTextError("text"), "text"),
    "unpickling exits": (lambda: values.UnpicklesWithExitError("text"), "text"),
    "mute": (values.MuteError, ""),
    "strange text": (values.StrangeTextError, "strange"),
    "group with a local class": (
        lambda: ExceptionGroup("group", [local_error()]),
        "group",
    ),
}


@pytest.mark.parametrize("kind", STAND_IN)
def test_whatever_is_raised_something_faithful_arrives(kind: str) -> None:
    """The exception itself, or a stand-in with its name, text and traceback."""
    make, said = STAND_IN[kind]
    error = make()
    twin = round_trip(error)
    if isinstance(twin, JobFailedError):
        assert twin.class_name == full_name(type(error))
        assert said in twin.text
        assert twin.outcome is Outcome.ROLLED_BACK
    else:
        assert type(twin) is type(error)
        assert said in text_of(twin)
    assert "in raise_\n" in str(twin.__cause__)


def test_local_class_arrives_as_a_stand_in() -> None:
    """Which says what it stands for."""
    twin = round_trip(local_error())
    assert isinstance(twin, JobFailedError)
    assert twin.class_name.endswith("local_error.<locals>.LocalError")
    assert str(twin).startswith(f"the job raised {twin.class_name}: only here")


def test_exception_that_is_not_one_any_more_arrives_as_a_stand_in() -> None:
    """Bytes that give something else on this side are not trusted."""
    account, *_ = dumps_exception(raised(ValueError("text")))
    for other in (
        pickle.dumps("no exception"),
        pickle.dumps(values.UnpicklesWithExitError()),
        b"garbage",
        b"",
    ):
        twin = loads_exception([account, other, b""])
        assert isinstance(twin, JobFailedError)
        assert (twin.class_name, twin.text) == ("ValueError", "text")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (values.error_that_holds_itself, "text"),
        (values.picky_error_that_holds_itself, "1: text"),
        (values.errors_that_hold_each_other, "1: first"),
        (values.long_chain_of_errors, "29: link"),
        (values.deep_group_of_errors, "group (1 sub-exception)"),
    ],
)
def test_search_for_what_does_not_pickle_ends(
    tmp_path: Path, make: Callable[[], BaseException], said: str
) -> None:
    """Cycles are seen, and the work does not double with each level."""
    # In a process of its own: what fails here does not come to an end.
    text = (
        "import values\n"
        "from dbpool_executor._wire.exceptions import dumps_exception, loads_exception\n"
        f"print(loads_exception(dumps_exception(values.{make.__name__}())))\n"
    )
    with programs.running(tmp_path / "program.py", text) as program:
        out, err = program.communicate(timeout=LONGEST)
    assert err == ""
    assert said in out


def test_our_own_error_brings_its_cause() -> None:
    """What ended the contact is a part of what such an error says."""
    died = WorkerDiedError(-9, 5, Outcome.UNKNOWN)
    error = OutcomeUnknownError("worker 5 was killed by SIGKILL")
    set_cause(error, died)
    twin: Any = loads_exception(dumps_exception(error))
    assert type(twin) is OutcomeUnknownError
    assert type(twin.__cause__) is WorkerDiedError
    assert vars(twin.__cause__) == vars(died)
    assert isinstance(twin.__cause__.__cause__, WorkerTraceback)


def test_our_own_error_keeps_its_outcome_when_it_cannot_be_rebuilt() -> None:
    """The stand-in says of the transaction what the error said."""
    for outcome in Outcome:

        class LocalError(NotPlainError):
            pass

        error = LocalError("result", "models.Item", "return a dict", outcome)
        twin = round_trip(error)
        assert isinstance(twin, JobFailedError)
        assert twin.outcome is outcome


def test_cause_is_set_where_a_class_guards_its_attributes() -> None:
    """A frozen dataclass takes no plain assignment."""
    error, cause = values.FrozenError(5), ValueError("cause")
    set_cause(error, cause)
    assert error.__cause__ is cause
