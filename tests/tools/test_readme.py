"""The README and the pages of the docs: their programs run, and print what they say."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import servers
from dbpool_executor import errors

ROOT = Path(__file__).parent.parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "dbpool_executor" / "docs"
PAGES = [README, *sorted(DOCS.glob("*.md"))]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
PROGRAM = re.compile(r"```python\n(.*?)```\n\n```text\n(.*?)```", re.DOTALL)
PROGRAMS = {
    f"{page.stem}-{number}": program
    for page, text in TEXTS.items()
    for number, program in enumerate(PROGRAM.findall(text), 1)
}
POSTGRESQL = "postgresql+psycopg://localhost/shop"
"""The database that a program names which needs PostgreSQL."""
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
LINK = re.compile(r"!?\[[^\]]+\]\(([^)\s]+)\)")
QUICKSTART = re.compile(
    r"python3 -m venv (?P<venv>\S+)\n"
    r"(?P=venv)/bin/python -m pip install -q (?P<what>.+)\n"
    r"(?P=venv)/bin/python -m (?P<module>.+)\n"
)


def quickstart() -> str:
    """Give the section of that name."""
    return TEXTS[README].split("## Quickstart", 1)[1].split("\n## ", 1)[0]


def anchors(text: str) -> set[str]:
    """Give the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE
    )
    words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {"-".join(word.split(" ")) for word in words}


def imported(code: str) -> set[str]:
    """Give the packages that a program imports."""
    return set(re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE))


def test_the_readme_is_a_front_page():
    """Whatever is longer stands in the docs."""
    assert TEXTS[README].count("\n") < 250


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_python_block_is_a_program_with_output(page):
    """No example stands there that is not run."""
    assert TEXTS[page].count("```python") == len(PROGRAM.findall(TEXTS[page]))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.smoke if "README" in name else [])
        for name in PROGRAMS
    ],
)
def test_a_program_prints_what_its_page_says(name, tmp_path, request):
    """Run as a user would, with every warning an error."""
    code, output = PROGRAMS[name]
    for package in imported(code):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    if POSTGRESQL in code:
        server = request.getfixturevalue("postgresql_url")
        url = servers.on_server("postgresql-psycopg", server).url
        code = code.replace(POSTGRESQL, url.render_as_string(hide_password=False))
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
    assert len(blocks) == TEXTS[README].count("```sh") == 2
    demo, tests = (QUICKSTART.fullmatch(block.replace('"', "")) for block in blocks)
    assert demo, blocks[0]
    assert (demo["what"], demo["module"]) == (".[progress]", "dbpool_executor demo")
    assert tests, blocks[1]
    assert (tests["what"], tests["module"]) == ("-e .[tests]", "pytest -q")
    assert demo["venv"] != tests["venv"]  # neither needs the other


def test_every_error_is_explained():
    """The list of errors has each class of the tree."""
    section = TEXTS[DOCS / "failures.md"].split("## Errors", 1)[1].split("\n## ", 1)[0]
    public = {name: getattr(errors, name) for name in errors.__all__}
    kinds = [
        name
        for name, value in public.items()
        if isinstance(value, type) and issubclass(value, errors.DBPoolError)
    ]
    assert [name for name in kinds if f"`{name}`" not in section] == []


def test_every_page_is_in_the_contents():
    """Who reads the README finds each of them."""
    contents = TEXTS[README].split("## Contents", 1)[1]
    assert [p.name for p in PAGES[1:] if f"docs/{p.name})" not in contents] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_leads_somewhere(page):
    """To a file that is there, and to a heading that is in it."""
    lost = []
    for link in LINK.findall(CODE.sub("", TEXTS[page])):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (
            anchor and anchor not in anchors(target.read_text())
        ):
            lost.append(link)
    assert lost == []
