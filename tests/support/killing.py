"""Kills workers at random moments, from a thread of the test."""

from __future__ import annotations

import logging
import os
import random
import signal
import threading

KILLS = int(os.environ.get("DBPOOL_TEST_KILLS", "60"))
"""Kills over all databases and start methods of a random test."""

log = logging.getLogger("dbpool_executor")


class Killer(logging.Handler):
    """Kills workers at random moments, in a thread.

    Only those that are ready, as the log tells: a worker that is killed while it starts
    is another story, and three of them in a row break the executor.

    Args:
        most: How many to kill.
        pause: Seconds between two kills, at most.
    """

    def __init__(self, most: int, pause: float) -> None:
        super().__init__(logging.DEBUG)
        self._most = most
        self._pause = pause
        self._chance = random.Random(4)
        self._ready: set[int] = set()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._kill)
        self.killed: list[int] = []

    def __enter__(self) -> Killer:
        log.addHandler(self)
        log.setLevel(logging.DEBUG)
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._is_over.set()
        self._thread.join()
        log.setLevel(logging.NOTSET)
        log.removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Learn of a worker."""
        if record.msg == "worker %s is ready" and isinstance(record.args, tuple):
            (pid,) = record.args
            self._ready.add(int(str(pid)))

    @property
    def is_done(self) -> bool:
        """Whether it has killed as many as it was to."""
        return len(self.killed) >= self._most

    def _kill(self) -> None:
        while not self.is_done:
            if self._is_over.wait(self._chance.uniform(0.0, self._pause)):
                return
            if self._ready:
                pid = self._chance.choice(sorted(self._ready))
                self._ready.discard(pid)
                os.kill(pid, signal.SIGKILL)
                self.killed.append(pid)
