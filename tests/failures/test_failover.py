"""A standby takes over that has lost the last transactions of the primary.

On servers of its own, which takes seconds: only where ``DBPOOL_TEST_FAILOVER`` is set.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session

import driver_jobs
import jobs
import servers
import standby
from dbpool_executor import Outcome, OutcomeUnknownError
from dbpool_executor._worker import lookup
from processes import MakeExecutor
from proxy import Proxy
from standby import Pair
from waiting import LONGEST, wait_until

pytestmark = pytest.mark.skipif(
    "DBPOOL_TEST_FAILOVER" not in os.environ, reason="DBPOOL_TEST_FAILOVER is not set"
)


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A primary and its standby."""
    try:
        with standby.pair() as both:
            yield both
    except servers.MissingServerError as exc:
        pytest.skip(str(exc))


class Route:
    """Where the proxy leads to: a server, or nowhere."""

    def __init__(self, port: int | None) -> None:
        self.port = port

    def connect(self) -> socket.socket:
        """Connect to it."""
        if self.port is None:
            raise ConnectionRefusedError
        return socket.create_connection(("127.0.0.1", self.port))


def test_transaction_that_a_failover_lost_is_unknown(
    pair: Pair, make_executor: MakeExecutor
) -> None:
    """The new primary has given its id to somebody else, and says: committed."""
    primary, heir = pair.primary, pair.standby
    route = Route(primary.url.port)
    proxy = Proxy(route.connect)
    url = primary.url.set(port=proxy.port).update_query_dict({"sslmode": "disable"})
    executor = make_executor(partial(create_engine, url), 1)
    executor.submit(jobs.insert_item, "before").result(LONGEST)
    wait_until(lambda: heir.names() == {"before"}, "the standby to have it")
    pair.cut_replication()
    route.port = None
    proxy.cut_after(b"COMMIT")
    view = executor.options(resolve=True, retries=2)
    future = view.submit(jobs.insert_item, "lost")
    wait_until(lambda: "lost" in primary.names(), "the primary to commit")
    xid = int(primary.rows("SELECT xmin::text FROM item WHERE name = 'lost'")[0][0])
    pair.stop_primary()
    pair.promote()
    number = 0
    while int(heir.rows("SELECT CAST(pg_current_xact_id() AS text)")[0][0]) <= xid:
        heir.execute(text_of(number := number + 1))
    told = heir.rows("SELECT pg_xact_status(CAST(:xid AS xid8))", xid=str(xid))
    assert told == [("committed",)]
    route.port = heir.url.port
    with pytest.raises(OutcomeUnknownError):
        future.result(LONGEST)
    assert "lost" not in heir.names()
    assert executor.stats().retried == 0
    view.submit(jobs.insert_item, "next").result(LONGEST)
    assert "next" in heir.names()


def text_of(number: int) -> str:
    """Give a statement that somebody else commits meanwhile."""
    return f"INSERT INTO item (name, amount) VALUES ('other {number}', 0)"


def test_transaction_of_a_server_that_only_restarted_is_resolved(pair: Pair) -> None:
    """It is on the timeline that it was on."""
    engine = pair.primary.make_engine()
    with Session(engine) as session:
        session.execute(text(text_of(1)))
        noted = lookup.current_transaction(session)
        session.commit()
    engine.dispose()
    assert noted.server
    assert noted.timeline == 1
    pair.control("primary", "-m", "fast", "restart")
    assert lookup.outcome_of(engine, noted) is Outcome.COMMITTED
    engine.dispose()


def test_replica_is_left_for_a_new_connection(
    pair: Pair, make_executor: MakeExecutor, tmp_path: Path
) -> None:
    """25006 on a server that takes no writes: a new connection finds the primary."""
    path = tmp_path / "port"
    path.write_text(str(pair.standby.url.port))
    factory = partial(driver_jobs.engine_by_file, str(pair.primary.url), str(path))
    executor = make_executor(factory, 1, retries=3)
    assert executor.submit(jobs.count_items).result(LONGEST) == 0
    path.write_text(str(pair.primary.url.port))
    assert executor.submit(jobs.count_items).result(LONGEST) == 0  # by the old one
    executor.submit(jobs.insert_item, "a").result(LONGEST)
    assert executor.stats().retried == 1
    assert pair.primary.names() == {"a"}
    # What only is to be read-only has no reason to be repeated.
    view = executor.options(read_only=True)
    assert "read-only" in str(view.submit(jobs.insert_item, "b").exception(LONGEST))
    assert executor.stats().retried == 1
