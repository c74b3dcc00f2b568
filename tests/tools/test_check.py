"""The check as a user runs it: what it finds, how it ends, what it leaves.

Each test runs the command and asks the server what became of it; the conclusions, which
are pure functions, are tables.
"""

from __future__ import annotations

import json
import re
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import NullPool, create_engine, make_url

from dbpool_executor._tools.check_rules import (
    Bound,
    PoolSize,
    Status,
    counts_to_measure,
    judged_connections,
    recommended,
)
from dbpool_executor._tools.redact import place_of, told_of
from servers import Database
from waiting import wait_until

LONGEST = 60.0  # seconds
SECRET = "open-sesame"
KEYS = {
    "ok",
    "database",
    "driver",
    "workers",
    "start_method",
    "checks",
    "connections",
    "round_trip_us",
    "jobs_per_second",
    "recommended_max_workers",
}
STEPS = [
    "engine factory",
    "start method",
    "database",
    "connections",
    "timeout",
    "round trip",
    "rate",
    "max_workers",
]

FACTORIES = """
from functools import partial
from threading import Lock

from sqlalchemy import create_engine, event


def down():
    return create_engine({url!r}, pool_size=1, max_overflow=0)


def does_not_cancel():
    engine = create_engine({url!r})

    @event.listens_for(engine, "connect")
    def disarm(connection, _entry):
        connection.cancel = lambda: None

    return engine


def raises():
    raise ValueError("no engine for {url}")


refused = partial(create_engine, Lock())
"""


