"""What the operating system says of this process and its children.

Imported by tests.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeAlias

import psutil

from dbpool_executor import DBPoolExecutor

MakeExecutor: TypeAlias = Callable[..., DBPoolExecutor]

_SERVANTS = (
    "multiprocessing.forkserver",
    "multiprocessing.resource_tracker",
    # Of the tests themselves, kept for the whole run.
    "mariadbd",
    "postgres",
    "warm.py",
)


def workers() -> set[psutil.Process]:
    """Give the processes that descend from this one.

    Without the two that ``multiprocessing`` itself keeps until this process ends.
    """
    found = set()
    direct = psutil.Process().children()
    for child in psutil.Process().children(recursive=True):
        try:
            # Those that the forkserver forks have its command line too.
            is_servant = child in direct and any(
                servant in argument
                for argument in child.cmdline()
                for servant in _SERVANTS
            )
        except psutil.ZombieProcess:
            is_servant = False
        except psutil.NoSuchProcess:
            continue
        if not is_servant:
            found.add(child)
    return found


def worker_pids() -> set[int]:
    """Give the process ids of :func:`workers`."""
    return {process.pid for process in workers()}


def dispatchers() -> set[threading.Thread]:
    """Give the threads of this process that talk to workers."""
    return {t for t in threading.enumerate() if t.name == "DBPoolDispatcher"}
