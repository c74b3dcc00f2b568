"""The command line: ``python -m dbpool_executor demo`` and ``... check``.

Runs in the parent. A worker that was spawned imports this module too, and does nothing
with it.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
import sysconfig
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from . import DBPoolError
from ._tools.redact import told_of


class UsageError(Exception):
    """Says in one line what is wrong with the command."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: What follows the program's name; those of this process by default.

    Returns:
        The exit status.
    """
    options = _parser().parse_args(arguments)
    logging.disable()  # what matters is told below, in one line
    status: int = options.command(options)
    return status


def _demo(options: argparse.Namespace) -> int:
    from ._tools.demo import DemoError, Options, run

    url = None
    try:
        if options.url is not None:
            url = _checked(options.url)
            _refuse_in_memory(url)
        run(
            Options(
                url=url,
                workers=options.workers,
                start_method=options.start_method,
                keep=options.keep,
                root=options.root.resolve(),
            )
        )
    except KeyboardInterrupt:
        print("interrupted: the demo's tables are removed", file=sys.stderr)
        return 130  # 128 + SIGINT, as a shell counts
    except (DemoError, UsageError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 1
    except (SQLAlchemyError, DBPoolError, ModuleNotFoundError) as exc:
        text = told_of(exc, url)
        if isinstance(exc, ModuleNotFoundError):
            text += "; install the driver that the URL names"
        if url is not None:
            text = f"{url.get_backend_name()}: {text}"
        print(f"error: {text}", file=sys.stderr)
        return 1
    return 0


def _check(options: argparse.Namespace) -> int:
    from ._tools.check import Options, run

    url = problem = None
    if options.url is not None:
        try:
            url = _checked(options.url)
        except UsageError as exc:
            problem = str(exc)
    try:
        is_well = run(
            Options(
                url=url,
                factory=options.factory,
                problem=problem,
                workers=options.workers,
                start_method=options.start_method,
                as_json=options.json,
            ),
            partial(print, flush=True),
        )
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0 if is_well else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dbpool_executor")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_check(commands)
    return parser


_Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def _add_demo(commands: _Commands) -> None:
    demo = commands.add_parser(
        "demo",
        help="index the Python standard library, with many workers and with one",
        description="Parse every file of the Python standard library and store its "
        "classes, functions and imports, one transaction for each file; then do the "
        "same with one worker and compare.",
    )
    demo.add_argument(
        "--url",
        help="database to write to, such as postgresql+psycopg://user@host/name; its "
        "tables dbpool_demo_* are replaced (default: a SQLite file in a temporary "
        "folder)",
    )
    _add_workers(demo)
    demo.add_argument(
        "--keep",
        action="store_true",
        help="leave the tables in place and say where they are",
    )
    demo.add_argument(
        "--root",
        type=Path,
        default=Path(sysconfig.get_path("stdlib")),
        metavar="DIR",
        help="folder to index instead of the standard library",
    )
    demo.set_defaults(command=_demo)


def _add_check(commands: _Commands) -> None:
    check = commands.add_parser(
        "check",
        help="tell before production whether it will work, and with how many workers",
        description="Start workers on a database and say of each thing that may go "
        "wrong whether it does: ok, warning or FAILED, and what to do. Nothing is "
        "stored. The exit status is 1 if anything FAILED.",
    )
    factory = check.add_mutually_exclusive_group(required=True)
    factory.add_argument(
        "--url", help="the database, such as postgresql+psycopg://user@host/name"
    )
    factory.add_argument(
        "--factory",
        type=_factory,
        metavar="MODULE:FUNCTION",
        help="your engine factory, instead of a URL, which stands for create_engine(url)",
    )
    _add_workers(check)
    check.add_argument(
        "--json", action="store_true", help="print one JSON object instead of lines"
    )
    check.set_defaults(command=_check)


def _add_workers(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--workers",
        type=_count,
        default=os.cpu_count() or 1,
        metavar="N",
        help="number of worker processes (default: one for each processor)",
    )
    command.add_argument(
        "--start-method",
        choices=multiprocessing.get_all_start_methods(),
        help="how workers are started (default: the executor's own choice)",
    )


def _factory(text: str) -> str:
    module, _, function = text.partition(":")
    if not (module and function):
        raise argparse.ArgumentTypeError(f"it must be MODULE:FUNCTION, not {text}")
    return text


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"it must be 1 or more, not {number}")
    return number


def _checked(text: str) -> URL:
    try:
        url = make_url(text)
        is_async = url.get_dialect().is_async
    except NoSuchModuleError as exc:
        raise UsageError(f"--url names a database that is not known: {exc}") from exc
    except (ArgumentError, ValueError):
        # Their text may repeat the password.
        form = "postgresql+psycopg://user@host/database"
        raise UsageError(f"--url is not a database's URL, such as {form}") from None
    if is_async:
        raise UsageError(f"--url names the asynchronous driver {url.drivername}")
    return url


def _refuse_in_memory(url: URL) -> None:
    if url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:"):
        raise UsageError("--url names a database in memory, which no worker could see")


if __name__ == "__main__":
    sys.exit(main())
