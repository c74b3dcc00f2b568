"""The fixtures."""

from __future__ import annotations

import importlib.util
import multiprocessing
import signal
import threading
from collections.abc import Iterator
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL

import lean
import processes
import servers
import tls
from dbpool_executor import DBPoolExecutor
from dbpool_executor._api import arguments
from dbpool_executor._wire import calls, picklers
from processes import MakeExecutor
from servers import Database
from waiting import LONGEST, Gate
from warm import Interpreter

# Read once by the forkserver instead of by each of its workers. Workers of the spawn
# method show that nothing depends on it.
multiprocessing.set_forkserver_preload(
    [
        "dbpool_executor._worker.main",
        "models",
        "psycopg",
        "psycopg2",
        "pymysql",
        "MySQLdb",
    ]
)

# A shell that starts the suite in the background has Ctrl-C ignored, also in the programs
# that the suite starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option to run everything."""
    parser.addoption(
        "--all",
        action="store_true",
        help="run every combination of databases, drivers and start methods; without "
        "it the lean suite is run, and all of each file that is named",
    )


@pytest.hookimpl(trylast=True)  # of those that -k and -m have left
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Choose the lean suite, see ``support/lean.py``."""
    if config.getoption("--all") or any(".py" in arg for arg in config.args):
        return
    chosen = lean.choose(
        lean.test_of(
            item.nodeid,
            getattr(getattr(item, "callspec", None), "params", {}),
            is_heavy=item.get_closest_marker("heavy") is not None,
        )
        for item in items
    )
    left = [item for number, item in enumerate(items) if number not in chosen]
    items[:] = [item for number, item in enumerate(items) if number in chosen]
    config.hook.pytest_deselected(items=left)


@pytest.fixture(autouse=True)
def without_cloudpickle(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested is the package alone; ``test_with_code`` tests the extra."""
    for module in (picklers, calls, arguments):
        monkeypatch.setattr(module, "by_value_pickler", lambda **_: None)


@pytest.fixture(scope="session")
def postgresql_url() -> Iterator[URL]:
    """A PostgreSQL database of this run."""
    try:
        with servers.postgresql_database() as url:
            yield url
    except servers.MissingServerError as exc:
        _skip_or_fail(exc)


@pytest.fixture(scope="session")
def mariadb_url() -> Iterator[URL]:
    """A MariaDB database of this run."""
    try:
        with servers.mariadb_database() as url:
            yield url
    except servers.MissingServerError as exc:
        _skip_or_fail(exc)


def _skip_or_fail(exc: servers.MissingServerError) -> None:
    if servers.is_required():
        pytest.fail(str(exc))
    pytest.skip(str(exc))


def _skip_without_driver(name: str) -> None:
    # These two are built from source, which plain pip cannot do on every machine.
    built = {"mariadb-mysqldb": "MySQLdb", "mariadb-mariadbconnector": "mariadb"}
    module = built.get(name)
    if module is not None and importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")


@pytest.fixture(params=servers.DATABASES)
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Database:
    """Each kind of database, with empty tables.

    A test that is meant for some of them says so with ``parametrize`` and
    ``indirect=True``.
    """
    name: str = request.param
    if name == "sqlite":
        return servers.sqlite_file(tmp_path / "test.db")
    _skip_without_driver(name)
    kind = "postgresql_url" if name.startswith("postgresql") else "mariadb_url"
    database = servers.on_server(name, request.getfixturevalue(kind))
    database.empty_tables()
    return database


@pytest.fixture
def sqlite_database(tmp_path: Path) -> Database:
    """A SQLite file with empty tables, for tests that need no server."""
    return servers.sqlite_file(tmp_path / "test.db")


@pytest.fixture(params=["fork", "forkserver", "spawn"])
def start_method(request: pytest.FixtureRequest) -> str:
    """Each way to start a process."""
    method: str = request.param
    return method


@pytest.fixture
def context(start_method: str) -> BaseContext:
    """What ``mp_context`` takes, for each start method."""
    return multiprocessing.get_context(start_method)


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Fails the test that leaves a worker or a dispatcher behind."""
    workers_before, threads_before = processes.workers(), processes.dispatchers()
    yield
    workers = processes.workers() - workers_before
    threads = processes.dispatchers() - threads_before
    for worker in workers:
        worker.kill()
    if workers or threads:
        pytest.fail(f"left behind: {[*workers, *threads]}")


@pytest.fixture
def make_executor(nothing_left: None) -> Iterator[MakeExecutor]:
    """Makes executors; at the end they are shut down, and nothing may be left."""
    made: list[DBPoolExecutor] = []

    def make(*args: Any, **kwargs: Any) -> DBPoolExecutor:
        executor = DBPoolExecutor(*args, **kwargs)
        made.append(executor)
        return executor

    yield make
    stuck = [executor for executor in made if not _shuts_down(executor)]
    for executor in stuck:
        executor.kill_workers()
        executor.shutdown()
    if stuck:
        pytest.fail(f"did not shut down in {LONGEST:g} s: {stuck}")


def _shuts_down(executor: DBPoolExecutor) -> bool:
    # In a thread, so that a job that never ends costs this test and not the run.
    closer = threading.Thread(
        target=executor.shutdown, kwargs={"cancel_futures": True}, daemon=True
    )
    closer.start()
    closer.join(LONGEST)
    return not closer.is_alive()


@pytest.fixture
def gate(make_executor: MakeExecutor) -> Iterator[Gate]:
    """Where jobs wait; it is closed before the executors are shut down."""
    gate = Gate()
    yield gate
    gate.close()


@pytest.fixture(scope="session")
def postgresql_tls() -> Iterator[tuple[URL, Path]]:
    """A PostgreSQL database that is reached over TLS, and the server's certificate."""
    try:
        with tls.postgresql_server() as server:
            yield server
    except servers.MissingServerError as exc:
        _skip_or_fail(exc)


@pytest.fixture(scope="session")
def mariadb_tls() -> Iterator[tuple[URL, Path]]:
    """A MariaDB database that is reached over TLS, and the server's certificate."""
    try:
        with tls.mariadb_server() as server:
            yield server
    except servers.MissingServerError as exc:
        _skip_or_fail(exc)


@pytest.fixture(params=[f"{n} {w}" for n in servers.SERVERS for w in ("plain", "tls")])
def wired(request: pytest.FixtureRequest) -> Database:
    """Each driver over a plain socket and over TLS, with empty tables."""
    name, wire = request.param.split()
    _skip_without_driver(name)
    kind = "postgresql" if name in servers.POSTGRESQLS else "mariadb"
    if wire == "tls":
        url, certificate = request.getfixturevalue(f"{kind}_tls")
        options = tls.encrypted(name, certificate)
    else:
        url = request.getfixturevalue(f"{kind}_url")
        options = tls.PLAIN[name]
    database = servers.on_server(name, url.update_query_dict(options))
    assert tls.is_encrypted(database) == (wire == "tls")
    database.empty_tables()
    return database


@pytest.fixture(scope="session")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Interpreter]:
    """Runs the programs that fork."""
    interpreter = Interpreter(tmp_path_factory.mktemp("programs"))
    yield interpreter
    interpreter.close()
