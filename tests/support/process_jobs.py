"""Jobs that hold the interpreter, start processes, or wait at the server.

Imported by workers, so it imports no pytest.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from sqlalchemy import Connection, text

from dbpool_executor import session
from models import Item


def note(record: Path, *pids: int) -> None:
    """Note process ids, a line for each call."""
    with record.open("a") as file:
        file.write(" ".join(map(str, pids)) + "\n")


def match_for_ever(record: Path) -> None:
    """Write a row, then hold the interpreter in a regular expression."""
    insert()
    note(record, os.getpid())
    re.match(r"(a*)*b", "a" * 60)


def sleep_in_c(record: Path) -> None:
    """Write a row, then hold the interpreter in a call that does nothing."""
    insert()
    note(record, os.getpid())
    ctypes.PyDLL(None).sleep(600)


def select_long(record: Path) -> None:
    """Write a row, then wait for a statement."""
    insert()
    note(record, os.getpid())
    sleep_at_server()


def select_long_and_swallow(record: Path) -> None:
    """Write a row, then wait for a statement, and go on whatever becomes of it."""
    insert()
    note(record, os.getpid())
    try:
        sleep_at_server()
    except Exception:
        session.rollback()
    insert()


def start_children(record: Path) -> None:
    """Write a row, start a process that starts another, then wait for a statement."""
    insert()
    code = (
        "import subprocess; print(subprocess.Popen(['sleep', '600']).pid, flush=True)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code + "; import time; time.sleep(600)"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    note(record, os.getpid(), child.pid, int(child.stdout.readline()))
    sleep_at_server()


def fork_in_c(record: Path) -> None:
    """Fork as a C library does, past all hooks; the copy keeps all descriptors."""
    insert()
    child = ctypes.PyDLL(None).fork()
    if not child:
        time.sleep(600)
        os._exit(0)
    note(record, os.getpid(), child)
    time.sleep(600)


def insert() -> None:
    """Write a row."""
    session.add(Item(name="unfinished"))
    session.flush()


def sleep_at_server() -> None:
    """Wait for a long statement."""
    name = session.get_bind().dialect.name
    sql = "SELECT pg_sleep(600)" if name == "postgresql" else "SELECT sleep(600)"
    session.execute(text(sql))


def hold_and_select(record: Path) -> None:
    """Have a thread wait for a statement, which no interrupt reaches, and go on."""
    connection = session.connection()
    sql = "SELECT pg_sleep(600)"
    if connection.dialect.name != "postgresql":
        sql = "SELECT sleep(600)"
    while True:
        thread = threading.Thread(target=_select, args=(connection, sql))
        thread.start()
        note(record, os.getpid())
        with suppress(BaseException):
            while thread.is_alive():
                thread.join(0.01)


def _select(connection: Connection, sql: str) -> None:
    with suppress(Exception):
        connection.execute(text(sql))


def start_and_hold(record: Path) -> None:
    """Start a process, then hold the interpreter."""
    child = subprocess.Popen(["sleep", "600"])
    note(record, os.getpid(), child.pid)
    ctypes.PyDLL(None).sleep(600)
