"""The README: its programs run, and print what it says they print."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dbpool_executor import errors

README = Path(__file__).parent.parent.parent / "README.md"
TEXT = README.read_text(encoding="utf-8")
PROGRAM = re.compile(r"```python\n(.*?)```\n\n```text\n(.*?)```", re.DOTALL)
PROGRAMS = PROGRAM.findall(TEXT)
QUICKSTART = re.compile(
    r"python3 -m venv (?P<venv>\S+)\n"
    r"(?P=venv)/bin/python -m pip install -q (?P<what>.+)\n"
    r"(?P=venv)/bin/python -m (?P<module>.+)\n"
)


def quickstart() -> str:
    """Give the section of that name."""
    return TEXT.split("## Quickstart", 1)[1].split("\n## ", 1)[0]


def test_every_python_block_is_a_program_with_output():
    """No example stands there that is not run."""
    assert TEXT.count("```python") == len(PROGRAMS) >= 5


@pytest.mark.smoke
@pytest.mark.parametrize(("code", "output"), PROGRAMS)
def test_a_program_prints_what_the_readme_says(code, output, tmp_path):
    """Run as a user would, with every warning an error."""
    script = tmp_path / "program.py"
    script.write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.stdout, done.stderr, done.returncode) == (output, "", 0)


def test_the_quickstart_has_two_commands():
    """The first runs the demo, the second the tests; CI runs both, line by line."""
    blocks = re.findall(r"```sh\n(.*?)```", quickstart(), re.DOTALL)
    assert len(blocks) == TEXT.count("```sh") == 2
    demo, tests = (QUICKSTART.fullmatch(block.replace('"', "")) for block in blocks)
    assert demo, blocks[0]
    assert (demo["what"], demo["module"]) == (".[progress]", "dbpool_executor demo")
    assert tests, blocks[1]
    assert (tests["what"], tests["module"]) == ("-e .[tests]", "pytest -q")
    assert demo["venv"] != tests["venv"]  # neither needs the other


def test_every_error_is_explained():
    """The list of errors has each class of the tree."""
    section = TEXT.split("## Errors", 1)[1].split("\n## ", 1)[0]
    public = {name: getattr(errors, name) for name in errors.__all__}
    kinds = [
        name
        for name, value in public.items()
        if isinstance(value, type) and issubclass(value, errors.DBPoolError)
    ]
    assert [name for name in kinds if f"`{name}`" not in section] == []
