"""The demo as a user runs it: what it prints, what it stores, how it ends.

Each test runs the command in a process group of its own, and asks the database, the
file system and the operating system what became of it.
"""

from __future__ import annotations

import ast
import email
import json
import multiprocessing
import os
import pty
import re
import select
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import termios
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

LONGEST = 60.0  # seconds that anything is waited for
SECRET = "open-sesame"
PACKAGES = (json, email)
METHODS = multiprocessing.get_all_start_methods()


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """Give a folder with some Python to index, one file of which does not parse."""
    folder = tmp_path / "sources"
    for package in PACKAGES:
        source = Path(package.__file__).parent
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, folder / package.__name__, ignore=ignored)
    (folder / "broken.py").write_text("def\n")
    return folder


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the folder that the command will take for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C reach the command, also where this process was told to ignore it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def command(*arguments: object) -> list[str]:
    """Give the command line of the demo."""
    demo = [sys.executable, "-W", "error", "-m", "dbpool_executor", "demo"]
    return [*demo, *map(str, arguments)]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the demo to its end."""
    return subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        timeout=LONGEST,
        check=False,
    )


def row(name: str, table: str) -> list[str]:
    """Give the cells of a row of a printed table."""
    found = re.search(rf"^ *{re.escape(name)}  +(.+)$", table, re.MULTILINE)
    assert found, f"{name} is not in:\n{table}"
    return found[1].replace(",", "").split()


def parsed(sources: Path) -> Iterator[ast.Module]:
    """Parse what the demo was to parse."""
    for path in sources.rglob("*.py"):
        if path.name != "broken.py":
            yield ast.parse(path.read_bytes())


@pytest.mark.smoke
def test_the_table_tells_what_the_database_holds(sources, temporary):
    """The files, another parser of them, the database and the table agree."""
    done = run("--root", sources, "--keep", "--workers", 3)
    assert done.returncode == 0, done.stderr

    kept = re.search(r"^kept .* in the SQLite file (.+)$", done.stdout, re.MULTILINE)
    assert kept, done.stdout
    assert Path(kept[1]).is_relative_to(temporary)
    with sqlite3.connect(kept[1]) as database:
        counts = [
            database.execute(f"SELECT count(*) FROM dbpool_demo_{table}").fetchone()[0]
            for table in ("modules", "definitions", "imports")
        ]
        most = database.execute(
            "SELECT name, count(*) FROM dbpool_demo_imports GROUP BY name"
        ).fetchall()
    database.close()

    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for tree in parsed(sources) for node in ast.walk(tree)]
    assert counts[0] == len(list(parsed(sources)))
    assert counts[1] == sum(isinstance(node, kinds) for node in nodes) > 300
    assert "json.decoder" in dict(most)  # from .decoder import …

    assert "3 workers" in done.stdout
    for name, stored in zip(
        ("files stored", "definitions", "imports"), counts, strict=True
    ):
        assert row(name, done.stdout) == [str(stored)] * 2  # many workers, one worker
    name, count = Counter(dict(most)).most_common(1)[0]
    assert row(name, done.stdout) == [str(count)]
    assert "not Python: 1 (broken.py)" in done.stdout


@pytest.mark.parametrize("method", METHODS)
def test_every_start_method_leaves_nothing_behind(sources, temporary, method):
    """Without --keep the database is gone, and only progress is on stderr."""
    done = run("--root", sources, "--start-method", method)
    assert done.returncode == 0, done.stderr
    assert len(row("jobs per second", done.stdout)) == min(2, os.cpu_count() or 1)
    unexpected = [
        line
        for line in done.stderr.splitlines()
        if not re.fullmatch(r"\d+ workers?: \d+ of \d+ files", line)
    ]
    assert unexpected == []
    assert list(temporary.iterdir()) == []


def test_tables_of_a_named_database_are_dropped(sources, tmp_path):
    """A database that is not the demo's own keeps what else it holds."""
    path = tmp_path / "mine.db"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE mine (id integer)")
    database.close()
    done = run("--root", sources, "--url", f"sqlite:///{path}", "--workers", 1)
    assert done.returncode == 0, done.stderr
    with sqlite3.connect(path) as database:
        names = database.execute("SELECT name FROM sqlite_master").fetchall()
    database.close()
    assert names == [("mine",)]


# -- The end by Ctrl-C -------------------------------------------------------------


def wait_until(predicate: Callable[[], bool], what: str) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + LONGEST
    while not predicate():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.02)


def members(group: int) -> list[psutil.Process]:
    """Give the processes of a process group that have not ended."""
    found = []
    for process in psutil.process_iter():
        try:
            ended = process.status() == psutil.STATUS_ZOMBIE
            if not ended and os.getpgid(process.pid) == group:
                found.append(process)
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    return found


