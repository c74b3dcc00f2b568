"""Starts and ends worker processes on this machine.

Runs in the parent. The only module that knows that a worker is a child process.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from multiprocessing import resource_tracker
from multiprocessing.context import BaseContext

from .._forks.connections import thorough
from .._forks.ends import End, kept_by_child, make_ends, make_pipe
from .._wire.channel import Channel
from .._wire.environment import Environment, working_directory
from .._wire.phase import WORDS, PhaseRecord, Progress, Transaction
from .._wire.short_answers import AnswerReader
from .._worker.main import SentSetup, WorkerSetup, begin, main
from .forkserver import sigint_blocked, start_forkserver
from .handle import KILL, worker_numbers
from .process import ChildProcess, PidFd, picklable_authkey
from .quiesce import prepare_fork

_NAME = "DBPoolWorker"
_START_ATTEMPTS = 3  # if the forkserver is killed while it forks
_STOP_GRACE = 1.0  # seconds for a worker to cancel its statements on the server


class LocalWorker:
    """A worker process of this machine: a :class:`WorkerHandle`.

    Args:
        context: Gives the start method.
        setup: What the worker makes before its first job.
        environment: What the worker sees of the program's, from the first moment on.

    Raises:
        OpenConnectionsError: The start method is fork, and a SQLite file is open.
        Exception: Whatever the start of the process raises: the setup does not pickle,
            or the system has no room for another process.
    """

    def __init__(
        self, context: BaseContext, setup: WorkerSetup, environment: Environment
    ) -> None:
        self.number = next(worker_numbers)
        self._stops = 0  # calls of stop()
        attempts = _START_ATTEMPTS
        while True:
            attempts -= 1
            try:
                # With a channel of its own each time: what a forkserver that is gone
                # has forked may be there.
                with picklable_authkey():
                    self._start(context, setup, environment)
            except (ConnectionError, EOFError):
                if context.get_start_method() != "forkserver" or not attempts:
                    raise
            else:
                return

    def _start(
        self, context: BaseContext, setup: WorkerSetup, environment: Environment
    ) -> None:
        start_method = context.get_start_method()
        forks = start_method == "fork"
        if forks:
            prepare_fork()
        else:
            working_directory()  # multiprocessing asks for it, and would say less
            # Its start would unblock SIGINT in this thread, which is blocked below.
            resource_tracker.ensure_running()
        if start_method == "forkserver":
            start_forkserver()
        words = context.RawArray("Q", WORDS)
        self._record = PhaseRecord(words)
        mine, theirs = make_ends()
        mine.setblocking(False)
        self.channel = Channel(mine)
        read, written = make_pipe()
        self.answers = AnswerReader(read)
        # Held by nobody else: its end tells the worker to end, see follow_parent().
        lifeline, self._lifeline = make_pipe()
        process = context.Process(  # type: ignore[attr-defined]
            target=main,
            # What is pickled gets them with its name, and sooner.
            args=(
                (theirs, lifeline) if forks else None,
                SentSetup((setup, words, written)),
                environment if forks else None,
            ),
            name=_NAME if forks else _FirstName(_NAME, theirs, lifeline, environment),
        )
        try:
            with (
                theirs,
                written,
                lifeline,
                kept_by_child(theirs, written, lifeline),
                thorough(),
                sigint_blocked(),
            ):
                self._process = ChildProcess(process)
        except BaseException:
            self._close()
            raise

    @property
    def pid(self) -> int:
        """The process id, for logs and errors alone."""
        return self._process.pid

    @property
    def end(self) -> PidFd | None:
        """Becomes readable when the process has ended, where the system has a pidfd."""
        return self._process.end

    @property
    def bytes_received(self) -> int:
        """Of all its answers."""
        return self.channel.bytes_received + self.answers.bytes_received

    def progress(self) -> Progress:
        """Read the phase record, also after the worker's death."""
        return self._record.read()

    def transaction(self) -> Transaction:
        """Read which transaction the worker was about to commit, also when it died."""
        return self._record.read_transaction()

    def recall(self, number: int) -> None:
        """Take back the jobs up to a number, see :meth:`PhaseRecord.recall`."""
        self._record.recall(number)

    def stop(self, number: int = KILL) -> float:
        """End the worker, each call by a stronger means, see :class:`WorkerHandle`."""
        self._stops += 1
        if self._stops == 1:
            self._record.stop(number)
            self._lifeline.close()
        else:
            self._process.send_to_tree(number if self._stops == 2 else KILL)
        return _STOP_GRACE

    def kill(self) -> None:
        """End the worker at once, by SIGKILL, and the children of its jobs."""
        self._process.send_to_tree(KILL)

    def bury(self) -> int | None:
        """Free what is left of a worker that has ended, or whose channel has.

        Returns:
            The exit code, as in ``multiprocessing.Process.exitcode``; None if it is not
            to be had.
        """
        self._close()
        return self._process.bury()

    def _close(self) -> None:
        self.channel.close()
        self.answers.close()
        self._lifeline.close()


class _FirstName(str):
    """A process name that calls :func:`begin` when it is unpickled in the child.

    That is the first thing of ours that happens there, before the main module is
    imported: then a Ctrl-C would print a traceback, since under forkserver the child
    does not inherit this thread's signal mask, and what that module raises would be
    told to nobody.
    """

    __slots__ = ("_begun_with",)
    _begun_with: tuple[socket.socket, End, Environment] | None

    def __new__(
        cls, name: str, end: socket.socket, lifeline: End, environment: Environment
    ) -> _FirstName:
        self = super().__new__(cls, name)
        self._begun_with = end, lifeline, environment
        return self

    def __reduce__(self) -> tuple[Callable[..., str], tuple[object, ...]]:
        args, self._begun_with = self._begun_with, None
        # It is pickled again, as the name of the process that is made there.
        return (str, (str(self),)) if args is None else (begin, (str(self), *args))
