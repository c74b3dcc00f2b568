"""CPython's own tests of executors, run against ours; see ``cpython_suite``.

They come with the interpreter: those of its package ``test.test_concurrent_futures``.
All of them are run under fork. What a start method changes is run under the others too,
and all the rest there if ``DBPOOL_TEST_CPYTHON=all`` is in the environment.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import cpython_suite
import dbpool_executor

FOLDERS = (
    Path(cpython_suite.__file__).parent,
    Path(dbpool_executor.__file__).parent.parent,
)

LONGEST_RUN = 540  # seconds; each single test is bounded by the program itself

CHOSEN = {
    "fork": cpython_suite.MODULES,
    "forkserver": ["process_pool", "shutdown", "init", "deadlock"],
    "spawn": ["shutdown", "init"],
}

NEEDS_LOCK = (
    "what it submits does not pickle (a semaphore, a local function), which it does not "
    "look at; ours fails such a call at once and starts no worker for it"
)
EXITS = (
    "expects SystemExit itself; ours gives JobExitedError, whose cause it is, so that "
    "asking for a result does not end the program"
)
COUNTS = (
    "runs FailingInitializerTest, see there, whose failure keeps the semaphores that "
    "this one counts"
)
EXCEPTIONS = {
    "ProcessPoolExecutorTest.test_killed_child": (
        "expects that one crash breaks the executor; ours replaces the worker"
    ),
    "ProcessPoolExecutorTest.test_traceback": (
        "asks for the private class of the cause, _RemoteTraceback; ours is public, "
        "WorkerTraceback, and says the same"
    ),
    "ProcessPoolExecutorTest.test_saturation": NEEDS_LOCK,
    "ProcessPoolShutdownTest.test_processes_terminate": NEEDS_LOCK,
    "fork ProcessPoolExecutorTest.test_max_tasks_per_child": (
        "expects that fork is refused; ours can replace forked workers"
    ),
    "ProcessPoolExecutorTest.test_max_tasks_per_child_defaults_to_spawn_context": (
        "looks for spawn in _mp_context; ours replaces workers of the forkserver too"
    ),
    "ProcessPoolExecutorTest.test_python_finalization_error": (
        "has the start of a second thread fail; ours has one, and does the jobs"
    ),
    "FailingInitializerTest.test_initializer": (
        "looks for the traceback in the worker's log of concurrent.futures; ours gives "
        "it as the cause of the error and logs it in this process"
    ),
    "FailingInitializerResourcesTest.test_forkserver": COUNTS,
    "FailingInitializerResourcesTest.test_spawn": COUNTS,
    "ExecutorDeadlockTest.test_exit_during_func_exec_on_worker": EXITS,
    "ExecutorDeadlockTest.test_exit_during_result_pickle_on_worker": EXITS,
}
"""Tests that must fail, with a start method if it is only there, and why."""

TIMED = {
    "ProcessPoolExecutorTest.test_ressources_gced_in_workers": (
        "has a limit of one second for a message by way of a third process"
    ),
}
"""Tests that may fail on a busy machine, and why."""


@pytest.mark.heavy
@pytest.mark.timeout(LONGEST_RUN + 60)
def test_cpythons_tests_pass(start_method: str, tmp_path: Path) -> None:
    """All but the exceptions, and those fail: the table of them is true."""
    if not cpython_suite.is_there():
        pytest.skip(f"this interpreter has no {cpython_suite.PACKAGE}: {sys.version}")
    if start_method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this interpreter has no {start_method}")
    modules = CHOSEN[start_method]
    if os.environ.get("DBPOOL_TEST_CPYTHON") == "all":
        modules = cpython_suite.MODULES
    results = run(start_method, modules, tmp_path)

    excepted = {
        name
        for name, *_ in results
        if name in EXCEPTIONS or f"{start_method} {name}" in EXCEPTIONS
    }
    wrong = [
        f"{name} {result} against the table\n{why}"
        for name, result, why in results
        if name not in TIMED and result == ("passed" if name in excepted else "failed")
    ]
    assert not wrong, "\n".join(wrong)
    passed = sum(result == "passed" for _, result, _ in results)
    assert passed > len(results) / 2, "most tests were skipped"


def run(
    start_method: str, modules: list[str], folder: Path
) -> list[tuple[str, str, str]]:
    """Run the tests of a start method in an interpreter of their own.

    Returns:
        The name of each test, its result, and why.
    """
    output, log = folder / "results.jsonl", folder / "log"
    paths = [*map(str, FOLDERS), *filter(None, [os.environ.get("PYTHONPATH")])]
    # Not a file: workers of the spawn method would import it each time.
    call = f"cpython_suite.main({start_method!r}, {str(output)!r}, {modules!r})"
    with log.open("wb") as file:
        program = subprocess.Popen(
            [sys.executable, "-c", f"import cpython_suite; {call}"],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        try:
            program.wait(LONGEST_RUN)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)
            program.wait()
    told = log.read_text(errors="replace")
    assert program.returncode == 0, f"it hangs or crashes:\n{told[-20_000:]}"
    lines = map(json.loads, output.read_text().splitlines())
    return [(line["test"], line["result"], line["why"]) for line in lines]
