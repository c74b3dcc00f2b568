"""The loop of a worker: read a job, run it, answer it.

Runs in a worker. :func:`main` is named by the parent and imported by the child.
"""

from __future__ import annotations

import gc
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, MutableSequence, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing import spawn
from multiprocessing.reduction import ForkingPickler
from multiprocessing.util import Finalize
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from sqlalchemy import Engine

from .._drivers.errors import may_pass
from .._forks.connections import bury_inherited, freeze
from .._forks.ends import End, own_end
from .._wire.calls import Buffer, Call, Function, Run, loads_calls, unpack_call
from .._wire.channel import Channel, Kind, Message, Stage
from .._wire.environment import Environment
from .._wire.exceptions import ASK_LEDGER, REPEAT, dumps_exception, set_cause
from .._wire.locate import full_name
from .._wire.logs import Levels
from .._wire.options import JobOptions, loads_options
from .._wire.phase import PhaseRecord, Transaction
from .._wire.picklers import importable, is_interactive, with_code
from .._wire.short_answers import AnswerWriter
from ..errors import ArgumentsLostError, Outcome
from .engine_warnings import notes_on, watch_limit
from .hard_exit import leave
from .lookup import outcome_of
from .memory_growth import MemoryGrowth
from .parent_watch import ParentWatch
from .sessions import SessionOptions
from .transaction import NO_KEYWORDS, Database, current_engine, here

if TYPE_CHECKING:
    from .._ledger.ledger import Ledger

T = TypeVar("T")

# To look up a member takes as long as to call a function (CPython 3.11).
_RESULT, _FAILURE = Kind.RESULT, Kind.FAILURE
_RESULT_UNKNOWN = Kind.RESULT_UNKNOWN
_PACKAGE = __package__.partition(".")[0]
_NEW_OBJECTS = 10_000  # after which garbage is collected


class WorkerSetup(NamedTuple):
    """What a worker needs before its first job."""

    engine_factory: Callable[[], Engine]
    session_options: SessionOptions
    initializer: Callable[[], object] | None
    finalizer: Callable[[], object] | None
    max_workers: int
    log_levels: Levels | None  # None if log records stay in the worker
    resets_connections: bool = False
    ledger: Ledger | None = None


_Setup = tuple[WorkerSetup, MutableSequence[int], End]
Ends = tuple[socket.socket, End]
"""The worker's ends of its channel and of its lifeline."""


class SentSetup:
    """A setup on its way: unpickled by :func:`main`, where what that raises is told.

    Unpickled with the process, an import that fails would end it without a word.

    Args:
        setup: The setup, the memory for the phase record and the pipe for answers, or
            their pickle. One for all: what is pickled twice keeps a process from being
            spawned.
    """

    def __init__(self, setup: _Setup | bytes) -> None:
        self._setup = setup

    def __reduce__(self) -> tuple[type[SentSetup], tuple[bytes]]:
        return SentSetup, (with_code(self._setup, ForkingPickler.dumps),)

    def load(self) -> _Setup:
        """Give the setup, the memory and the pipe.

        Raises:
            Exception: Whatever the unpickling raises.
        """
        if not isinstance(self._setup, bytes):
            return self._setup
        setup: _Setup
        setup = ForkingPickler.loads(self._setup)
        return setup


_growth: MemoryGrowth | None = None  # in a worker it is there


