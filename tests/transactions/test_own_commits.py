"""What a job commits by itself is never said to be rolled back, and nothing else is unknown.

Each database, each way to commit, each way to end; the database is asked from outside.
"""

from __future__ import annotations

from itertools import count

import pytest

import own_commits
import servers
from dbpool_executor import Outcome
from own_commits import COMMITTING, HARMLESS, OPAQUE
from processes import MakeExecutor
from servers import Database
from waiting import LONGEST

numbers = count()


def kind_of(database: Database) -> str:
    """Say which of the tables of ways is meant."""
    if database.is_sqlite:
        return "sqlite"
    return "postgresql" if database.is_postgresql else "mariadb"


def prepare(database: Database) -> None:
    """Make what the jobs on MariaDB need."""
    if database.is_mariadb:
        for statement in own_commits.PREPARED:
            database.execute(statement)


def stored(database: Database, name: str) -> int:
    """Count what jobs have written under a name."""
    tables = (
        ["item", "forever", "in_aria", "in_memory"] if database.is_mariadb else ["item"]
    )
    return sum(
        database.rows(f"SELECT count(*) FROM {t} WHERE name LIKE '{name}%'")[0][0]
        for t in tables
    )


def rows_of_the_table(
    database: Database,
    make_executor: MakeExecutor,
    group: str,
    retries: int,
    only: dict[str, list[str]] | None = None,
) -> dict[tuple[str, str], tuple[int, Outcome | None]]:
    """Run each way to write, or some of them, with each way to end.

    Returns:
        How many rows are stored, and what the future says.
    """
    prepare(database)
    # What is raised is repeated if it can be, or not if nobody asks for it.
    deaths = {"kill", "transient" if retries else "raise"}
    ways = {"COMMITTING": COMMITTING, "HARMLESS": HARMLESS, "OPAQUE": OPAQUE}[group]
    executor = make_executor(database.make_engine, 1, retries=retries)
    found = {}
    for kind in ("all", kind_of(database)):
        for way in ways.get(kind, {}) if only is None else only[kind]:
            for death in deaths:
                name = f"{group} {next(numbers)} "
                future = executor.submit(
                    own_commits.write_and_end, kind, group, way, name, death
                )
                assert future.exception(LONGEST) is not None
                found[way, death] = (stored(database, name), future.outcome)
    return found


def test_own_commit_is_unknown_and_never_repeated(
    database: Database, make_executor: MakeExecutor
) -> None:
    """One row, although two more attempts are allowed."""
    found = rows_of_the_table(database, make_executor, "COMMITTING", retries=2)
    assert found == dict.fromkeys(found, (1, Outcome.UNKNOWN))


def test_without_a_commit_of_its_own_it_is_rolled_back(
    database: Database, make_executor: MakeExecutor
) -> None:
    """No row, and no doubt."""
    found = rows_of_the_table(database, make_executor, "HARMLESS", retries=0)
    assert found == dict.fromkeys(found, (0, Outcome.ROLLED_BACK))


@pytest.mark.parametrize(
    "database", ["mariadb-pymysql", "mariadb-mysqldb"], indirect=True
)
def test_server_is_asked_what_a_statement_has_done(
    database: Database, make_executor: MakeExecutor
) -> None:
    """Where it can be asked, nothing is unknown."""
    found = rows_of_the_table(database, make_executor, "OPAQUE", retries=0)
    right = {
        (way, death): (0, Outcome.UNKNOWN if death == "kill" else Outcome.ROLLED_BACK)
        for way, death in found
    }
    assert found == right


@pytest.mark.parametrize(
    "database", ["mariadb-pymysql", "mariadb-mysqldb"], indirect=True
)
def test_trigger_that_writes_in_place_is_seen_by_who_lives(
    database: Database, make_executor: MakeExecutor
) -> None:
    """The server warns after the ROLLBACK."""
    prepare(database)
    database.execute(
        "CREATE TRIGGER copies AFTER INSERT ON link FOR EACH ROW "
        "INSERT INTO forever VALUES (concat('copy ', NEW.item_id))"
    )
    executor = make_executor(database.make_engine, 1, retries=2)
    try:
        future = executor.submit(own_commits.insert_link_and_give_up)
        assert future.exception(LONGEST) is not None
        assert future.outcome is Outcome.UNKNOWN
        assert stored(database, "copy ") == 1
    finally:
        database.execute("DROP TRIGGER copies")
        database.execute("DELETE FROM forever")


# -- Drivers that only the differences between drivers are tested with ----------------

OF_EACH_KIND = {
    "all": ["raw connection", "cursor", "autocommit", "COMMIT"],
    "postgresql": ["string", "string that begins again", "DO after COMMIT"],
    "mariadb": ["EXECUTE", "version", "CALL that begins again", "MyISAM"],
}
"""One way to commit of each kind."""


@pytest.mark.parametrize("database", servers.OTHERS, indirect=True)
@pytest.mark.parametrize(
    ("group", "right"),
    [("COMMITTING", (1, Outcome.UNKNOWN)), ("HARMLESS", (0, Outcome.ROLLED_BACK))],
)
def test_other_drivers_tell_the_same(
    database: Database,
    make_executor: MakeExecutor,
    group: str,
    right: tuple[int, Outcome],
) -> None:
    """One way of each kind, and all that are harmless."""
    only, retries = (OF_EACH_KIND, 2) if group == "COMMITTING" else (None, 0)
    found = rows_of_the_table(database, make_executor, group, retries, only)
    assert found
    assert found == dict.fromkeys(found, right)
