"""Functions that no worker can import: of the prompt, of notebooks, and lambdas."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import programs
from servers import Database

BLOCKED = "import sys; sys.modules['cloudpickle'] = None\n"

AT_THE_PROMPT = """\
import dataclasses, multiprocessing
from sqlalchemy import create_engine, text
from dbpool_executor import DBPoolExecutor, current_engine, session

@dataclasses.dataclass
class Point:
    x: int

class NoPoint(Exception):
    pass

factor = 3

def make_engine():
    return create_engine({url!r})

def insert(name):
    session.execute(
        text("INSERT INTO item (name, amount) VALUES (:name, 0)"), {{"name": name}}
    )

def job(x):
    insert("by a job")
    return Point(factor * x)

def bad():
    insert("by a bad job")
    raise NoPoint("none")

context = multiprocessing.get_context({method!r})
with DBPoolExecutor(make_engine, 1, context, initializer=insert,
                    initargs=("by the initializer",)) as executor:
    point = executor.submit(job, 2).result(30)
    print(point, type(point) is Point)

    def later(x):
        return job(x).x

    factor = 5
    print(executor.submit(lambda: current_engine().dialect.name).result(30))
    error = executor.submit(bad).exception(30)
    print(*executor.map(len, ["ab", "c"]), repr(error).partition(",")[0])
    print(repr(executor.submit(lambda: session).exception(30)).partition("(")[0])
"""


def at_the_prompt(text: str) -> subprocess.CompletedProcess[str]:
    """Run a program whose main module no other process can import."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", text],
        check=False,
        capture_output=True,
        text=True,
        timeout=90,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, programs.FOLDERS))},
    )


def test_functions_and_classes_of_the_prompt_work(
    sqlite_database: Database, start_method: str
) -> None:
    """As jobs, as the engine factory and the initializer; and their results are theirs."""
    text = AT_THE_PROMPT.format(url=str(sqlite_database.url), method=start_method)
    done = at_the_prompt(text)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "Point(x=6) True",
        "sqlite",
        "2 1 JobFailedError('__main__.NoPoint'",
        "NotPlainError",
    ]
    assert sqlite_database.names() == {"by the initializer", "by a job"}


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_error_of_the_prompt_without_cloudpickle_says_what_to_install(
    sqlite_database: Database, method: str
) -> None:
    """In the constructor, and not by workers that fail to start."""
    text = AT_THE_PROMPT.format(url=str(sqlite_database.url), method=method)
    done = at_the_prompt(BLOCKED + text)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("TypeError: engine_factory is made of something")
    assert "install dbpool-executor[cloudpickle]" in last


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_job_of_the_prompt_without_cloudpickle_says_what_to_install(
    sqlite_database: Database, method: str
) -> None:
    """It never started; the worker and its other jobs are well."""
    text = (
        "import multiprocessing\n"
        "from dbpool_executor import DBPoolExecutor\n"
        f"context = multiprocessing.get_context({method!r})\n"
        f"url = {str(sqlite_database.url)!r}\n"
        "with DBPoolExecutor(url, 1, context) as executor:\n"
        "    print(executor.submit(len, 'abc').result(30))\n"
        "    def job(): return 1\n"
        "    for call in (job, lambda: 1):\n"
        "        error = executor.submit(call).exception(30)\n"
        "        print(type(error).__name__, error, *getattr(error, '__notes__', []))\n"
        "    print(executor.submit(len, 'abcd').result(30))\n"
    )
    done = at_the_prompt(BLOCKED + text)
    assert (done.returncode, done.stderr) == (0, "")
    first, by_name, unnamed, last = done.stdout.splitlines()
    assert (first, last) == ("3", "4")
    assert by_name.startswith("ArgumentsLostError")
    for told in (by_name, unnamed):
        assert "install dbpool-executor[cloudpickle]" in told


SCRIPT = """\
import multiprocessing
import sys
from sqlalchemy import select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from dbpool_executor import DBPoolExecutor, session

class Base(DeclarativeBase):
    pass

class Thing(Base):
    __tablename__ = "item"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    amount: Mapped[int]

def job(name):
    session.add(Thing(name=name, amount=1))
    return session.scalars(select(Thing.name)).all()

def use_class(cls):
    return session.query(cls).count()

if __name__ == "__main__":
    context = multiprocessing.get_context({method!r})
    with DBPoolExecutor({url!r}, 1, context) as executor:
        print(executor.submit(job, "a").result(30))
        print(executor.submit(use_class, Thing).result(30))
        number = 2
        print(executor.submit(lambda: number).result(30))
"""


def test_mapped_classes_of_a_script_work_and_so_do_its_lambdas(
    sqlite_database: Database, start_method: str, tmp_path: Path
) -> None:
    """What the worker can import goes by its name, so that there is one class of it."""
    text = SCRIPT.format(url=str(sqlite_database.url), method=start_method)
    with programs.running(tmp_path / "program.py", text) as program:
        output, errors = program.communicate(timeout=90)
    assert (program.returncode, errors) == (0, "")
    assert output.splitlines() == ["['a']", "1", "2"]
    assert sqlite_database.names() == {"a"}