def main(ends: Ends | None, sent: SentSetup, environment: Environment | None) -> None:
    """Run jobs until the parent has no more of them.

    Args:
        ends: The worker's ends of its channel and of its lifeline; None if
            :func:`begin` was given them.
        sent: What to make before the first job.
        environment: That of the program when it made the executor; None if
            :func:`begin` was given it.
    """
    _take_over_signals()
    # Nothing of the interpreter's own end may run here: under fork and forkserver it
    # would act on what was inherited. The lowest priority is the last to run.
    Finalize(None, leave, exitpriority=-1000)
    if ends is None:
        ends, sys.excepthook = _begun, sys.__excepthook__
    end, lifeline = ends
    own_end(end)
    own_end(lifeline)
    watch = ParentWatch(lifeline)
    channel = Channel(end)
    tell = partial(_tell, channel)
    watch.before_end = partial(_tell_stack, channel)
    # As it is by default, to add a thousand rows to a session is to have all of them
    # looked at more than once.
    if 0 < gc.get_threshold()[0] < _NEW_OBJECTS:
        gc.set_threshold(_NEW_OBJECTS, *gc.get_threshold()[1:])
    for note in bury_inherited():
        tell(note)
    global _growth
    _growth = MemoryGrowth()
    databases: list[Database] = []  # none until it is made
    try:
        try:
            if environment is not None:
                environment.set_variables()
                environment.set_directory()
                environment.set_path()
            setup, words, written = sent.load()
            own_end(written)
            # With records that go first, answers follow them.
            answers = AnswerWriter(written) if setup.log_levels is None else None
            record = watch.record = PhaseRecord(words)
            forwarder = None
            if setup.log_levels is not None:
                from .log_forwarding import Forwarder
                from .shared_channel import SharedChannel

                channel = SharedChannel(end)
                tell = partial(_tell, channel)
                watch.before_end = partial(_tell_stack, channel)
                forwarder = Forwarder(partial(_send_record, channel))
                forwarder.take_over(setup.log_levels)
            channel.send(Message(Kind.STAGE, number=Stage.FACTORY))
            database = Database(
                setup.engine_factory,
                setup.session_options,
                record,
                resets_connections=setup.resets_connections,
            )
            if setup.ledger is not None:
                from .once import Once

                database.once = Once(setup.ledger)
            databases.append(database)
            watch.database = database
            here.database = database
            if forwarder is not None:
                forwarder.uninterrupted = database.alarm.paused
            watch_limit(database.engine, setup.max_workers, tell)
            if setup.initializer is not None:
                channel.send(Message(Kind.STAGE, number=Stage.INITIALIZER))
                database.run(_call_only, (setup.initializer,))
            for note in notes_on(database.engine):
                tell(note)
        except BaseException as exc:
            kind = Kind.PASSING_START_FAILURE if may_pass(exc) else Kind.START_FAILURE
            channel.send(Message(kind, dumps_exception(exc)))
            return
        watch.before_end = None
        channel.send(Message(Kind.READY))
        freeze()
        _serve(channel, answers, database, record)
        if setup.finalizer is not None:
            _finalize(database, setup.finalizer, tell)
    finally:
        channel.drain()
        for database in databases:
            with suppress(Exception):
                database.dispose()


_begun: Ends


def begin(
    name: str, end: socket.socket, lifeline: End, environment: Environment
) -> str:
    """Begin a worker that is not a fork, before it imports the main module.

    Args:
        name: Of its process.
        end: Its end of its channel.
        lifeline: Its end of that.
        environment: That of the program when it made the executor.

    Returns:
        The name.
    """
    global _begun
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _begun = end, lifeline
    sys.excepthook = _tell_failed_import
    environment.set_variables()
    # What is called next sets what the program has by now, and imports the main module.
    spawn.prepare = partial(_prepare, spawn.prepare, environment)
    return name


def _prepare(
    prepare: Callable[[Mapping[str, Any]], None],
    environment: Environment,
    data: Mapping[str, Any],
) -> None:
    spawn.prepare = prepare  # type: ignore[assignment]
    environment.set_directory()
    environment.set_path()
    left = {name: data[name] for name in data.keys() - {"dir", "sys_path"}}
    prepare(left)


def _tell_failed_import(
    cls: type[BaseException], exc: BaseException, trace: TracebackType | None
) -> None:
    end, _ = _begun
    Channel(end).send(Message(Kind.START_FAILURE, dumps_exception(exc)))
    sys.__excepthook__(cls, exc, trace)


def run_chunk(fn: Callable[..., T], chunk: tuple[tuple[Any, ...], ...]) -> list[T]:
    """Run the calls of one chunk of ``map()``: one job, so one transaction."""
    results = []
    for args in chunk:
        results.append(fn(*args))
        if _growth is not None and (now := time.monotonic_ns()) >= _growth.look_at:
            _growth.look(now)
    return results


run_chunk.is_called_for_another = True  # type: ignore[attr-defined] # see name_of()


def outcome_of_transaction(transaction: Transaction) -> Outcome:
    """Ask what became of a transaction of a worker that died: itself a job."""
    return outcome_of(current_engine(), transaction)


def _call_only(call: Callable[[], object]) -> None:
    call()  # what it returns need not be plain


def _finalize(
    database: Database, finalizer: Callable[[], object], tell: Callable[[str], None]
) -> None:
    try:
        database.run(_call_only, (finalizer,))
    except Exception as exc:
        tell(f"the finalizer of a worker raised {exc!r}, so its session is rolled back")


