"""Engine factories and initializers that hang, or that need a server.

Imported by workers, so it imports no pytest.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from sqlalchemy import Engine, text

from dbpool_executor import session


def hang_here() -> NoReturn:
    """Never return."""
    threading.Event().wait()
    raise AssertionError("unreachable")


def hang(seen: Path) -> NoReturn:
    """Note that one more has come here, and never return."""
    with seen.open("a") as file:
        file.write("x")
    hang_here()


def hang_after_first(seen: Path) -> None:
    """Return once, and then never."""
    try:
        seen.touch(exist_ok=False)
    except FileExistsError:
        hang_here()


class HangingFactory:
    """Makes an engine, unless it hangs before that."""

    def __init__(self, make_engine: Callable[[], Engine]) -> None:
        self._make_engine = make_engine

    def __call__(self) -> Engine:
        """Never return."""
        hang_here()


class HangingImport(HangingFactory):
    """Hangs where it is unpickled."""

    def __setstate__(self, state: Any) -> None:
        hang_here()


def ask_server() -> None:
    """Need the database."""
    session.execute(text("SELECT 1"))
