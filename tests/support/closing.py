"""Jobs that close their session, and what they return for it.

Imported by tests and by workers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy import Engine, create_engine, delete, func, insert, select, text
from sqlalchemy.orm import Session

from dbpool_executor import current_engine, session
from models import Item, Link


def write(name: str) -> None:
    """Write by a statement."""
    session.execute(insert(Item).values(name=name, amount=0))


def with_block(name: str) -> None:
    """Use the session as one's own."""
    with session() as own:
        own.add(Item(name=name))
        own.flush()


def with_block_unflushed(name: str) -> None:
    """Leave it to a flush that never comes."""
    with session() as own:
        own.add(Item(name=name))


def close(name: str) -> None:
    """Close it."""
    write(name)
    session.close()


def close_and_read(name: str) -> None:
    """Close it, and use another transaction."""
    write(name)
    session.close()
    session.scalars(select(Item)).all()


def close_and_write(name: str) -> None:
    """Close it, and write once more."""
    write(name)
    session.close()
    write(f"{name} again")


def remove(name: str) -> None:
    """Remove it."""
    write(name)
    session.remove()


def reset(name: str) -> None:
    """Reset it."""
    write(name)
    session.reset()


def invalidate(name: str) -> None:
    """Close it without a goodbye."""
    session.add(Item(name=name))
    session().invalidate()


def by_text(name: str) -> None:
    """Write by text."""
    session.execute(text(f"INSERT INTO item (name, amount) VALUES ('{name}', 0)"))
    session.close()


def forget(name: str) -> None:
    """Have the registry forget it."""
    write(name)
    session.registry.clear()


def replace(name: str) -> None:
    """Put another one in its place."""
    write(name)
    kept.append(session())
    session.registry.clear()
    session.scalars(select(Item)).all()


kept: list[Session] = []

LOSING: dict[str, Callable[[str], None]] = {
    f.__name__: f
    for f in (
        with_block, with_block_unflushed, close, close_and_read, close_and_write, remove,
        reset, invalidate, by_text, forget, replace,
    )
}  # fmt: skip


def read_and_close(_name: str) -> None:
    """Only read."""
    session.scalars(select(Item).with_for_update()).all()
    session.close()


def commit_and_close(name: str) -> None:
    """Commit before."""
    write(name)
    session.commit()
    session.close()


def with_begin(name: str) -> None:
    """Commit by a block."""
    with session() as own, own.begin():
        own.add(Item(name=name))


def roll_back_and_close(name: str) -> None:
    """Undo it on purpose."""
    write(name)
    session.rollback()
    session.close()


def roll_back_by_block(name: str) -> None:
    """Undo it by an exception."""
    with contextlib.suppress(LookupError), session.begin():
        write(name)
        raise LookupError
    session.remove()


def close_first(name: str) -> None:
    """Close what is not used, and write after it."""
    session.close()
    write(name)


def autocommit(name: str) -> None:
    """Have each statement committed."""
    session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
    write(name)
    session.close()


def own_session(name: str) -> None:
    """Use a session that is not the executor's, as one likes."""
    with Session(current_engine()) as own:
        own.execute(insert(Item).values(name=name, amount=0))


KEEPING: dict[str, tuple[Callable[[str], None], int]] = {
    "read": (read_and_close, 0),
    "commit": (commit_and_close, 1),
    "begin": (with_begin, 1),
    "rollback": (roll_back_and_close, 0),
    "rollback by a block": (roll_back_by_block, 0),
    "close first": (close_first, 1),
    "autocommit": (autocommit, 1),
    "own": (own_session, 0),
}


# -- Several databases ---------------------------------------------------------------


class Two:
    """Session options: items go to another database than links.

    Args:
        url: Of the other one.
        options: More of them.
    """

    def __init__(self, url: str, **options: Any) -> None:
        self.url = url
        self.options = options

    def __call__(self, engine: Engine) -> Mapping[str, Any]:
        """Give them, in a worker."""
        return {"binds": {Link: engine, Item: create_engine(self.url)}, **self.options}


def write_to_both(name: str, amount: int = 0) -> None:
    """Write a link here and an item there."""
    session.add_all([Link(item_id=len(name)), Item(name=name, amount=amount)])


def commit_there(name: str) -> None:
    """Commit on the other database, and raise."""
    bind = session.get_bind(Item)
    with bind.begin() as connection:  # type: ignore[union-attr]
        connection.execute(insert(Item).values(name=name, amount=0))
    raise LookupError


def count_both() -> tuple[int, int]:
    """Count links here and items there."""
    links = session.scalars(select(func.count(Link.id))).one()
    return links, session.scalars(select(func.count(Item.id))).one()


def sleep_there() -> None:
    """Have the other server do nothing for long."""
    session.execute(delete(Item).where(Item.id < 0))
    session.execute(text("SELECT pg_sleep(60)"), bind_arguments={"mapper": Item})
