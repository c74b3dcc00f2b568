"""Starts a PostgreSQL server and an asynchronous standby of it, and promotes that.

Imported by tests.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import URL, NullPool, create_engine, text

import servers
import tls
from waiting import wait_until

_FLAGS = "-c listen_addresses=127.0.0.1 -c fsync=off -c port={} -c unix_socket_directories={}"


class Pair(NamedTuple):
    """A primary and its standby.

    Attributes:
        primary: As the tests see it.
        standby: As well.
        folder: Where both are.
        options: For the commands that act on them.
    """

    primary: servers.Database
    standby: servers.Database
    folder: Path
    options: dict[str, Any]

    def cut_replication(self) -> None:
        """Have the standby hear nothing more of the primary."""
        engine = create_engine(
            self.standby.url, poolclass=NullPool, isolation_level="AUTOCOMMIT"
        )
        with engine.connect() as connection:
            connection.execute(text("ALTER SYSTEM SET primary_conninfo = ''"))
            connection.execute(text("SELECT pg_reload_conf()"))
        wait_until(
            lambda: not self.standby.rows("SELECT 1 FROM pg_stat_wal_receiver"),
            "the standby to be on its own",
        )

    def stop_primary(self) -> None:
        """End the primary as a power cut does."""
        self.control("primary", "-m", "immediate", "stop")

    def promote(self) -> None:
        """Make the standby a primary."""
        self.control("standby", "promote")

    def control(self, name: str, *what: str) -> None:
        """Run pg_ctl on one of the two."""
        tls.run("pg_ctl", "-D", self.folder / name, "-w", *what, **self.options)


@contextlib.contextmanager
def pair() -> Iterator[Pair]:
    """Start both; the standby has all that the primary has.

    Raises:
        MissingServerError: PostgreSQL is not installed here.
    """
    with tls.folder_for("initdb", "pg_ctl", "postgres", "pg_basebackup") as folder:
        # PostgreSQL refuses to run as root.
        user = "nobody" if os.geteuid() == 0 else None
        if user is not None:
            shutil.chown(folder, user)
        options: dict[str, Any] = {"user": user, "cwd": folder}
        ports = tls.free_port(), tls.free_port()
        urls = [
            URL.create("postgresql", "postgres", host="127.0.0.1", port=port)
            for port in ports
        ]
        primary, standby = (
            servers.on_server("postgresql-psycopg", url.set(database="postgres"))
            for url in urls
        )
        both = Pair(primary, standby, folder, options)
        data = folder / "primary"
        tls.run("initdb", "-D", data, "-U", "postgres", "-A", "trust", "-N", **options)
        with contextlib.ExitStack() as stack:
            _start(stack, folder, "primary", ports[0], options)
            tls.run(
                *("pg_basebackup", "-D", folder / "standby", "-R", "-X", "stream"),
                *("-h", "127.0.0.1", "-p", str(ports[0]), "-U", "postgres"),
                *("-c", "fast"),
                **options,
            )
            _start(stack, folder, "standby", ports[1], options)
            primary.create_tables()
            wait_until(
                lambda: standby.rows("SELECT to_regclass('item')")[0][0],
                "the standby to have the tables",
            )
            yield both


def _start(
    stack: contextlib.ExitStack,
    folder: Path,
    name: str,
    port: int,
    options: dict[str, Any],
) -> None:
    flags = _FLAGS.format(port, folder)
    data, log = folder / name, folder / f"{name}.log"
    tls.run("pg_ctl", "-D", data, "-l", log, "-w", "-o", flags, "start", **options)

    def stop() -> None:
        with contextlib.suppress(Exception):  # it is stopped
            tls.run("pg_ctl", "-D", data, "-w", "-m", "immediate", "stop", **options)

    stack.callback(stop)
