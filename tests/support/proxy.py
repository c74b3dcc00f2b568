"""A network that fails when it is told to: a proxy between jobs and their server.

Imported by tests; runs in threads of the test's process. It forwards until a test has
it cut a connection, at once or at the message that holds a word, or forward no more.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial

from sqlalchemy import URL, Engine, create_engine

from servers import Database

_CHUNK = 1 << 16


class Proxy:
    """Forwards connections to a server.

    Args:
        connect: Opens a connection to the server.
    """

    def __init__(self, connect: Callable[[], socket.socket]) -> None:
        self._connect = connect
        # Guards what follows; held while a chunk is forwarded, so that what a test
        # orders is done between two chunks.
        self._lock = threading.Condition()
        self._ends: set[socket.socket] = set()
        self._word: bytes | None = None  # the next message with it is cut
        self._lets_pass = False  # that message, and cuts the reply instead
        self._reply_from: socket.socket | None = None  # not to be forwarded
        self._is_stalled = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._start(self._accept, self._listener)

    def cut_before(self, word: bytes) -> None:
        """Cut the connection on which a word comes, before the server gets it; once."""
        with self._lock:
            self._word, self._lets_pass = word.upper(), False

    def cut_after(self, word: bytes) -> None:
        """Cut it when the server has answered the word, and keep the answer; once."""
        with self._lock:
            self._word, self._lets_pass = word.upper(), True

    def cut(self) -> None:
        """Cut all connections now."""
        with self._lock:
            for end in self._ends:
                _cut(end)

    def stall(self) -> None:
        """Forward nothing from now on, and leave all connections open."""
        with self._lock:
            self._is_stalled = True

    def resume(self) -> None:
        """Forward what has come since :meth:`stall`, and all that follows."""
        with self._lock:
            self._is_stalled = False
            self._lock.notify_all()

    def go_down(self) -> None:
        """Cut all connections and refuse new ones, as a server that is down."""
        _cut(self._listener)
        self._listener.close()
        self.cut()

    def come_back(self) -> None:
        """Take connections again, at the same port."""
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._start(self._accept, self._listener)

    def _start(self, target: Callable[..., None], *args: object) -> None:
        threading.Thread(target=target, args=args, daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            try:
                server = self._connect()
            except OSError:
                client.close()
                continue
            with self._lock:
                self._ends |= {client, server}
            self._start(self._forward, client, server, True)
            self._start(self._forward, server, client, False)

    def _forward(
        self, source: socket.socket, target: socket.socket, from_client: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_CHUNK):
                with self._lock:
                    self._lock.wait_for(lambda: not self._is_stalled)
                    if not self._lets_through(source, target, data, from_client):
                        break
                    target.sendall(data)
        # Both directions end with either; the second of the two to come here closes.
        _cut(source)
        _cut(target)
        with self._lock:
            is_second = source not in self._ends
            self._ends -= {source, target}
        if is_second:
            source.close()
            target.close()

    def _lets_through(
        self,
        source: socket.socket,
        target: socket.socket,
        data: bytes,
        from_client: bool,
    ) -> bool:
        if not from_client:
            return self._reply_from is not source
        if self._word is None or self._word not in data.upper():
            return True
        self._word = None
        if self._lets_pass:
            self._reply_from = target
        return self._lets_pass


@contextlib.contextmanager
def between(database: Database) -> Iterator[tuple[Proxy, Callable[..., Engine]]]:
    """Put a proxy before a server.

    Args:
        database: On the server.

    Yields:
        The proxy, and an engine factory for jobs that go through it. It pickles.
    """
    proxy = Proxy(partial(_connect_to, database.url))
    url = database.url.set(host="127.0.0.1", port=proxy.port)
    if database.is_postgresql:
        # Nothing can be read inside TLS; and a socket's folder would win over a host.
        url = url.difference_update_query(["host", "port", "unix_sock"])
    if database.is_postgresql and database.name != "postgresql-pg8000":
        url = url.update_query_dict({"sslmode": "disable"})
    if database.name == "mariadb-mysqlconnector":
        url = url.update_query_dict({"ssl_disabled": "true"})
    try:
        yield proxy, partial(create_engine, url)
    finally:
        proxy.resume()
        proxy.go_down()


def _connect_to(url: URL) -> socket.socket:
    port = url.port or {"postgresql": 5432}.get(url.get_backend_name(), 3306)
    host = url.host or url.query.get("host")
    if path := url.query.get("unix_sock"):
        host = str(path).rpartition("/")[0]
    if isinstance(host, str) and host.startswith("/"):
        end = socket.socket(socket.AF_UNIX)
        end.connect(f"{host}/.s.PGSQL.{port}")
        return end
    return socket.create_connection((str(host or "127.0.0.1"), port))


def _cut(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
