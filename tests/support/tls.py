"""Servers that speak TLS, and how each driver is told to speak it or not.

Imported by tests. Few servers of a developer's machine speak TLS, so one that does is
started from what is installed there, with a certificate of its own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import URL, NullPool, create_engine, exc, text

import servers
from servers import MissingServerError
from waiting import wait_until

PLAIN = {
    "postgresql-psycopg": {"sslmode": "disable"},
    "postgresql-psycopg2": {"sslmode": "disable"},
    "mariadb-pymysql": {"ssl_disabled": "true"},
    "mariadb-mysqldb": {"ssl_mode": "DISABLED"},
}
"""By driver, what has it speak without TLS."""


def encrypted(name: str, certificate: Path) -> dict[str, str]:
    """Give what has a driver speak TLS, by the tests' name of it."""
    if name in servers.POSTGRESQLS:
        return {"sslmode": "require"}
    options = {"ssl_ca": str(certificate)}
    if name == "mariadb-pymysql":
        return {**options, "ssl_check_hostname": "false"}
    return {**options, "ssl_mode": "REQUIRED"}


def is_encrypted(database: servers.Database) -> bool:
    """Ask the server whether what a URL opens is encrypted."""
    sql = "SELECT ssl::text FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
    if database.is_mariadb:
        sql = "SHOW STATUS LIKE 'Ssl_cipher'"
    return database.rows(sql)[0][-1] not in ("false", "")


@contextlib.contextmanager
def postgresql_server() -> Iterator[tuple[URL, Path]]:
    """Start a PostgreSQL server; give the URL of a database, and the certificate.

    Raises:
        MissingServerError: None is installed.
    """
    with folder_for("initdb", "pg_ctl", "postgres", "openssl") as folder:
        certificate = _certificate(folder)
        # PostgreSQL refuses to run as root.
        user = "nobody" if os.geteuid() == 0 else None
        if user is not None:
            for path in (folder, *folder.iterdir()):
                shutil.chown(path, user)
        data, port = folder / "data", free_port()
        options: dict[str, Any] = {"user": user, "cwd": folder}
        run("initdb", "-D", data, "-U", "postgres", "-A", "trust", "-N", **options)
        settings = {
            "port": port,
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": folder,
            "fsync": "off",
            "ssl": "on",
            "ssl_cert_file": certificate,
            "ssl_key_file": folder / "key.pem",
        }
        flags = " ".join(f"-c {name}={value}" for name, value in settings.items())
        log = folder / "log"
        try:
            run("pg_ctl", "-D", data, "-l", log, "-w", "-o", flags, "start", **options)
        except subprocess.CalledProcessError as exc:
            # Built without OpenSSL, for one.
            raise MissingServerError(
                f"no PostgreSQL over TLS: {log.read_text()}"
            ) from exc
        try:
            url = URL.create(servers.DRIVERS["postgresql-psycopg"], "postgres")
            url = url.set(host="127.0.0.1", port=port, database="postgres")
            servers.on_server("postgresql-psycopg", url).create_tables()
            yield url, certificate
        finally:
            run("pg_ctl", "-D", data, "-w", "-m", "immediate", "stop", **options)


@contextlib.contextmanager
def mariadb_server() -> Iterator[tuple[URL, Path]]:
    """Start a MariaDB server; give the URL of a database, and the certificate.

    Raises:
        MissingServerError: None is installed.
    """
    with folder_for("mariadb-install-db", "mariadbd", "openssl") as folder:
        certificate = _certificate(folder)
        data, port = folder / "data", free_port()
        run(
            "mariadb-install-db",
            "--no-defaults",
            f"--datadir={data}",
            "--auth-root-authentication-method=normal",
            "--skip-test-db",
            *(["--user=root"] if os.geteuid() == 0 else []),
        )
        process = subprocess.Popen(
            [
                _which("mariadbd") or "mariadbd",
                "--no-defaults",
                f"--datadir={data}",
                f"--socket={folder / 'socket'}",
                f"--port={port}",
                "--bind-address=127.0.0.1",
                f"--ssl-cert={certificate}",
                f"--ssl-key={folder / 'key.pem'}",
                "--innodb-buffer-pool-size=16M",
                "--innodb-flush-log-at-trx-commit=0",
                *(["--user=root"] if os.geteuid() == 0 else []),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        url = URL.create(servers.DRIVERS["mariadb-pymysql"], "root")
        url = url.set(host="127.0.0.1", port=port, database="mysql")
        try:
            wait_until(lambda: _answers(url), "the MariaDB server answers")
            servers.on_server("mariadb-pymysql", url).execute("CREATE DATABASE test")
            url = url.set(database="test")
            servers.on_server("mariadb-pymysql", url).create_tables()
            yield url, certificate
        finally:
            process.kill()
            process.wait()


def _answers(url: URL) -> bool:
    try:
        with create_engine(url, poolclass=NullPool).connect() as connection:
            connection.execute(text("SELECT 1"))
    except exc.OperationalError:
        return False
    return True


# Where Debian installs servers, which is on no PATH.
_DEBIAN = Path("/usr/lib/postgresql")


def _which(program: str) -> str | None:
    folders = (os.environ["PATH"], "/usr/sbin", *map(str, _DEBIAN.glob("*/bin")))
    return shutil.which(program, path=os.pathsep.join(folders))


@contextlib.contextmanager
def folder_for(*programs: str) -> Iterator[Path]:
    missing = [name for name in programs if _which(name) is None]
    if missing:
        raise MissingServerError(f"no server over TLS: {', '.join(missing)} not found")
    folder = Path(tempfile.mkdtemp(prefix="dbpool-test-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _certificate(folder: Path) -> Path:
    certificate = folder / "certificate.pem"
    run(
        *("openssl", "req", "-x509", "-nodes", "-days", "2", "-subj", "/CN=localhost"),
        *("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
        *("-keyout", folder / "key.pem", "-out", certificate),
    )
    return certificate


def run(*command: str | Path, **options: Any) -> None:
    program, *arguments = command
    # Not through a pipe: a server that was started would keep it open.
    with tempfile.TemporaryFile() as output:
        subprocess.run(
            [_which(str(program)) or program, *arguments],
            check=True,
            stdout=output,
            stderr=subprocess.STDOUT,
            **options,
        )


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port
