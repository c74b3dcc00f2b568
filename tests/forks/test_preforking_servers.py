"""Servers that import a program, connect, and fork: not one request fails.

To import the package is all that the program does for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from socket import AF_UNIX, socket

import pytest

import defence
import programs
from servers import Database
from waiting import LONGEST, wait_until

pytestmark = pytest.mark.skipif(
    defence.is_taken_away(), reason="without the package nothing is promised"
)

each_server = pytest.mark.parametrize(
    "database", ["postgresql-psycopg", "mariadb-pymysql"], indirect=True
)
each_ping = pytest.mark.parametrize("ping", [False, True], ids=["plain", "pre-ping"])

APPLICATION = """
import os
import dbpool_executor
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import text

app = Flask(__name__)
app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["DBPOOL_TEST_URL"]
app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {
    "pool_pre_ping": bool(os.environ["DBPOOL_TEST_PING"]), "pool_size": 2
}
db = SQLAlchemy(app)
SERVER_SESSION = text(os.environ["DBPOOL_TEST_SQL"])

with app.app_context():
    # As programs do that read their settings from the database; two connections.
    with db.engine.connect() as connection:
        mine = {db.session.scalar(SERVER_SESSION), connection.scalar(SERVER_SESSION)}

@app.get("/")
def index():
    with db.engine.connect() as connection:
        found = [db.session.scalar(SERVER_SESSION), connection.scalar(SERVER_SESSION)]
    return {"pid": os.getpid(), "own": not mine & set(found)}
"""

# As uWSGI and Celery do: plain forks of a master that goes on with its own connection.
PREFORK = """
import os, sys
import dbpool_executor
from sqlalchemy import create_engine, text
from sqlalchemy.orm import scoped_session, sessionmaker

engine = create_engine(
    os.environ["DBPOOL_TEST_URL"], pool_pre_ping=bool(os.environ["DBPOOL_TEST_PING"])
)
session = scoped_session(sessionmaker(engine))
SERVER_SESSION = text(os.environ["DBPOOL_TEST_SQL"])
mine = session.scalar(SERVER_SESSION)
session.remove()
children = []
for _ in range(4):
    pid = os.fork()
    if not pid:
        for _ in range(20):  # tasks
            try:
                if session.scalar(SERVER_SESSION) == mine: os._exit(3)
                session.commit()
            finally:
                session.remove()
        sys.exit(0)
    children.append(pid)
    assert session.scalar(SERVER_SESSION) == mine
    session.remove()
print([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children])
assert session.scalar(SERVER_SESSION) == mine
"""


def environment(database: Database, *, ping: bool) -> dict[str, str]:
    """Give the environment of a program that uses a database."""
    sql = "SELECT connection_id()" if database.is_mariadb else "SELECT pg_backend_pid()"
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, programs.FOLDERS)),
        "DBPOOL_TEST_URL": database.url.render_as_string(hide_password=False),
        "DBPOOL_TEST_PING": "1" if ping else "",
        "DBPOOL_TEST_SQL": sql,
    }


class Request(HTTPConnection):
    """A connection to a server that listens at a path."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=LONGEST)
        self._path = str(path)

    def connect(self) -> None:
        """Open it."""
        self.sock = socket(AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)

    def answer(self) -> tuple[int, str]:
        """Ask, and give the status and the text."""
        with contextlib.closing(self):
            self.request("GET", "/")
            response = self.getresponse()
            return response.status, response.read().decode()


@each_server
@each_ping
def test_gunicorn_with_preload_and_flask_fails_no_request(
    database: Database, ping: bool, tmp_path: Path
) -> None:
    """Also of workers that replace others, which are forked while requests are served."""
    for module in ("gunicorn", "flask_sqlalchemy"):
        pytest.importorskip(module)
    (tmp_path / "served.py").write_text(APPLICATION)
    bound = tmp_path / "bound"
    command = [
        *(sys.executable, "-m", "gunicorn", "--preload", "--workers", "3"),
        *("--max-requests", "10", "--bind", f"unix:{bound}", "served:app"),
    ]
    log = tmp_path / "log"
    with (
        log.open("w") as out,
        subprocess.Popen(
            command,
            cwd=tmp_path,
            env=environment(database, ping=ping),
            stdout=out,
            stderr=subprocess.STDOUT,
        ) as server,
    ):
        try:
            wait_until(bound.exists, "the server listens")
            with ThreadPoolExecutor(3) as threads:
                answers = list(
                    threads.map(lambda _: Request(bound).answer(), range(90))
                )
        finally:
            server.terminate()
    assert {status for status, _ in answers} == {200}, log.read_text()
    told = [json.loads(text) for _, text in answers]
    assert all(each["own"] for each in told)
    assert len({each["pid"] for each in told}) > 3
    assert "Traceback" not in log.read_text()


@each_server
@each_ping
def test_plain_prefork_fails_no_task(
    database: Database, ping: bool, tmp_path: Path
) -> None:
    """And the master keeps its connection."""
    script = tmp_path / "prefork.py"
    script.write_text(PREFORK)
    done = subprocess.run(
        [sys.executable, script],
        env=environment(database, ping=ping),
        capture_output=True,
        text=True,
        timeout=LONGEST,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("[0, 0, 0, 0]\n", "")
