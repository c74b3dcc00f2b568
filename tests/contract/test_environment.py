"""Workers see the environment that the program had when it made their executor."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from multiprocessing.context import BaseContext
from pathlib import Path

import pytest
from sqlalchemy import create_engine

import programs
from dbpool_executor import DBPoolExecutor, WorkerStartError
from processes import MakeExecutor
from servers import Database
from waiting import LONGEST


def surroundings() -> tuple[dict[str, str], str, list[str]]:
    """As a job: give what this process sees."""
    return dict(os.environ), str(Path.cwd()), sys.path


def engine_of_environment() -> object:
    """As an engine factory: make the engine that the environment names."""
    return create_engine(os.environ["DBPOOL_TEST_URL"])


def seen_by(executor: DBPoolExecutor) -> tuple[str, str | None, str, bool]:
    """Give what its worker sees of what the tests change."""
    variables, directory, path = executor.submit(surroundings).result(LONGEST)
    return (
        variables["DBPOOL_TEST_KEPT"],
        variables.get("DBPOOL_TEST_GONE"),
        directory,
        "/first" in path,
    )


def test_worker_sees_what_was_there_when_the_executor_was_made(
    sqlite_database: Database,
    context: BaseContext,
    make_executor: MakeExecutor,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Whole, and for a worker that is started later too; the next executor's its own."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    monkeypatch.setenv("DBPOOL_TEST_KEPT", "first")
    monkeypatch.setenv("DBPOOL_TEST_GONE", "first")
    monkeypatch.chdir(first)
    monkeypatch.setattr(sys, "path", [*sys.path, "/first"])
    one = make_executor(sqlite_database.make_engine, 1, context, max_tasks_per_child=1)
    monkeypatch.setenv("DBPOOL_TEST_KEPT", "second")
    monkeypatch.delenv("DBPOOL_TEST_GONE")
    monkeypatch.chdir(second)
    sys.path.remove("/first")
    other = make_executor(sqlite_database.make_engine, 1, context)
    for _ in range(2):
        assert seen_by(one) == ("first", "first", str(first), True)
    assert seen_by(other) == ("second", None, str(second), False)
    variables, _, _ = other.submit(surroundings).result(LONGEST)
    assert variables == dict(os.environ)


def test_module_of_the_factory_is_imported_in_that_environment(
    sqlite_database: Database,
    context: BaseContext,
    make_executor: MakeExecutor,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """By its path, and with the variables that it reads."""
    name = f"factory_of_{context.get_start_method()}"
    (tmp_path / f"{name}.py").write_text(
        "import os\n"
        "from sqlalchemy import create_engine\n"
        "SEEN = os.environ['DBPOOL_TEST_KEPT']\n"
        "def make_engine(): return create_engine(os.environ['DBPOOL_TEST_URL'])\n"
        "def seen(): return SEEN\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setenv("DBPOOL_TEST_KEPT", "made")
    monkeypatch.setenv("DBPOOL_TEST_URL", str(sqlite_database.url))
    module = __import__(name)
    executor = make_executor(module.make_engine, 1, context)
    sys.path.remove(str(tmp_path))
    monkeypatch.delenv("DBPOOL_TEST_URL")
    assert executor.submit(module.seen).result(LONGEST) == "made"


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_main_module_is_imported_in_that_environment(
    sqlite_database: Database, method: str, tmp_path: Path
) -> None:
    """Where each worker imports it by itself."""
    text = f"""
import multiprocessing, os, sys
from dbpool_executor import DBPoolExecutor
SEEN = os.environ.get("DBPOOL_TEST_SEEN"), os.getcwd(), "/seen" in sys.path
def seen(): return SEEN
if __name__ == "__main__":
    os.environ["DBPOOL_TEST_SEEN"] = "made"
    os.chdir({str(tmp_path)!r})
    sys.path.append("/seen")
    SEEN = os.environ.get("DBPOOL_TEST_SEEN"), os.getcwd(), "/seen" in sys.path
    context = multiprocessing.get_context({method!r})
    with DBPoolExecutor({str(sqlite_database.url)!r}, 1, context) as executor:
        os.environ["DBPOOL_TEST_SEEN"] = "later"
        os.chdir("/")
        sys.path.remove("/seen")
        print(executor.submit(seen).result({LONGEST}))
"""
    folder = tmp_path / "program"
    folder.mkdir()
    with programs.running(folder / "program.py", text) as program:
        out, err = program.communicate(timeout=2 * LONGEST)
    assert (out, err) == (f"{('made', str(tmp_path), True)}\n", "")


def test_working_directory_that_is_gone_is_a_clear_error(
    sqlite_database: Database,
    context: BaseContext,
    make_executor: MakeExecutor,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Of the constructor, or of the start if it goes later."""
    gone = tmp_path / "gone"
    gone.mkdir()
    home = Path.cwd()
    monkeypatch.chdir(gone)
    executor = make_executor(sqlite_database.make_engine, 1, context)
    shutil.rmtree(gone)
    with pytest.raises(FileNotFoundError, match=r"call os\.chdir\(\)"):
        make_executor(sqlite_database.make_engine, 1, context)
    os.chdir(home)
    with pytest.raises(WorkerStartError, match="gone was the working directory"):
        executor.submit(surroundings).result(LONGEST)


def test_environment_is_in_no_text(
    sqlite_database: Database,
    context: BaseContext,
    make_executor: MakeExecutor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Neither in what is logged nor in an error of the start, or its traceback."""
    monkeypatch.setenv("DBPOOL_TEST_SECRET", "hush-hush")
    monkeypatch.delenv("DBPOOL_TEST_URL", raising=False)
    caplog.set_level(logging.DEBUG)
    executor = make_executor(engine_of_environment, 1, context)
    with pytest.raises(WorkerStartError) as caught:
        executor.submit(surroundings).result(LONGEST)
    said = [caplog.text, repr(executor), str(caught.value), repr(vars(executor))]
    said += [str(caught.value.__cause__), str(caught.value.__cause__.__cause__)]  # type: ignore[union-attr]
    assert "DBPOOL_TEST_URL" in said[-1]
    assert "hush-hush" not in "".join(said)
