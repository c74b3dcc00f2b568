"""Jobs that have keys, and programs that are killed between them.

Imported by workers and run as a program by tests, so it imports no pytest.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    event,
    insert,
    select,
)

import jobs
from dbpool_executor import DBPoolExecutor, Ledger, LedgerError, current_engine, session

effects = Table(
    "effect",
    MetaData(),
    # Not unique: that an effect happens once is for the ledger to see to.
    Column("id", Integer, primary_key=True),
    Column("name", String(100), nullable=False),
)


def happen(name: str, result: Any = None) -> Any:
    """Have an effect that nothing but the ledger keeps from happening twice."""
    session.execute(insert(effects).values(name=name))
    return result


def happen_slowly(name: str, seconds: float) -> str:
    """Have an effect, and keep its transaction open for a while."""
    happen(name)
    time.sleep(seconds)
    return name


def happen_at_gate(name: str, address: tuple[str, int]) -> str:
    """Have an effect, and wait before it is committed."""
    happen(name)
    jobs.wait_at_gate(address)
    return name


def happen_and_die(name: str) -> None:
    """Have an effect, and be killed before COMMIT."""
    happen(name)
    os.kill(os.getpid(), signal.SIGKILL)


def happen_and_raise(name: str) -> None:
    """Have an effect, and fail."""
    happen(name)
    raise LookupError(name)


def happen_and_have(name: str, moment: str, then: Any) -> str:
    """Have an effect, and have something happen around COMMIT, see ``faults``."""
    happen(name)
    session.info[moment] = then
    return name


def happen_and_have_after(name: str, _moment: str, then: Any) -> str:
    """Have an effect, and have something happen when SQLAlchemy tells of the COMMIT."""
    happen(name)
    event.listen(session(), "after_commit", lambda _session: then())
    return name


def happen_and_break_a_rule(name: str) -> None:
    """Have an effect, and violate a constraint of the job's own."""
    happen(name)
    jobs.insert_item("the same")
    jobs.insert_item("the same")


def happen_and_commit(name: str) -> None:
    """Have an effect, and commit it in the middle of the job."""
    happen(name)
    session.commit()
    happen(f"{name} again")


def happen_and_commit_boldly(name: str) -> None:
    """Have an effect, commit it, and go on although that was refused."""
    happen(name)
    with suppress(LedgerError):
        session.commit()
    session.rollback()
    happen(f"{name} again")


def happen_and_commit_apart(name: str) -> None:
    """Have an effect in a transaction of its own."""
    with current_engine().begin() as connection:
        connection.execute(insert(effects).values(name=name))


def happen_and_read_apart(name: str) -> list[str]:
    """Have an effect, and read in a transaction of its own."""
    happen(name)
    with current_engine().begin() as connection:
        return list(connection.scalars(select(effects.c.name)))


def happen_and_roll_back(name: str) -> None:
    """Have an effect, undo it and the claim, and have another one."""
    happen(name)
    session.rollback()
    happen(f"{name} again")


def happen_and_roll_back_unseen(name: str) -> None:
    """Do so over the driver's connection."""
    happen(name)
    session.connection().connection.rollback()
    happen(f"{name} again")


def happen_and_commit_unseen(name: str, end: str) -> None:
    """Have an effect, commit it and the claim over the driver's connection, and fail."""
    happen(name)
    session.connection().connection.commit()
    happen(f"{name} again")
    if end == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    raise LookupError(name)


def happen_elsewhere(name: str, url: str) -> None:
    """Have an effect here and another one in a second database."""
    happen(name)
    elsewhere(url).execute(insert(effects).values(name=name))


def read_elsewhere(name: str, url: str) -> list[str]:
    """Have an effect here, and read in a second database."""
    happen(name)
    return list(elsewhere(url).scalars(select(effects.c.name)))


def elsewhere(url: str) -> Connection:
    """Give a connection of the job's session to a second database."""
    return session.connection(bind_arguments={"bind": create_engine(url)})


def number(value: int) -> int:
    """Have an effect for a number, and give the number."""
    happen(str(value))
    return value


def main(url: str, first: str, last: str, chunksize: str) -> None:
    """Run a batch: an effect for each number, and print the sum of all results."""
    ledger = Ledger("batch")
    with DBPoolExecutor(url, 2, ledger=ledger) as executor:
        once = executor.options(key=str)
        numbers = range(int(first), int(last))
        results = once.map(number, numbers, chunksize=int(chunksize), buffersize=8)
        found = list(results)
        assert found == list(numbers)
        print(sum(found), executor.stats().stored, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
