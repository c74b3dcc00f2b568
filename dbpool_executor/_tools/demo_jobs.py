"""What the demo stores, and the job that stores it.

Runs in the workers; the parent uses the tables and the engine factory too. A module of
its own, because what ``__main__`` defines has another name in a worker.
"""

from __future__ import annotations

import ast
import os
import warnings
from pathlib import Path, PurePath
from typing import NamedTuple

from sqlalchemy import URL, Connection, Engine, ForeignKey, String, create_engine, event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from sqlalchemy.pool import ConnectionPoolEntry

from .. import session

_NOT_INDEXED = {"site-packages", "dist-packages", "__pycache__"}
BUSY_TIMEOUT = 60.0
"""Seconds that a worker waits for the other writers of a SQLite file."""

_NAME = String(1000)  # MySQL and MariaDB ask for a length
_UNICODE = {"mysql_charset": "utf8mb4", "mariadb_charset": "utf8mb4"}


class Base(DeclarativeBase):
    """The demo's tables."""


class Module(Base):
    """One file."""

    __tablename__ = "dbpool_demo_modules"
    __table_args__ = _UNICODE

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(_NAME)
    lines: Mapped[int]
    definitions: Mapped[list[Definition]] = relationship()
    imports: Mapped[list[Import]] = relationship()


class Definition(Base):
    """A class or function of a module."""

    __tablename__ = "dbpool_demo_definitions"
    __table_args__ = _UNICODE

    module_id: Mapped[int] = mapped_column(ForeignKey(Module.id), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    kind: Mapped[str] = mapped_column(String(8))  # class or function
    name: Mapped[str] = mapped_column(_NAME)
    line: Mapped[int]


class Import(Base):
    """A module that a module imports, counted once."""

    __tablename__ = "dbpool_demo_imports"
    __table_args__ = _UNICODE

    module_id: Mapped[int] = mapped_column(ForeignKey(Module.id), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str] = mapped_column(_NAME)


class Indexed(NamedTuple):
    """What a job returns: how much it stored."""

    definitions: int
    imports: int


def make_engine(url: URL) -> Engine:
    """Make the engine of one worker, or the parent's own.

    Args:
        url: The database. A SQLite file is made fit for many writers at once.
    """
    if url.get_backend_name() != "sqlite":
        return create_engine(url, pool_size=1, max_overflow=0)
    engine = create_engine(url, connect_args={"timeout": BUSY_TIMEOUT})
    event.listen(engine, "connect", _prepare_connection)
    event.listen(engine, "begin", _begin_as_writer)
    return engine


def place_of(url: URL) -> str:
    """Name a database; never with what follows a '?', where a password may be."""
    if url.get_backend_name() == "sqlite":
        return f"SQLite file {url.database}"
    host = url.host or "this machine"
    return f"{url.get_backend_name()} database {url.database} on {host}"


def _prepare_connection(
    connection: DBAPIConnection, _entry: ConnectionPoolEntry
) -> None:
    # From now on sqlite3 sends no BEGIN by itself; _begin_as_writer() does.
    connection.isolation_level = None
    cursor = connection.cursor()
    # WAL: readers and the one writer do not wait for each other.
    cursor.execute("PRAGMA journal_mode=WAL")
    # A commit outlives the process, but not a power failure; enough for a demo.
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.close()


def _begin_as_writer(connection: Connection) -> None:
    # A transaction that has read and then wants to write cannot wait for another
    # writer, whose changes it did not see: "database is locked", whatever the
    # timeout. One that is a writer from its first statement on waits for its turn.
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def python_files(root: Path) -> list[str]:
    """Give the files to index, relative to a folder."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - _NOT_INDEXED)
        inner = Path(folder).relative_to(root)
        found += [str(inner / file) for file in sorted(files) if file.endswith(".py")]
    return found


def index_file(root: str, path: str) -> Indexed:
    """Parse one file and store its module, definitions and imports.

    Args:
        root: The folder that the names of modules start at.
        path: The file, relative to it.

    Raises:
        SyntaxError: It is not Python of this version.
    """
    source = Path(root, path)
    text = source.read_bytes()
    module = Module(name=_module_name(path), lines=text.count(b"\n"))
    is_package = source.name == "__init__.py"
    package = module.name if is_package else module.name.rpartition(".")[0]
    _collect(_parsed(text, path), module, package)
    session.add(module)
    return Indexed(len(module.definitions), len(module.imports))


def _module_name(path: str) -> str:
    parts = PurePath(path).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "__init__"


def _parsed(text: bytes, path: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of dubious escapes in files not ours
        try:
            return ast.parse(text, path)
        except (ValueError, RecursionError, MemoryError) as exc:
            # A null byte, or nested too deep for the parser.
            raise SyntaxError(f"{path}: {exc}") from exc


def _collect(tree: ast.Module, module: Module, package: str) -> None:
    imported: set[str] = set()
    # Statements alone are visited: nothing inside an expression is looked for.
    stack: list[tuple[ast.AST, str]] = [(tree, "")]
    while stack:
        node, scope = stack.pop()
        match node:
            case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                definition = Definition(
                    number=len(module.definitions),
                    kind="class" if isinstance(node, ast.ClassDef) else "function",
                    name=scope + node.name,
                    line=node.lineno,
                )
                module.definitions.append(definition)
                scope += f"{node.name}."
            case ast.Import():
                imported.update(alias.name for alias in node.names)
            case ast.ImportFrom():
                imported.add(_source_of(node, package))
        for field in ("cases", "finalbody", "orelse", "handlers", "body"):
            stack += [(child, scope) for child in reversed(getattr(node, field, ()))]
    module.imports = [
        Import(number=number, name=name) for number, name in enumerate(sorted(imported))
    ]


def _source_of(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return node.module or ""
    parents = package.split(".") if package else []
    kept = parents[: len(parents) + 1 - node.level] if parents else []
    return ".".join([*kept, *filter(None, [node.module])]) or "."
