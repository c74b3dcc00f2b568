"""Jobs that are committed in two phases, and what is left prepared of them.

Imported by tests and by workers.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Engine, NullPool, create_engine, event, insert

import faults
import jobs
from dbpool_executor import current_engine, session
from models import Item, Link
from servers import Database


def insert_and_die_between(name: str) -> None:
    """Write an item, and be killed when COMMIT is prepared and not yet done."""
    jobs.insert_item(name)
    event.listen(current_engine(), "commit_twophase", lambda *_: faults.die())


def insert_and_raise_between(name: str) -> None:
    """Write an item, and have an error when COMMIT is prepared and not done."""
    jobs.insert_item(name)
    event.listen(current_engine(), "commit_twophase", _be_refused, once=True)


def _be_refused(*_: object) -> None:
    with create_engine(current_engine().url).connect() as connection:
        connection.exec_driver_sql("SELECT * FROM nowhere")


def insert_and_die(name: str) -> None:
    """Write an item, and be killed before anything is prepared."""
    jobs.insert_item(name)
    session.flush()
    faults.die()


def insert_and_raise(name: str) -> None:
    """Write an item, and raise."""
    jobs.insert_item(name)
    session.flush()
    raise LookupError(name)


def refused(name: str) -> None:
    """Write an item, and a link that is refused when COMMIT is prepared."""
    jobs.insert_item(name)
    session.execute(insert(Link).values(item_id=-1))


def half_refused(name: str) -> None:
    """Write an item there and a link here that is refused, in either order."""
    session.execute(insert(Item).values(name=name, amount=0))
    session.execute(insert(Link).values(item_id=-1))


def half_refused_other_order(name: str) -> None:
    """Do the same, the link first."""
    session.execute(insert(Link).values(item_id=-1))
    session.execute(insert(Item).values(name=name, amount=0))


def write_to_both(name: str) -> None:
    """Write an item there and another here."""
    session.execute(insert(Item).values(name=name, amount=0))
    session.execute(
        insert(Item).values(name=f"{name} here", amount=0),
        bind_arguments={"bind": current_engine()},
    )


def write_to_both_and_die_between(name: str) -> None:
    """Do it, and be killed when both are prepared and one may be committed."""
    write_to_both(name)
    event.listen(session.get_bind(Item), "commit_twophase", lambda *_: faults.die())


JOBS = {f.__name__: f for f in (half_refused, half_refused_other_order)}


class TwoPhases:
    """Session options: transactions have names by which they are known as the test's.

    Args:
        mark: What the names begin with.
        url: Of another database, that items go to; None if there is only one.
    """

    def __init__(self, mark: str, url: str | None = None) -> None:
        self.mark = mark
        self.url = url

    def __call__(self, engine: Engine) -> Mapping[str, Any]:
        """Give them, in a worker."""
        engines = [engine] if self.url is None else [create_engine(self.url), engine]
        for each in engines:
            each.dialect.create_xid = self._name  # type: ignore[attr-defined]
        return {"twophase": True, "binds": {Item: engines[0], Link: engine}}

    def _name(self) -> str:
        return f"{self.mark}{secrets.token_hex(8)}"


def prepared(database: Database, mark: str) -> list[str]:
    """Give the transactions of a test that are prepared and not ended."""
    sql = "SELECT gid FROM pg_prepared_xacts"
    if database.is_mariadb:
        sql = "XA RECOVER"
    names = [row[-1] for row in database.rows(sql)]
    texts = [n if isinstance(n, str) else bytes(n).decode() for n in names]
    return [text for text in texts if text.startswith(mark)]


def forget(database: Database, mark: str) -> None:
    """Roll back what is prepared: it would lock the tables for good."""
    engine = create_engine(
        database.url, poolclass=NullPool, isolation_level="AUTOCOMMIT"
    )
    verb = "ROLLBACK PREPARED" if database.is_postgresql else "XA ROLLBACK"
    with engine.connect() as connection:
        for name in prepared(database, mark):
            connection.exec_driver_sql(f"{verb} '{name}'")