def check(
    *arguments: object, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the check to its end."""
    command = [sys.executable, "-W", "error", "-m", "dbpool_executor", "check"]
    return subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=LONGEST,
        check=False,
        cwd=cwd,
    )


def shown(database: Database) -> str:
    """Give the URL of a database, for the command line."""
    return database.url.render_as_string(hide_password=False)


def by_name(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Give the lines of a report."""
    return {line["name"]: line for line in report["checks"]}


@pytest.fixture
def silent_port() -> Iterator[int]:
    """Give a port of this machine where nothing answers."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


# -- The command ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "database", ["sqlite", "postgresql-psycopg", "mariadb-pymysql"], indirect=True
)
def test_database_that_works_is_measured_and_left_alone(database):
    """Everything is ok, every number is there, and no session stays behind."""
    done = check("--url", shown(database), "--workers", 2, "--json")
    assert (done.stderr, done.returncode) == ("", 0), done.stdout
    report = json.loads(done.stdout)
    assert set(report) == KEYS
    assert [line["name"] for line in report["checks"]] == STEPS
    assert {line["status"] for line in report["checks"]} == {"ok"}
    assert (report["ok"], report["workers"]) == (True, 2)
    (line,) = [line for line in report["checks"] if line["name"] == "timeout"]
    told = "client_connection_check_interval" in line["remedy"]
    assert told == database.is_postgresql
    assert report["start_method"] == "forkserver"
    needed = report["connections"]
    assert (needed["needed_at_least"], needed["needed_at_most"]) == (2, 30)
    assert (needed["free"] is None) == database.is_sqlite
    assert 0 < report["round_trip_us"] < 1e6
    assert sorted(report["jobs_per_second"]) == ["1", "2"]
    assert min(report["jobs_per_second"].values()) > 0
    assert report["recommended_max_workers"] in (1, 2)
    wait_until(lambda: database.sessions() == 0, "the sessions of the check end")


def test_report_is_one_line_for_each_check(tmp_path):
    """A warning is no failure: fork, and a file that was not there."""
    url = f"sqlite:///{tmp_path / 'new.db'}"
    done = check("--url", url, "--workers", 1, "--start-method", "fork")
    assert (done.stderr, done.returncode) == ("", 0)
    lines = [re.split("  +", line, maxsplit=2) for line in done.stdout.splitlines()]
    status = {name: status for status, name, _ in lines}
    assert list(status) == [*STEPS[:3], "engine", *STEPS[3:]]
    warned = [name for name in status if status[name] == "warning"]
    assert warned == ["start method", "engine"]
    assert "parent_engine" in done.stdout
    assert "empty one is created" in done.stdout


@pytest.fixture
def role(postgresql_url: Any) -> Iterator[tuple[Database, str]]:
    """Give a role that may have two sessions, with a password; and its URL."""
    name = f"dbpool_test_{secrets.token_hex(4)}"
    admin = create_engine(postgresql_url, poolclass=NullPool)
    with admin.begin() as connection:
        connection.exec_driver_sql(
            f"CREATE ROLE {name} LOGIN PASSWORD '{SECRET}' CONNECTION LIMIT 2"
        )
    database = Database("postgresql-psycopg", postgresql_url, lambda: admin)
    url = postgresql_url.set(username=name, password=SECRET)
    yield database, url.render_as_string(hide_password=False)
    wait_until(lambda: database.sessions() == 0, "the sessions of the check end")
    with admin.begin() as connection:
        connection.exec_driver_sql(f"DROP ROLE {name}")


def test_limit_of_the_server_bounds_what_is_measured_and_recommended(role):
    """One of the role's two sessions is taken: a second worker would be refused."""
    _, url = role
    taken = create_engine(url, poolclass=NullPool)
    with taken.connect():
        done = check("--url", url, "--workers", 2, "--json")
    report = json.loads(done.stdout)
    assert (done.stderr, done.returncode, report["ok"]) == ("", 1, False)
    failed = [line for line in report["checks"] if line["status"] == "FAILED"]
    assert [line["name"] for line in failed] == ["connections"]
    assert "is 2, of which 1 are" in failed[0]["what"]
    assert "at most 1 worker and" in failed[0]["remedy"]
    assert list(report["jobs_per_second"]) == ["1"]
    assert report["recommended_max_workers"] == 1
    assert SECRET not in done.stdout


URLS = {
    "postgresql+psycopg://user:{}@127.0.0.1:{port}/shop": ("database", "refused"),
    "mysql+pymysql://127.0.0.1:{port}/shop?password={}": ("database", "refused"),
    "postgresql+psycopg://user@host:{}/shop": ("engine factory", "not a database's"),
    "nosuchdatabase://user:{}@host/shop": ("engine factory", "nosuchdatabase"),
    "oracle+nosuch://user:{}@host/shop": ("engine factory", "nosuch"),
}


@pytest.mark.parametrize(("url", "told"), URLS.items())
def test_database_that_cannot_be_used_fails_with_its_cause(url, told, silent_port):
    """Status 1, no traceback, never the password; what can go on goes on."""
    url = url.format(SECRET, port=silent_port)
    done = check("--url", url, "--workers", 2, "--json")
    assert (done.stderr, done.returncode) == ("", 1)
    assert SECRET not in done.stdout
    report = json.loads(done.stdout)
    lines = by_name(report)
    step, cause = told
    assert set(report) == KEYS
    assert lines[step]["status"] == "FAILED"
    assert cause in lines[step]["what"]
    assert lines[step]["remedy"]
    assert lines["start method"]["status"] == "ok"
    if step == "database":
        assert report["connections"]["needed_at_least"] == 2


FACTORY_FAILURES = {
    "factories:down": "database        postgresql+psycopg://user:***@127.0.0.1:",
    "factories:raises": "database        no worker could start: ValueError: no engine",
    "factories:refused": "engine factory  TypeError: engine_factory cannot be sent",
    "nosuchmodule:make": "engine factory  ModuleNotFoundError: ",
}


@pytest.mark.parametrize(("name", "told"), FACTORY_FAILURES.items())
def test_engine_factory_that_does_not_work_fails(name, told, silent_port, tmp_path):
    """The password is in the factory alone, and still is not shown."""
    url = f"postgresql+psycopg://user:{SECRET}@127.0.0.1:{silent_port}/shop"
    (tmp_path / "factories.py").write_text(FACTORIES.format(url=url))
    done = check("--factory", name, "--workers", 1, cwd=tmp_path)
    assert (done.stderr, done.returncode) == ("", 1)
    assert f"FAILED   {told}" in done.stdout
    assert SECRET not in done.stdout
    assert "Traceback" not in done.stdout


@pytest.mark.parametrize("database", ["postgresql-psycopg"], indirect=True)
def test_statement_that_is_not_cancelled_is_a_warning(database, tmp_path):
    """The job ends at its timeout all the same: it is the server that is asked."""
    (tmp_path / "factories.py").write_text(FACTORIES.format(url=shown(database)))
    arguments = ["--factory", "factories:does_not_cancel", "--workers", 1]
    done = check(*arguments, "--json", cwd=tmp_path)
    assert (done.stderr, done.returncode) == ("", 0)
    line = by_name(json.loads(done.stdout))["timeout"]
    assert line["status"] == "warning"
    assert "the server goes on with it" in line["what"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--url", "sqlite://", "--workers", "0"],
        ["--factory", "module"],
    ],
)
def test_wrong_command_is_told_by_its_usage(arguments):
    """As of every command: status 2."""
    done = check(*arguments)
    assert (done.stdout, done.returncode) == ("", 2)
    assert done.stderr.startswith("usage: ")
    assert "error: " in done.stderr.splitlines()[-1]


