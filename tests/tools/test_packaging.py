"""The package as it is published: what is in it, and that it works alone.

It is built as a release is, the wheel out of the sdist, and installed where nothing else
is. That needs the package index, and some 20 seconds for what is downloaded from there.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path, PurePosixPath

import pytest

import servers

ROOT = Path(__file__).parent.parent.parent
MODULES = {str(path.relative_to(ROOT)) for path in ROOT.glob("dbpool_executor/**/*.py")}
PAGES = {str(path.relative_to(ROOT)) for path in ROOT.glob("dbpool_executor/docs/*.md")}
LONGEST = 100.0  # seconds

PROGRAM = """
import json
from importlib import metadata

from sqlalchemy import text

from dbpool_executor import DBPoolExecutor, session


def create():
    session.execute(text("CREATE TABLE numbers (n integer)"))


def add(number):
    session.execute(text("INSERT INTO numbers VALUES (:n)"), {"n": number})
    return session.execute(text("SELECT sum(n) FROM numbers")).scalar_one()


if __name__ == "__main__":
    with DBPoolExecutor("sqlite:///numbers.db", max_workers=1) as executor:
        executor.submit(create).result(60)
        sums = list(executor.map(add, [1, 2, 3]))
    names = [d.metadata["Name"] for d in metadata.distributions()]
    needed = [r for r in metadata.requires("sqlalchemy") if "extra ==" not in r]
    print(json.dumps({"sums": sums, "installed": names, "needed": needed}))
"""


def run(*command: object, cwd: Path, path: str = "") -> str:
    """Run a command to its end and give what it prints."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**env, "PYTHONPATH": path} if path else env,
        capture_output=True,
        text=True,
        timeout=LONGEST,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(*arguments: object, cwd: Path, path: str = "") -> None:
    """Run pip, which needs the package index."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    try:
        run(*command, *arguments, cwd=cwd, path=path)
    except AssertionError as exc:
        if servers.is_required() or "No matching distribution" not in str(exc):
            raise
        pytest.skip("the package index cannot be reached")


def normalized(name: str) -> str:
    """Give the one form of a distribution's name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Build the sdist; give it, and where its build tool is installed."""
    folder = tmp_path_factory.mktemp("sdist")
    tool = folder / "tool"
    pip("install", "--target", tool, "hatchling", cwd=folder)
    program = f"from hatchling.build import build_sdist as b; print(b({str(folder)!r}))"
    name = run(sys.executable, "-c", program, cwd=ROOT, path=str(tool))
    return folder / name.strip(), str(tool)


@pytest.fixture(scope="module")
def wheel(sdist: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel out of the sdist."""
    source, tool = sdist
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", folder]
    pip("wheel", *options, source, cwd=folder, path=tool)
    (built,) = folder.glob("*.whl")
    return built


def test_sdist_holds_what_is_needed_to_build_and_test_it(sdist):
    """The sources, their tests, the README and the license."""
    with tarfile.open(sdist[0]) as archive:
        paths = {PurePosixPath(*PurePosixPath(n).parts[1:]) for n in archive.getnames()}
    names = {str(path) for path in paths}
    assert {"pyproject.toml", "README.md", "LICENSE", "PKG-INFO"} <= names
    assert names >= MODULES
    assert {"dbpool_executor/py.typed", "tests/conftest.py"} <= names
    assert names >= PAGES
    assert {p.suffix for p in paths} & {".pyc", ".db", ".log"} == set()


def test_wheel_holds_the_package_alone(wheel):
    """Every module, the mark that it is typed, the license; no tests."""
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        paths = [PurePosixPath(name) for name in archive.namelist()]
    (info,) = {p.parts[0] for p in paths} - {"dbpool_executor"}
    assert info.endswith(".dist-info")
    ours = {str(p) for p in paths if p.parts[0] == "dbpool_executor"}
    assert ours == {*MODULES, "dbpool_executor/py.typed"}
    assert any(p.parts[0] == info and p.name == "LICENSE" for p in paths)


def test_wheel_works_where_only_sqlalchemy_is(wheel, tmp_path):
    """It brings SQLAlchemy and what that needs, and runs jobs and the check."""
    venv.create(tmp_path / "empty", with_pip=False)
    python = tmp_path / "empty" / "bin" / "python"
    pip("--python", python, "install", wheel, cwd=tmp_path)
    (tmp_path / "program.py").write_text(PROGRAM)
    told = json.loads(run(python, "-W", "error", "program.py", cwd=tmp_path))
    assert told["sums"] == [1, 3, 6]
    needed = {normalized(re.match(r"[\w.-]+", n)[0]) for n in told["needed"]}
    installed = {normalized(name) for name in told["installed"]}
    assert installed - needed == {"dbpool-executor", "sqlalchemy"}
    check = [python, "-W", "error", "-m", "dbpool_executor", "check"]
    run(*check, "--url", "sqlite:///numbers.db", "--workers", 1, cwd=tmp_path)
