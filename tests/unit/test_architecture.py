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
TREES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(
        path.read_text()
    )
    for path in PACKAGE.rglob("*.py")
}

# Rooms of the package that each room may import: a folder, or a module beside them. From
# the bottom up.
MAY_IMPORT: dict[str, set[str]] = {
    # Both processes.
    "errors": set(),
    "_drivers": set(),
    "_forks": {"_drivers", "errors"},
    "_wire": {"_forks", "errors"},
    "_ledger": {"errors"},
    # A worker.
    "_worker": {"_drivers", "_forks", "_ledger", "_wire", "errors"},
    # The parent.
    "_launch": {"_drivers", "_forks", "_wire", "_worker", "errors"},
    "_dispatch": {"_forks", "_launch", "_wire", "_worker", "errors"},
    "_api": {"_dispatch", "_launch", "_ledger", "_wire", "_worker", "errors"},
    "testing": {
        "_api", "_dispatch", "_drivers", "_forks", "_launch", "_ledger", "_wire", "_worker",
        "errors",
    },
    # The front door, and what comes through it.
    "__init__": {"_api", "_dispatch", "_forks", "_ledger", "_worker", "errors"},
    "_tools": {"__init__", "_api", "_drivers", "_worker"},
    "__main__": {"__init__", "_tools"},
}  # fmt: skip

WHERE = re.compile(
    r"\bRuns in (?P<where>a worker|the workers|the parent|both processes|every process)"
)


def imported_by(module: str, tree: ast.Module) -> Iterator[str]:
    """Give the modules of the package that one imports, anywhere in it."""
    here = [PACKAGE.name, *module.split(".")]
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=name, level=level, names=names):
                start = here[: len(here) - level] if level else []
                path = [*start, *(name.split(".") if name else [])]
                for alias in names:
                    yield from module_at([*path, alias.name]) or module_at(path)
            case ast.Import(names=names):
                for alias in names:
                    yield from module_at(alias.name.split("."))


def module_at(path: list[str]) -> list[str]:
    """Give the module of the package that a path names, if it names one."""
    if path[:1] != [PACKAGE.name]:
        return []
    name = ".".join(path[1:])
    found = [m for m in (name, f"{name}.__init__".lstrip(".")) if m in TREES]
    return found[:1]


def room_of(module: str) -> str:
    """Give the folder of a module, or itself where it is in none."""
    return module.split(".", maxsplit=1)[0]


IMPORTS = {name: set(imported_by(name, tree)) for name, tree in TREES.items()}
ROOMS: dict[str, set[str]] = {}
for _name, _found in IMPORTS.items():
    _room = room_of(_name)
    ROOMS.setdefault(_room, set()).update({room_of(m) for m in _found} - {_room})


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


def test_every_room_has_its_place_in_the_table() -> None:
    """A new room is entered, one that is gone is taken out."""
    assert sorted(MAY_IMPORT) == sorted(ROOMS)


def test_every_room_imports_only_what_the_table_allows() -> None:
    """A new edge between two rooms is a decision."""
    more = {name: found - MAY_IMPORT.get(name, set()) for name, found in ROOMS.items()}
    assert {name: found for name, found in more.items() if found} == {}


def test_no_room_uses_a_private_name_of_another() -> None:
    """What another room may use has no underscore; tests alone may."""
    taken = [
        f"{module} takes {alias.name}"
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level > 1
        for alias in node.names
        if alias.name.startswith("_") and alias.name not in ROOMS
    ]
    assert taken == []


def test_what_is_done_at_a_fork_is_one_list() -> None:
    """Hooks are registered in one place, which reads in the order in which they run."""
    found = [m for m, tree in TREES.items() if "register_at_fork" in ast.dump(tree)]
    assert found == ["_forks.hooks"]
    assert "_forks.hooks" in IMPORTS["__init__"]


def test_table_allows_no_more_than_is_used() -> None:
    """An edge that is gone is taken out, so that it does not come back unseen."""
    more = {name: may - ROOMS.get(name, set()) for name, may in MAY_IMPORT.items()}
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


@pytest.mark.parametrize(
    ("room", "where"),
    [
        ("_worker", "a worker"),
        ("_wire", "both processes"),
        ("_ledger", "both processes"),
        ("_drivers", "every process"),
        ("_forks", "every process"),
        ("_launch", "the parent"),
        ("_dispatch", "the parent"),
        ("_api", "the parent"),
    ],
)
def test_folder_says_in_which_process_its_modules_run(room: str, where: str) -> None:
    """The folder is the answer to the first question of every reader."""
    modules = [name for name in TREES if room_of(name) == room]
    found = {name: where_runs(name) for name in modules}
    allowed = {where, "both processes"} if where != "the parent" else {where}
    assert {n: w for n, w in found.items() if w not in allowed} == {}


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
    assert "_forks.hooks" in output[0].split()
    assert {name.split(".")[0] for name in output[0].split()} <= {"_drivers", "_forks"}
    assert "_worker.transaction" in output[1].split()
    assert not {"_dispatch", "_api", "_launch"} & set(output[1].split())


def test_public_modules_are_few() -> None:
    """Everything else begins with an underscore, and no name says nothing."""
    public = {room for room in ROOMS if not room.startswith("_")}
    assert public <= {"errors", "testing"}
    names = {name.split(".")[-1].strip("_") for name in TREES}
    assert not {"utils", "base", "helpers", "common"} & names


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
