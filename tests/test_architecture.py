"""The shape of the package: which module runs where, and which imports which.

Reads the source; nothing is run.
"""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dbpool_executor

PACKAGE = Path(dbpool_executor.__file__).parent
TREES = {path.stem: ast.parse(path.read_text()) for path in PACKAGE.glob("*.py")}

# Modules of the package's own that each may import; the order is from the bottom up.
MAY_IMPORT: dict[str, set[str]] = {
    # Both processes.
    "errors": set(),
    "_collection": set(),
    "_copies": set(),
    "_inheritance": {"_collection"},
    "_options": set(),
    "_phase": set(),
    "_places": set(),
    "_streams": set(),
    "_picklers": {"_places"},
    "_boundary": {"_picklers", "_places", "errors"},
    "_channel": {"_boundary"},
    "_answers": {"_boundary", "_streams"},
    "_shared_channel": {"_boundary", "_channel"},
    "_exceptions": {"_boundary", "_picklers", "_places", "errors"},
    "_logs": {"_boundary"},
    # Workers.
    "_alarm": set(),
    "_forwarder": {"_logs"},
    "_leaving": set(),
    "_drivers": {"_inheritance"},
    "_notes": {"_inheritance"},
    "_resolution": {"errors"},
    "_sessions": set(),
    "_commits": {"_alarm", "_drivers", "_inheritance", "_phase", "errors"},
    "_database": {
        "_alarm", "_boundary", "_commits", "_copies", "_drivers", "_inheritance", "_leaving",
        "_options", "_phase", "_places", "_resolution", "_sessions", "errors",
    },
    "_worker": {
        "_answers", "_boundary", "_channel", "_database", "_exceptions", "_forwarder", "_inheritance",
        "_leaving", "_logs", "_notes", "_options", "_phase", "_picklers", "_places", "_resolution",
        "_shared_channel", "_streams", "errors",
    },
    # The parent.
    "_exit": set(),
    "_preloaded": {"_inheritance"},
    "_stats": set(),
    "_arguments": {"_boundary", "_picklers", "_places", "errors"},
    "_results": set(),
    "_parent": {"_inheritance", "_places", "errors"},
    "_rules": {"_phase", "errors"},
    "_job": {"_boundary", "_channel", "_exceptions", "_options", "errors"},
    "_local": {"_answers", "_channel", "_inheritance", "_parent", "_phase", "_streams", "_worker"},
    "_endings": {"_exceptions", "_job", "errors"},
    "_groups": {"_boundary", "_channel", "_job", "_options"},
    "_offer": {"_boundary", "_channel", "_groups", "_job", "_streams"},
    "_repeats": {"_channel", "_job", "_rules", "errors"},
    "_workers": {
        "_boundary", "_endings", "_exceptions", "_groups", "_job", "_local", "_offer",
        "_phase", "_rules", "errors",
    },
    "_dispatcher": {
        "_boundary", "_channel", "_copies", "_endings", "_exit", "_job", "_local", "_logs",
        "_offer", "_options", "_repeats", "_rules", "_streams", "_stats", "_worker", "_workers", "errors",
    },
    "_executor": {
        "_arguments", "_boundary", "_dispatcher", "_job", "_local", "_logs",
        "_options", "_parent", "_results", "_stats", "_worker",
    },
    "testing": {
        "_arguments", "_boundary", "_channel", "_database", "_dispatcher", "_drivers",
        "_exceptions", "_executor", "_inheritance", "_job", "_options", "_parent", "_phase", "_worker",
        "errors",
    },
    # The front door, and what comes through it.
    "__init__": {"_database", "_executor", "_inheritance", "_stats", "errors"},
    "_demo_jobs": {"__init__"},
    "_demo": {"__init__", "_demo_jobs"},
    "_telling": set(),
    "_check_rules": set(),
    "_check_jobs": {"__init__", "_check_rules", "_inheritance", "_notes", "_telling"},
    "_check_measures": {"__init__", "_check_jobs"},
    "_check": {
        "__init__", "_arguments", "_check_jobs", "_check_measures", "_check_rules",
        "_telling",
    },
    "__main__": {"__init__", "_check", "_demo", "_telling"},
}  # fmt: skip

WHERE = re.compile(
    r"\bRuns in (?P<where>a worker|the workers|the parent|both processes|every process)"
)


def imported_by(tree: ast.Module) -> Iterator[str]:
    """Give the modules of the package that one imports, anywhere in it."""
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=str(module), level=1):
                yield module.split(".")[0]
            case ast.ImportFrom(module=None, level=1, names=names):
                modules = {name.name for name in names} & set(TREES)
                yield from modules or {"__init__"}
            case ast.ImportFrom(module=str(module), level=0):
                path = module.split(".")
                if path[0] == PACKAGE.name:
                    yield path[1] if len(path) > 1 else "__init__"
            case ast.Import(names=names):
                for name in names:
                    path = name.name.split(".")
                    if path[0] == PACKAGE.name:
                        yield path[1] if len(path) > 1 else "__init__"


IMPORTS = {name: set(imported_by(tree)) for name, tree in TREES.items()}


def reached_from(module: str) -> set[str]:
    """Give the modules that one imports, directly and through others."""
    reached: set[str] = set()
    ahead = [module]
    while ahead:
        for found in IMPORTS[ahead.pop()] - reached:
            reached.add(found)
            ahead.append(found)
    return reached


