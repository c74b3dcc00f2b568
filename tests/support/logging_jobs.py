"""Jobs that log. Imports no pytest: workers import it."""

from __future__ import annotations

import logging
import os
import signal
import threading
import warnings

log = logging.getLogger("tests.jobs")


def log_numbers(first: int, count: int) -> int:
    """Log numbers in order, and give this worker's process."""
    for number in range(first, first + count):
        log.info("number %d", number, extra={"number": number})
    return os.getpid()


def log_in_threads(count: int) -> None:
    """Log from several threads at once, more than a pipe holds."""
    threads = [threading.Thread(target=log_numbers, args=(0, count)) for _ in range(4)]
    for thread in threads:
        thread.start()
    log_numbers(0, count)
    for thread in threads:
        thread.join()


def log_exception() -> None:
    """Log what does not pickle: a traceback, and an attribute of the program's own."""
    try:
        raise LookupError("nowhere")
    except LookupError:
        log.exception("failed", extra={"lock": threading.Lock()})


def log_in_copies(count: int) -> set[int]:
    """Fork while another thread logs, have each copy log, and give the exit codes."""
    is_over = threading.Event()

    def log_meanwhile() -> None:
        while not is_over.is_set():
            log.info("in the worker")

    thread = threading.Thread(target=log_meanwhile)
    thread.start()
    codes = set()
    for _ in range(count):
        copy = os.fork()
        if copy == 0:
            signal.alarm(10)  # it may wait for a lock that nobody has any more
            log.warning("in a copy")
            os._exit(0)
        codes.add(os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1]))
    is_over.set()
    thread.join()
    return codes


def warn() -> None:
    """Warn."""
    warnings.warn("old ways", UserWarning, stacklevel=1)


def log_and_die() -> None:
    """Log, and be killed."""
    log.warning("last words")
    os.kill(os.getpid(), signal.SIGKILL)


def log_for_ever() -> None:
    """Log until the time is up."""
    while True:
        log.info("again")
