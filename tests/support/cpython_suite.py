"""Runs CPython's own tests of executors against ours.

They are taken from the interpreter that runs this, nothing of them is copied. Imported
by ``test_cpython_suite``, which says what may fail, and by the programs that those
tests write; it imports no pytest. By hand, in this folder::

    python -c "import cpython_suite as c; c.main('fork', 'out.jsonl', ['wait'])"

Each line of the output is one test: its name, ``passed``, ``failed`` or ``skipped``,
why, and how long it took.
"""

# ruff: noqa: N802 - the names are unittest's

from __future__ import annotations

import concurrent.futures
import faulthandler
import gc
import importlib
import importlib.util
import json
import os
import sys
import threading
import time
import unittest
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import processes
from dbpool_executor import DBPoolExecutor
from waiting import LONGEST, wait_until

PACKAGE = "test.test_concurrent_futures"
MODULES = ["as_completed", "wait", "process_pool", "shutdown", "init", "deadlock"]

LONGEST_TEST = 60
"""Seconds after which a test hangs, and the program ends with a traceback."""


class Ours(DBPoolExecutor):
    """Our executor as those tests make it, and what they look at of its inside.

    They look at private attributes to count processes, and to wait for their end; here
    that is told by the operating system and by the public counts.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("sqlite:///unused.db", *args, **kwargs)

    @property
    def _processes(self) -> dict[int, SimpleNamespace]:
        # The standard executor starts its workers in submit(), ours a moment later.
        wait_until(self._has_settled, "workers for all jobs, and none that is leaving")
        return {
            process.pid: SimpleNamespace(
                terminate=process.terminate, join=partial(process.wait, LONGEST)
            )
            for process in processes.workers()
        }

    def _has_settled(self) -> bool:
        stats = self.stats()
        if stats.workers != stats.idle + stats.running:
            return False
        return not stats.queued or stats.workers == self._max_workers

    @property
    def _executor_manager_thread(self) -> threading.Thread:
        # A test that failed may have left one: this executor's was the last to start.
        ours = processes.dispatchers()
        return [thread for thread in threading.enumerate() if thread in ours][-1]

    @property
    def _call_queue(self) -> SimpleNamespace:
        return SimpleNamespace(join_thread=lambda: None)  # there is none to wait for

    @property
    def _broken(self) -> bool:
        return " broken," in repr(self)


class ByName(Ours):
    """What those tests get that name the standard class.

    Not :class:`Ours` itself: some are skipped for the standard class.
    """


def is_there() -> bool:
    """Say whether this interpreter was installed with the tests."""
    try:
        return importlib.util.find_spec(PACKAGE) is not None
    except ModuleNotFoundError:
        return False


def main(start_method: str, output: str, modules: list[str]) -> None:
    """Run the tests of a start method.

    Args:
        start_method: Its name.
        output: The file to write to.
        modules: Which of :data:`MODULES`. Up to Python 3.11 there is only one module,
            and all of it is run.
    """
    with Path(output).open("w", buffering=1) as file:
        suite = unittest.TestSuite(_tests(start_method, modules))
        runner = unittest.TextTestRunner(
            stream=sys.stderr, resultclass=partial(_Result, file)
        )
        runner.run(suite)


def name_of(test_id: str) -> str:
    """Shorten a test's name to its class and method, without the start method."""
    name = ".".join(test_id.split(".")[-2:])
    for method in ("Forkserver", "Fork", "Spawn"):
        name = name.removeprefix(f"ProcessPool{method}")
    return name


def _tests(start_method: str, names: list[str]) -> Iterator[unittest.TestCase]:
    """Have the tests use our executor, and give those of a start method."""
    concurrent.futures.ProcessPoolExecutor = ByName  # type: ignore[misc]
    package = importlib.import_module(PACKAGE)
    modules = [package]
    mixins = package
    if hasattr(package, "__path__"):
        mixins = importlib.import_module(f"{PACKAGE}.util")
        modules = [importlib.import_module(f"{PACKAGE}.test_{name}") for name in names]
    mixin = getattr(mixins, f"ProcessPool{start_method.capitalize()}Mixin")
    mixin.executor_type = Ours
    for module in modules:
        _redirect_programs(module)
        for test in _flat(unittest.defaultTestLoader.loadTestsFromModule(module)):
            is_for_it = test.id().endswith(f".test_{start_method}")
            if isinstance(test, mixin) or is_for_it:
                yield test


def _flat(suite: Any) -> Iterator[unittest.TestCase]:
    if isinstance(suite, unittest.TestCase):
        yield suite
        return
    for part in suite:
        yield from _flat(part)


def _redirect_programs(module: ModuleType) -> None:
    """Have the programs that a module writes import our executor."""
    run = getattr(module, "assert_python_ok", None)
    if run is None:
        return

    def run_ours(option: str, text: str) -> Any:
        text = text.replace(
            "from concurrent.futures import",
            # One of them forgets to import multiprocessing.
            "import multiprocessing; from cpython_suite import",
        )
        # Not isolated: it must find this module.
        return run(option, text, __isolated=False, **os.environ)

    module.assert_python_ok = run_ours  # type: ignore[attr-defined]


class _Result(unittest.TextTestResult):
    """Writes a line for each test, and ends the program when one hangs."""

    def __init__(self, file: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._file = file
        self._support: Any = importlib.import_module("test.support")
        self._begun = 0.0

    def _note(self, test: unittest.TestCase, result: str, why: str = "") -> None:
        seconds = round(time.monotonic() - self._begun, 2)
        line = {
            "test": name_of(test.id()),
            "result": result,
            "why": why,
            "seconds": seconds,
        }
        print(json.dumps(line), file=self._file)

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        print("running", test.id(), file=sys.stderr, flush=True)
        self._begun = time.monotonic()
        self._support.environment_altered = False
        faulthandler.dump_traceback_later(LONGEST_TEST, exit=True)

    def stopTest(self, test: unittest.TestCase) -> None:
        faulthandler.cancel_dump_traceback_later()
        super().stopTest(test)
        # A test that fails may leave its executor to the collector, with its traceback;
        # the forkserver, which is ended after the last test, waits for the workers.
        gc.collect()

    def addSuccess(self, test: unittest.TestCase) -> None:
        super().addSuccess(test)
        if self._support.environment_altered:
            self._note(test, "failed", "it left a thread or a process behind")
        else:
            self._note(test, "passed")

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        super().addSkip(test, reason)
        self._note(test, "skipped", reason)

    def addError(self, test: unittest.TestCase, err: Any) -> None:
        super().addError(test, err)
        self._note(test, "failed", self.errors[-1][1])

    def addFailure(self, test: unittest.TestCase, err: Any) -> None:
        super().addFailure(test, err)
        self._note(test, "failed", self.failures[-1][1])

    def addSubTest(
        self, test: unittest.TestCase, subtest: unittest.TestCase, err: Any
    ) -> None:
        super().addSubTest(test, subtest, err)
        if err is not None:
            self._note(test, "failed", (self.errors + self.failures)[-1][1])
