"""The command line: ``python -m dbpool_executor demo``.

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
from pathlib import Path

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError

from . import DBPoolError


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
    from ._demo import DemoError, Options, run

    logging.disable()  # what matters is told below, in one line
    url = None
    try:
        url = None if options.url is None else _checked(options.url)
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
        print(f"error: {_told_of(exc, url)}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dbpool_executor")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
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
    demo.add_argument(
        "--workers",
        type=_count,
        default=os.cpu_count() or 1,
        metavar="N",
        help="number of worker processes (default: one for each processor)",
    )
    demo.add_argument(
        "--start-method",
        choices=multiprocessing.get_all_start_methods(),
        help="how workers are started (default: the executor's own choice)",
    )
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
    return parser


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
    if url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:"):
        raise UsageError("--url names a database in memory, which no worker could see")
    return url


def _told_of(exc: Exception, url: URL | None) -> str:
    """Give an error in one line, without the password."""
    told = exc.orig if isinstance(exc, DBAPIError) else exc
    text = "; ".join(filter(None, map(str.strip, str(told).splitlines())))
    if isinstance(exc, ModuleNotFoundError):
        text += "; install the driver that the URL names"
    if url is None:
        return text
    secrets = [url.password, *url.normalized_query.get("password", ())]
    for secret in filter(None, secrets):
        text = text.replace(secret, "***")
    return f"{url.get_backend_name()}: {text}"


if __name__ == "__main__":
    sys.exit(main())
