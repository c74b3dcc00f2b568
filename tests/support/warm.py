"""An interpreter that has imported everything, and forks a process for each program.

So a program costs a fork and not the import of SQLAlchemy. Imported by tests, and run
as a script by :class:`Interpreter`. Imports no pytest.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import selectors
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine

import defence
from waiting import LONGEST

ROUNDS = "DBPOOL_TEST_ROUNDS"


def rounds(usual: int) -> int:
    """Say how often to repeat what depends on chance, or is promised to be endless.

    Args:
        usual: How often, unless the environment asks for more.
    """
    return max(usual, int(os.environ.get(ROUNDS, "0")))


class Interpreter:
    """The interpreter, as tests see it.

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
                __file__,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )

    def run(self, program: str, /, **arguments: Any) -> Any:
        """Run a program, and give what it reports.

        Args:
            program: The name of its function.
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
            assert byte, "the interpreter has ended"
            line += byte
        return line


# -- The other side ----------------------------------------------------------------


def serve() -> None:
    """Run programs, each in a fork, until no more are asked for."""
    import forking
    import forking_executors
    import forking_pools

    programs = {
        program.__name__: program
        for module in (forking, forking_executors, forking_pools)
        for program in module.PROGRAMS
    }
    for driver in ("psycopg", "psycopg2", "asyncpg", "pymysql", "mysqldb"):
        backend = "mysql" if "mysql" in driver else "postgresql"
        with contextlib.suppress(ImportError):
            create_engine(f"{backend}+{driver}://")
    # So that collection in a copy looks at what its program has, and at nothing else.
    gc.freeze()
    for line in sys.stdin:
        name, arguments, report, log = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.setsid()
            _redirect(log)
            result = programs[name](**arguments)
            Path(report).write_text(json.dumps(result))
            return
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _redirect(log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


if __name__ == "__main__":
    serve()
elif __name__ == "__mp_main__" and defence.is_taken_away():
    defence.take_away()  # in a worker of a program that has an executor