def where_runs(module: str) -> str | None:
    """Give the process that a module's docstring says that it runs in."""
    docstring = " ".join((ast.get_docstring(TREES[module]) or "").split())
    found = WHERE.search(docstring)
    return None if found is None else found["where"]


def test_every_module_has_its_place_in_the_table() -> None:
    """A new module is entered, one that is gone is taken out."""
    assert sorted(MAY_IMPORT) == sorted(TREES)


def test_every_module_imports_only_what_the_table_allows() -> None:
    """A new edge between two modules is a decision."""
    more = {
        name: found - MAY_IMPORT.get(name, set()) for name, found in IMPORTS.items()
    }
    assert {name: found for name, found in more.items() if found} == {}


def test_lock_of_jobs_is_the_last_to_be_taken_before_a_fork() -> None:
    """So it has to be registered before that of the ends of streams."""
    program = (
        "import sys; from dbpool_executor import DBPoolExecutor\n"
        "loaded = [name.rpartition('.')[2] for name in sys.modules]\n"
        "print(loaded.index('_job') < loaded.index('_streams'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=True, timeout=60
    )
    assert done.stdout.split() == [b"True"]


def test_table_allows_no_more_than_is_used() -> None:
    """An edge that is gone is taken out, so that it does not come back unseen."""
    more = {name: may - IMPORTS.get(name, set()) for name, may in MAY_IMPORT.items()}
    del more["__init__"]  # a list of names, which comes and goes with them
    assert {name: found for name, found in more.items() if found} == {}


def test_imports_point_one_way() -> None:
    """No module imports itself through others."""
    order = list(graphlib.TopologicalSorter(IMPORTS).static_order())
    assert set(order) == set(TREES)


@pytest.mark.parametrize("module", sorted(TREES.keys() - {"__init__"}))
def test_module_says_which_process_it_runs_in(module: str) -> None:
    """The first question of every reader, answered in the docstring."""
    assert where_runs(module) is not None


@pytest.mark.parametrize("module", sorted(TREES.keys() - {"__init__"}))
def test_what_runs_in_a_worker_imports_nothing_of_the_parents(module: str) -> None:
    """Directly or through others."""
    if where_runs(module) == "the parent" or "__init__" in IMPORTS[module]:
        return
    parents = {m for m in TREES.keys() - {"__init__"} if where_runs(m) == "the parent"}
    assert reached_from(module) & parents == set()


def test_modules_of_workers_say_so() -> None:
    """The check above is about these, at the least."""
    workers = [
        "_worker",
        "_database",
        "_boundary",
        "_picklers",
        "_exceptions",
        "_places",
        "_channel",
        "_streams",
    ]
    for module in [*workers, "_phase", "_options", "errors"]:
        assert where_runs(module) in ("a worker", "both processes")
    for module in ("_executor", "_dispatcher", "_workers", "_local", "_rules"):
        assert where_runs(module) == "the parent"


def test_front_door_lists_the_names_and_brings_each() -> None:
    """What a type checker reads there, what is public and what is given are the same."""
    listed = {
        alias.asname or alias.name
        for node in TREES["__init__"].body
        if isinstance(node, ast.If)
        for imports in node.body
        if isinstance(imports, ast.ImportFrom)
        for alias in imports.names
    }
    assert listed == {*dbpool_executor.__all__, "errors"}
    assert listed <= set(dir(dbpool_executor))
    for name in listed:
        assert getattr(dbpool_executor, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Pool'"):
        _ = dbpool_executor.Pool


def test_import_of_the_package_loads_its_hooks_alone() -> None:
    """A worker's job that imports the session loads nothing of the parent's."""
    program = (
        "import sys, dbpool_executor\n"
        "def loaded(): return sorted(n.partition('.')[2] for n in sys.modules\n"
        "                            if n.startswith('dbpool_executor.'))\n"
        "print(*loaded())\n"
        "from dbpool_executor import session\n"
        "print(*loaded())"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert output[0].split() == ["_collection", "_inheritance"]
    assert "_database" in output[1].split()
    assert not {"_dispatcher", "_executor", "_local"} & set(output[1].split())


def test_public_modules_are_few() -> None:
    """Everything else begins with an underscore, and no name says nothing."""
    public = {module for module in TREES if not module.startswith("_")}
    assert public <= {"errors", "testing"}
    assert not {"_utils", "_base", "_helpers", "_common"} & set(TREES)


def test_package_needs_sqlalchemy_and_nothing_else() -> None:
    """At import; what is optional is imported where it is used."""
    allowed = {*sys.stdlib_module_names, "sqlalchemy", PACKAGE.name}
    for module, tree in TREES.items():
        for node in tree.body:
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert {name.split(".")[0] for name in names} <= allowed, module


def test_package_tells_type_checkers_that_it_is_typed() -> None:
    """PEP 561."""
    assert (PACKAGE / "py.typed").is_file()


def test_package_needs_nothing_but_sqlalchemy() -> None:
    """It is imported and works where greenlet, which SQLAlchemy may lack, is not."""
    program = (
        "import sys; sys.modules['greenlet'] = None\n"
        "from dbpool_executor import DBPoolExecutor\n"
        "if __name__ == '__main__':\n"
        "    with DBPoolExecutor('sqlite:///file:x?mode=memory&uri=true', 1) as executor:\n"
        "        print(executor.submit(abs, -1).result(60))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.stdout, done.returncode) == ("1\n", 0), done.stderr