@pytest.mark.heavy
@pytest.mark.parametrize("moment", ["start", "work"])
@pytest.mark.parametrize("method", METHODS)
def test_ctrl_c_ends_it_with_one_line(tmp_path, temporary, method, moment):
    """While its workers start and while they work: status 130, and nothing is left."""
    errors = tmp_path / "stderr"
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            command("--start-method", method, "--workers", 2),
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
        )
    try:
        if moment == "start":
            # With forkserver the third is the forkserver, else a worker.
            wait_until(lambda: len(members(process.pid)) >= 3, "a worker starts")
        else:
            wait_until(lambda: "files\n" in errors.read_text(), "some jobs are done")
        os.killpg(process.pid, signal.SIGINT)
        status = process.wait(LONGEST)
        wait_until(lambda: not members(process.pid), "all its processes end")
    finally:
        for left in members(process.pid):
            left.kill()
        process.wait(LONGEST)
    lines = [line for line in errors.read_text().splitlines() if " of " not in line]
    assert (lines, status) == (["interrupted: the demo's tables are removed"], 130)
    assert list(temporary.iterdir()) == []


# -- Databases that cannot be used -------------------------------------------------


@pytest.fixture
def silent_port() -> Iterator[int]:
    """Give a port of this machine where nothing answers."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


URLS = {
    "unreachable": "postgresql+psycopg://user:{}@127.0.0.1:{port}/shop",
    "another unreachable": "mysql+pymysql://user:{}@127.0.0.1:{port}/shop",
    "password in the query": "postgresql+psycopg://127.0.0.1:{port}/shop?password={}",
    "bad port": "postgresql+psycopg://user@host:{}/shop",
    "unknown database": "nosuchdatabase://user:{}@127.0.0.1/shop",
    "asynchronous": "postgresql+asyncpg://user:{}@127.0.0.1/shop",
    "not a URL": "{}",
    "in memory": "sqlite://",
    "no such folder": "sqlite:////nonexistent/{}/demo.db",
}


@pytest.mark.parametrize("url", URLS.values(), ids=URLS)
def test_a_database_that_cannot_be_used_is_told_in_one_line(url, sources, silent_port):
    """Status 1, no traceback, and never the password."""
    done = run("--root", sources, "--url", url.format(SECRET, port=silent_port))
    assert (done.stdout, done.returncode) == ("", 1)
    assert re.fullmatch(r"error: .+\n", done.stderr)
    assert SECRET not in done.stderr


def test_nothing_to_index_is_an_error(tmp_path, temporary):
    """A folder without Python does not end in an empty table."""
    done = run("--root", temporary)
    assert done.stderr == f"error: there is no Python file in {temporary}\n"
    assert (done.stdout, done.returncode) == ("", 1)


# -- On a terminal -----------------------------------------------------------------


def shown_on_terminal(*arguments: object, size: tuple[int, int] = (24, 80)) -> str:
    """Run the demo with its stderr on a terminal, and give what it shows there."""
    screen, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, size)
    process = subprocess.Popen(
        command(*arguments), stdout=subprocess.DEVNULL, stderr=terminal
    )
    os.close(terminal)
    shown = b""
    try:
        while select.select([screen], [], [], LONGEST)[0]:
            try:
                shown += os.read(screen, 4096)
            except OSError:  # EIO: nobody has the terminal open any more
                break
        assert process.wait(LONGEST) == 0
    finally:
        process.kill()
        process.wait(LONGEST)
        os.close(screen)
    return shown.decode()


def test_a_terminal_shows_a_bar(sources):
    """It moves on one line, for each of the two runs."""
    pytest.importorskip("tqdm")
    shown = shown_on_terminal("--root", sources, "--workers", 2)
    assert len(re.findall(r"\r[12] workers?: 100%\|", shown)) >= 2


def test_a_terminal_without_a_size_shows_plain_lines(sources):
    """A bar of no width would be nothing at all."""
    shown = shown_on_terminal("--root", sources, "--workers", 1, size=(0, 0))
    assert len(shown.split("\r\n")) == 5


def test_without_tqdm_a_terminal_shows_plain_lines(sources, tmp_path, monkeypatch):
    """The extra may be missing."""
    (tmp_path / "tqdm.py").write_text("raise ImportError\n")
    path = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
    shown = shown_on_terminal("--root", sources, "--workers", 1)
    lines = shown.split("\r\n")
    assert len(lines) == 5
    assert re.fullmatch(r"1 worker: (\d+) of \1 files", lines[3])
