"""Starts and ends worker processes on this machine.

Runs in the parent. The only module that knows that a worker is a child process.
"""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext

from .._forks.connections import thorough
from .._forks.ends import kept_by_child, make_ends, make_pipe
from .._wire.channel import Channel
from .._wire.phase import WORDS, PhaseRecord, Progress
from .._wire.short_answers import AnswerReader
from .._worker.main import SentSetup, WorkerSetup, begin, main
from .quiesce import prepare_fork

_NAME = "DBPoolWorker"
_END_GRACE = 1.0  # seconds for a process to end after its channel has


class LocalWorker:
    """A worker process of this machine, its channel and its phase record.

    Args:
        context: Gives the start method.
        setup: What the worker makes before its first job.

    Raises:
        OpenConnectionsError: The start method is fork, and a SQLite file is open.
        Exception: Whatever the start of the process raises: the setup does not pickle,
            or the system has no room for another process.
    """

    def __init__(self, context: BaseContext, setup: WorkerSetup) -> None:
        start_method = context.get_start_method()
        forks = start_method == "fork"
        if forks:
            prepare_fork()
        else:
            # Its start would unblock SIGINT in this thread, which is blocked below.
            resource_tracker.ensure_running()
        if start_method == "forkserver":
            _start_forkserver()
        words = context.RawArray("Q", WORDS)
        self._record = PhaseRecord(words)
        mine, theirs = make_ends()
        mine.setblocking(False)
        self.channel = Channel(mine)
        read, written = make_pipe()
        self.answers = AnswerReader(read)
        self._process = context.Process(  # type: ignore[attr-defined]
            target=main,
            # What is pickled gets it with its name, and sooner.
            args=(theirs if forks else None, SentSetup((setup, words, written))),
            name=_NAME if forks else _FirstName(_NAME, theirs),
        )
        try:
            with (
                theirs,
                written,
                kept_by_child(theirs, written),
                thorough(),
                _sigint_blocked(),
            ):
                self._process.start()
        except BaseException:
            self.channel.close()
            self.answers.close()
            raise
        self.pid: int = self._process.pid

    @property
    def bytes_received(self) -> int:
        """Of all its answers."""
        return self.channel.bytes_received + self.answers.bytes_received

    def progress(self) -> Progress:
        """Read the phase record, also after the worker's death."""
        return self._record.read()

    def xid(self) -> int:
        """Read which transaction the worker was about to commit, also when it died."""
        return self._record.read_xid()

    def recall(self, number: int) -> None:
        """Take back the jobs up to a number, see :meth:`PhaseRecord.recall`."""
        self._record.recall(number)

    def terminate(self) -> None:
        """Ask the system to end the worker with SIGTERM."""
        self._process.terminate()

    def kill(self) -> None:
        """End the worker with SIGKILL."""
        self._process.kill()

    def bury(self) -> int | None:
        """Free what is left of a worker whose channel has ended.

        Returns:
            The exit code, as in ``multiprocessing.Process.exitcode``.
        """
        self.channel.close()
        self.answers.close()
        # The channel ends with the process, unless the job closed it.
        self._process.join(_END_GRACE)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        exitcode: int | None = self._process.exitcode
        self._process.close()
        return exitcode


def _start_forkserver() -> None:
    """Start the forkserver, unless it runs, with what each worker would import.

    What the program has chosen to preload is left as it is; there is no public way to
    ask for that.
    """
    ours = [
        "__main__",
        "dbpool_executor._worker.main",
        "dbpool_executor._launch.last_preload",
    ]
    server = forkserver._forkserver
    if getattr(server, "_preload_modules", None) == ["__main__"]:
        server.set_forkserver_preload(ours)
    # A Ctrl-C while it starts would print a traceback. But what the program itself
    # starts through it would inherit that SIGINT is blocked: the last import undoes it.
    undone = getattr(server, "_preload_modules", None) == ours
    with _sigint_blocked() if undone else nullcontext():
        forkserver.ensure_running()


class _FirstName(str):
    """A process name that calls :func:`begin` when it is unpickled in the child.

    That is the first thing of ours that happens there, before the main module is
    imported: then a Ctrl-C would print a traceback, since under forkserver the child
    does not inherit this thread's signal mask, and what that module raises would be
    told to nobody.
    """

    __slots__ = ("_end",)
    _end: socket.socket | None

    def __new__(cls, name: str, end: socket.socket) -> _FirstName:
        self = super().__new__(cls, name)
        self._end = end
        return self

    def __reduce__(self) -> tuple[Callable[..., str], tuple[object, ...]]:
        end, self._end = self._end, None
        # It is pickled again, as the name of the process that is made there.
        return (str, (str(self),)) if end is None else (begin, (str(self), end))


@contextmanager
def _sigint_blocked() -> Iterator[None]:
    # The child inherits the mask: a Ctrl-C before it ignores SIGINT would print a
    # traceback from the middle of its imports. It unblocks the signal itself.
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
