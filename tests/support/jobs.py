"""Functions that run in workers and do what they are asked.

Imported by workers, so it imports no pytest.
"""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine, event, func, insert, inspect, select, text
from sqlalchemy.exc import IntegrityError

from dbpool_executor import current_engine, session
from models import Item, Link

# -- Without a database ---------------------------------------------------------


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def give(value: Any) -> Any:
    """Give back what came."""
    return value


def pid() -> int:
    """Tell which worker this is."""
    return os.getpid()


def collection_threshold() -> int:
    """Tell after how many new objects this worker collects garbage."""
    return gc.get_threshold()[0]


def collector_looks_at_the_engine() -> bool:
    """Tell whether this worker's garbage collector still does."""
    engine = current_engine()
    return any(each is engine for each in gc.get_objects())


def wait_at_gate(address: tuple[str, int], value: Any = None) -> Any:
    """Wait until the test lets this job go on; see ``waiting.Gate``."""
    with socket.create_connection(address) as gate:
        gate.sendall(os.getpid().to_bytes(8, "big"))
        gate.recv(1)
    return value


def give_up() -> None:
    """Raise."""
    raise LookupError("gave up")


# -- Writing --------------------------------------------------------------------


def insert_item(name: str, amount: int = 0) -> int:
    """Write an item and give its primary key."""
    item = Item(name=name, amount=amount)
    session.add(item)
    session.flush()
    return item.id


def insert_and_tell_pid(name: str) -> int:
    """Write an item and tell which worker did."""
    insert_item(name)
    return os.getpid()


def insert_at_gate(name: str, address: tuple[str, int]) -> int:
    """Write an item and wait, in the middle of the transaction."""
    key = insert_item(name)
    wait_at_gate(address)
    return key


def insert_and_give(name: str, value: Any) -> Any:
    """Write an item and give something else."""
    insert_item(name)
    return value


def insert_and_raise(name: str, exc: BaseException) -> None:
    """Write an item and raise what the caller made."""
    insert_item(name)
    raise exc


def insert_unless_bad(name: str) -> str:
    """Write an item; one whose name begins with ``bad`` is written and then fails."""
    insert_item(name)
    if name.startswith("bad"):
        raise ValueError(name)
    return name


def insert_and_commit_oneself(name: str) -> None:
    """Write an item and commit."""
    insert_item(name)
    session.commit()


def insert_by_core(name: str) -> int:
    """Write an item through the engine, in a transaction of the job's own."""
    with current_engine().begin() as connection:
        connection.execute(insert(Item).values(name=name, amount=0))
    return os.getpid()


def insert_dangling_link(name: str) -> None:
    """Write an item, and what a deferred constraint refuses at COMMIT."""
    insert_item(name)
    session.add(Link(item_id=-1))
    session.flush()


def insert_and_swallow_error(name: str) -> None:
    """Write an item, and go on after a statement that the database refused."""
    insert_item(name)
    try:
        session.execute(insert(Item).values(name=name, amount=0))
    except IntegrityError:
        return
    raise AssertionError("the database took the same name twice")


def insert_and_forgive_in_savepoint(name: str) -> None:
    """Do as above, the way that PostgreSQL allows."""
    insert_item(name)
    try:
        with session.begin_nested():
            session.execute(insert(Item).values(name=name, amount=0))
    except IntegrityError:
        return
    raise AssertionError("the database took the same name twice")


def insert_in_savepoint_and_raise(name: str) -> None:
    """Write in a savepoint that is released, and raise."""
    with session.begin_nested():
        insert_item(name)
    raise ValueError(name)


def insert_and_leave_unflushed(name: str) -> None:
    """Leave the writing to the flush that comes before the commit."""
    session.add(Item(name=name, amount=0))


# -- Reading, and looking at the session ----------------------------------------


def insert_and_commit_and_tell_expiry() -> bool:
    """Write an item, commit, and tell whether it would be read anew."""
    item = Item(name="kept")
    session.add(item)
    session.commit()
    return inspect(item).expired


def count_items() -> int:
    """Count the items that this job sees."""
    return session.scalars(select(func.count(Item.id))).one()


def insert_and_leave_traces(name: str) -> None:
    """Leave as much behind in the session as a job can."""
    session.add(Item(name=name, amount=0))
    session.flush()
    session.info["trace"] = name
    session.autoflush = False
    session.add(Item(name=f"{name} pending", amount=0))


def raise_leaving_traces(name: str) -> None:
    """Do the same, and raise."""
    insert_and_leave_traces(name)
    raise ValueError(name)


