"""Exceptions that a signal's handler raises anywhere, a thousand times in one program."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import interrupted

PROGRAM = Path(interrupted.__file__)
TIMES = {"with": 8, "shutdown": 8}  # each starts a worker


@pytest.mark.parametrize("call", interrupted.CALLS)
def test_nothing_hangs_however_often_it_is_interrupted(call: str) -> None:
    """All that was submitted ends, a new job is done, and so does the program."""
    times = TIMES.get(call, 150)
    done = subprocess.run(
        [sys.executable, PROGRAM, call, str(times), "1"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= times