# -- What it concludes ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rates", "free", "chosen"),
    [
        ({1: 100}, None, 1),
        ({1: 100, 2: 200, 3: 300}, None, 3),  # each one more is worth it
        ({1: 100, 2: 190, 4: 200}, None, 2),  # as good as the best, within 10 %
        ({1: 100, 2: 180, 4: 200}, None, 2),  # just so
        ({1: 100, 2: 179, 4: 200}, None, 4),  # just not
        ({1: 200, 2: 150, 4: 100}, None, 1),  # more get in each other's way
        ({1: 100, 2: 300, 4: 100}, None, 2),  # a peak
        ({1: 100, 2: 200, 4: 400}, 4, 4),  # as many as the server allows
        ({1: 100, 2: 200, 4: 400}, 3, 2),  # the best of those that it allows
        ({1: 100, 2: 105, 4: 400}, 3, 1),  # a rate it does not allow is no measure
        ({1: 100, 2: 200}, 0, 1),  # one was there, so one there may be
        ({2: 0.0, 1: 0.0}, None, 1),
    ],
)
def test_recommended_number_of_workers(rates, free, chosen):
    """The least number that is as good as the best one, and is allowed."""
    assert recommended(rates, free) == chosen


def test_nothing_is_recommended_without_a_measurement():
    """An error that says so."""
    with pytest.raises(ValueError, match="no rates"):
        recommended({}, None)


@pytest.mark.parametrize(
    ("most", "counts"),
    [
        (1, [1]),
        (2, [1, 2]),
        (4, [1, 2, 3, 4]),
        (5, [1, 2, 3, 4, 5]),
        (8, [1, 2, 3, 4, 6, 8]),
        (20, [1, 2, 3, 4, 6, 8, 12, 16, 20]),
    ],
)
def test_numbers_of_workers_that_are_measured(most, counts):
    """Few enough that the check stays short, and always the last."""
    assert counts_to_measure(most) == counts


SMALL, USUAL = PoolSize("QueuePool", 1, 0), PoolSize("QueuePool", 5, 10)
ENDLESS = PoolSize("NullPool", 0, None)


@pytest.mark.parametrize(
    ("workers", "pool", "free", "status"),
    [
        (4, SMALL, 4, Status.OK),
        (5, SMALL, 4, Status.FAILED),  # not even one for each
        (4, USUAL, 60, Status.OK),
        (4, USUAL, 59, Status.WARNING),  # one for each, and not all that may be opened
        (4, ENDLESS, 1000, Status.WARNING),
        (1, SMALL, 0, Status.FAILED),
        (4, USUAL, None, Status.WARNING),  # the server does not tell
    ],
)
def test_connections_against_what_the_server_allows(workers, pool, free, status):
    """Of several bounds the tightest counts; what is not ok has a remedy."""
    bounds = [Bound("wide", 5000, 10), Bound("narrow", 2000, 2000 - (free or 0))]
    finding = judged_connections(workers, pool, [] if free is None else bounds)
    assert finding.status is status
    assert bool(finding.remedy) == (status is not Status.OK)
    assert free is None or "narrow" in finding.what


@pytest.mark.parametrize(
    "text",
    [
        f"mysql://user:{SECRET}@host/shop is no URL",
        f"password={SECRET} is wrong",
        f"first\n  password={SECRET}\n\nlast",
    ],
)
def test_error_is_told_in_one_line_without_the_password(text):
    """Whether it repeats the URL or the password alone."""
    url = make_url(f"postgresql://user@host/shop?password={SECRET}")
    for known in (url, make_url(f"mysql://user:{SECRET}@host/shop")):
        told = told_of(ValueError(text), known)
        assert SECRET not in told
        assert "***" in told
        assert "\n" not in told
        assert SECRET not in place_of(known)


def test_password_in_a_url_is_not_told_where_no_url_is_known():
    """As when an engine factory of the user's raises."""
    told = told_of(f"cannot parse mysql://user:{SECRET}@host/shop", None)
    assert told == "cannot parse mysql://***@host/shop"