def look_for_traces() -> dict[str, Any]:
    """Tell what this job finds in its session before it does anything."""
    return {
        "objects": len(list(session)),
        "new": len(session.new),
        "info": dict(session.info),
        "autoflush": session.autoflush,
        "in_transaction": session().in_transaction(),
    }


def session_info() -> dict[str, Any]:
    """Tell what was noted in the session before this job."""
    return dict(session.info)


kept: list[object] = []  # in this worker, beyond a job


class Incomparable:
    """What cannot be compared to anything."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        """Refuse."""
        raise LookupError("incomparable")


TRACES: dict[str, Callable[[], object]] = {
    "reference": lambda: kept.append(session()),
    "object": lambda: kept.append(session.get(Item, 1)),
    "info": lambda: session.info.update(left="behind"),
    "setting": lambda: setattr(session, "autoflush", False),
    "attribute": lambda: setattr(session(), "left", "behind"),
    "what refuses to be compared": lambda: setattr(session(), "bind", Incomparable()),
    "bind": lambda: session().bind_mapper(Item, create_engine("sqlite://")),
    "pending object": lambda: event.listen(
        session(), "after_commit", lambda own: own.add(Item(name="late"))
    ),
    "transaction": lambda: event.listen(
        session(), "after_transaction_end", lambda own, _over: own.begin()
    ),
}
"""What a job may do to its session, each of which could reach the next job."""


def use_session(trace: str | None = None) -> int:
    """Read, leave a trace in the session, and tell which session it is."""
    session.execute(select(func.count(Item.id)))
    if trace is not None:
        TRACES[trace]()
    return session().hash_key


def listen_to_session() -> int:
    """Have it noted what this session does from now on; tell which one it is."""
    for name in ("after_begin", "before_commit"):
        event.listen(session(), name, lambda *_: kept.append("heard"))
    return session().hash_key


def listen_to_end_and_raise(trace: str | None) -> None:
    """Have it noted that the session's transaction is over, which this job leaves open."""
    use_session(trace)
    event.listen(session(), "after_transaction_end", lambda *_: kept.append("heard"))
    raise LookupError("given up")


def what_was_heard() -> tuple[int, int]:
    """Use the session and end its transaction; tell which it is, and what was noted."""
    session.execute(select(func.count(Item.id)))
    session.commit()
    return session().hash_key, kept.count("heard")


def session_settings() -> dict[str, Any]:
    """Tell how this job's session was made."""
    return {
        "class": type(session()).__name__,
        "autoflush": session.autoflush,
        "expire_on_commit": session().expire_on_commit,
        "info": dict(session.info),
    }


def session_from_thread() -> list[str]:
    """Use the session and the engine in a thread that this job starts."""
    raised: list[str] = []

    def use(what: Callable[[], object]) -> None:
        try:
            what()
        except Exception as exc:
            raised.append(type(exc).__name__)

    for what in (session, current_engine, lambda: session.execute(text("SELECT 1"))):
        thread = threading.Thread(target=use, args=(what,))
        thread.start()
        thread.join()
    return raised


def engine_identity() -> tuple[int, int, int]:
    """Tell the worker, its engine, and the engine that its session uses."""
    return os.getpid(), id(current_engine()), id(session.get_bind())


# -- Engine factories, initializers, sessions -----------------------------------


def recording_engine(url: str, record: Path) -> Engine:
    """Make an engine, and note in a file which process made it."""
    note(record)
    return create_engine(url)


def note(record: Path, word: object = None) -> None:
    """Append a line to a file: this process's id, or a word."""
    # One write of a file opened for appending: lines of two processes do not mix.
    with record.open("a") as file:
        file.write(f"{os.getpid() if word is None else word}\n")


def insert_own_item(prefix: str) -> None:
    """As an initializer: write an item that names this worker."""
    insert_item(f"{prefix} {os.getpid()}")


def insert_table_named(prefix: str) -> None:
    """As an initializer: use the engine and the session, both."""
    tables = inspect(current_engine()).get_table_names()
    insert_item(f"{prefix} {','.join(sorted(tables))}")


def open_inodes() -> set[int]:
    """Tell which files and sockets this process has open."""
    found = set()
    for name in os.listdir("/dev/fd"):
        # One of them is the listing's own, and closed by now.
        with contextlib.suppress(OSError):
            status = os.fstat(int(name))
            if stat.S_ISSOCK(status.st_mode) or stat.S_ISREG(status.st_mode):
                found.add(status.st_ino)
    return found
