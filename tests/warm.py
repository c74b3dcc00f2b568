"""Asks the interpreter of ``forking.py`` to run programs.

Imported by tests.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from waiting import LONGEST

ROUNDS = "DBPOOL_TEST_ROUNDS"


def rounds(usual: int) -> int:
    """Say how often to repeat what depends on chance, or is promised to be endless.

    Args:
        usual: How often, unless the environment asks for more.
    """
    return max(usual, int(os.environ.get(ROUNDS, "0")))


class Interpreter:
    """An interpreter that has imported everything, and forks a process per program.

    Args:
        folder: Where programs leave what they report and print.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-X",
                "faulthandler",
                Path(__file__).with_name("forking.py"),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )

    def run(self, program: str, /, **arguments: Any) -> Any:
        """Run a program, and give what it reports.

        Args:
            program: Its name in ``forking.PROGRAMS``.
            arguments: What to call it with, as far as JSON can carry it.

        Raises:
            AssertionError: It raised, died, or did not end in time.
        """
        self._count += 1
        report = self._folder / f"{self._count}.json"
        log = self._folder / f"{self._count}.log"
        request = [program, arguments, str(report), str(log)]
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        pid = int(self._line())
        try:
            code = int(self._line())
        except TimeoutError:
            os.killpg(pid, signal.SIGKILL)
            self._line()
            code = -signal.SIGKILL
        finally:
            # What the program has forked and forgotten.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        assert code == 0 and report.exists(), f"{program}: {code}\n{log.read_text()}"
        return json.loads(report.read_text())

    def close(self) -> None:
        """End the interpreter."""
        self._process.communicate(timeout=LONGEST)

    def _line(self) -> bytes:
        stdout = self._process.stdout
        assert stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            if not selector.select(2 * LONGEST):
                raise TimeoutError
        # Read past any buffer, or a second line would hide in it.
        line = b""
        while not line.endswith(b"\n"):
            byte = os.read(stdout.fileno(), 1)
            assert byte, "the interpreter of forking.py has ended"
            line += byte
        return line