def _serve(
    channel: Channel,
    answers: AnswerWriter | None,
    database: Database,
    record: PhaseRecord,
) -> None:
    assert _growth is not None  # noqa: S101 - main() has made it
    growth = _growth
    due = 1  # number of the next job
    while True:
        try:
            messages = deque(channel.receive())
        except EOFError:
            return
        start = time.monotonic_ns()
        while messages:
            kind, parts, first = messages.popleft()
            if first < due:
                continue  # it was sent twice, see Offer
            due = first
            options = loads_options(bytes(parts[1]))
            if options.keyed:
                keys = iter(pickle.loads(parts[2]))
            runs: list[Run]
            runs = loads_calls(parts[0]) if kind is Kind.JOBS else [(None, [parts[0]])]
            is_group = len(runs) > 1 or len(runs[0][1]) > 1
            writer = answers if is_group else None
            for fn, calls in runs:
                for number, call in enumerate(calls, due):
                    if options.keyed:
                        database.keys = next(keys)
                    # Begun before it is unpickled: that runs the caller's code too.
                    if not record.begin(number):
                        channel.send(Message(Kind.RETURNED, number=number))
                        continue
                    kind, answer = _run(database, fn, call, options)
                    if database.once is not None and database.once.skipped:
                        skipped, database.once.skipped = database.once.skipped, 0
                        channel.send(Message(Kind.SKIPPED, number=skipped))
                    end = time.monotonic_ns()
                    is_given = (
                        writer is not None
                        and kind is _RESULT
                        and writer.write(number, answer, end - start)
                    )
                    if not is_given:
                        if kind is _FAILURE:
                            record.hold_if_stopped()
                        if database.was_interrupted:
                            # A cursor that nobody closed holds SQLite's lock as long as
                            # it lives, and the interrupt's frames may be a cycle.
                            database.was_interrupted = False
                            gc.collect()
                        channel.send_one(kind, answer, end - start)
                    del answer
                    if end >= growth.look_at:
                        growth.look(end)
                        end = time.monotonic_ns()  # no part of the next job
                    start = end
                due += len(calls)
            # Its arguments may be large, and the next job long in coming.
            del parts, runs, calls, call


def _run(
    database: Database, fn: Function | None, call: Call, options: JobOptions
) -> tuple[Kind, Sequence[Buffer]]:
    kwargs: Mapping[str, object] = NO_KEYWORDS
    if not isinstance(call, tuple):
        try:
            fn, call, kwargs = unpack_call(call)
        except BaseException as exc:
            what = f"{full_name(type(exc))}: {exc}"
            if isinstance(exc, AttributeError) and "__main__" in what:
                # At a prompt the parent would have sent the code, if it could.
                how = importable(advise=is_interactive())
                what += f" (only plain values cross between processes, and {how})"
            error = ArgumentsLostError(what)
            set_cause(error, exc)
            return _FAILURE, dumps_exception(error)
    assert fn is not None  # noqa: S101 - or the call would be a pickle
    try:
        parts = database.run(fn, call, kwargs, options)
    except Exception as exc:
        trace = exc.__traceback__
        while trace is not None and _is_ours(trace.tb_frame):
            trace = trace.tb_next
        exc = exc.with_traceback(trace)
        parts = dumps_exception(exc, database.failed_outcome)
        repeats = options.retries > 0 and database.may_repeat(exc)
        if database.asks_ledger:
            database.asks_ledger = False
            return _FAILURE, [*parts, ASK_LEDGER]
        return _FAILURE, [*parts, REPEAT] if repeats else parts
    return (_RESULT if database.is_committed else _RESULT_UNKNOWN), parts


def _is_ours(frame: FrameType) -> bool:
    package = str(frame.f_globals.get("__package__"))
    return package.partition(".")[0] == _PACKAGE


def _tell(channel: Channel, text: str) -> None:
    channel.send(Message(Kind.NOTE, [text.encode()]))


def _tell_stack(channel: Channel) -> None:
    """Tell where a start hangs that is about to be ended; not in its own thread."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    error = TimeoutError("the worker was at this when it was ended:")
    error.add_note("".join(traceback.format_stack(frame)))
    channel.send(Message(Kind.START_FAILURE, dumps_exception(error)))


def _send_record(channel: Channel, data: bytes) -> None:
    channel.send(Message(Kind.LOG, [data]))


def _take_over_signals() -> None:
    # Ctrl-C reaches the whole group; what becomes of the jobs is for the parent to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # An event loop of the parent would be woken by this process's signals.
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
