"""Runs whole programs in an interpreter of their own.

Imported by tests.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dbpool_executor

FOLDERS = (Path(__file__).parent, Path(dbpool_executor.__file__).parent.parent)


@contextlib.contextmanager
def running(script: Path, text: str) -> Iterator[subprocess.Popen[str]]:
    """Run a program, in a process group of its own as a terminal would.

    It is killed at the end of the block if it still runs then.

    Args:
        script: Where to write it.
        text: Its text; it may import the modules of the tests.
    """
    script.write_text(text)
    program = subprocess.Popen(
        [sys.executable, "-W", "error", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, FOLDERS))},
    )
    with program:
        try:
            yield program
        finally:
            # The group may outlive the program: that is what some tests look for.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)
