"""The errors of this package, and what each says of a job's transaction.

Runs in both processes. ``args`` are the constructor's arguments and ``__str__``
makes the sentence, so that every class pickles by the default rules.
"""

from __future__ import annotations

import enum
import signal
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from sqlalchemy.exc import DontWrapMixin, OperationalError

__all__ = [
    "ArgumentsLostError",
    "DBPoolError",
    "ForkedConnectionError",
    "JobExitedError",
    "JobFailedError",
    "JobTimeoutError",
    "KeyReusedError",
    "LedgerError",
    "NotPlainError",
    "NotStorableError",
    "OpenConnectionsError",
    "Outcome",
    "OutcomeUnknownError",
    "OutsideJobError",
    "ResolveNotSupportedError",
    "ResultLostError",
    "TransactionAbortedError",
    "WorkLostError",
    "WorkerDiedError",
    "WorkerStartError",
    "WorkerTraceback",
    "outcome_of",
]

OUTCOME_ATTRIBUTE = "_dbpool_executor_outcome"
"""Under it the value of an outcome stands in an exception's ``__dict__``: a text, so that
a process without this package can unpickle the exception."""


class Outcome(enum.Enum):
    """What is known of a job's transaction."""

    ROLLED_BACK = "rolled back"
    """The database holds nothing of the job. A promise."""

    NEVER_STARTED = "never started"
    """The job's function was never called. A promise."""

    COMMITTED = "committed"
    """The database holds the job's work. Of a failed job its result alone is lost."""

    UNKNOWN = "unknown"
    """COMMIT was under way, or the job may have committed something by itself: only the
    database can tell."""


class DBPoolError(Exception):
    """Base of every exception that this package itself raises.

    Attributes:
        outcome: What happened to the job's transaction; None where the error does
            not end a job.
        key: That of the job in the ledger, or those of its chunk; None if it has none.
    """

    outcome: Outcome | None = None
    key: str | tuple[str, ...] | None = None


def outcome_of(error: BaseException) -> Outcome | None:
    """Return what is known of the transaction of the job that an exception ended.

    Works for every exception that a future of this package raised, the job's own ones
    too, whichever way it came: ``result()``, ``exception()``, ``map()``,
    ``asyncio.wrap_future()``, pickled and unpickled.

    Args:
        error: Any exception. One whose class pickles by a ``__reduce__`` of its own may
            lose the outcome there; SQLAlchemy's do not.

    Returns:
        The outcome; None for an exception that ended no job.
    """
    if isinstance(error, DBPoolError):
        return error.outcome
    fields = fields_of(error)
    # Pickled, an error of SQLAlchemy's keeps of its attributes only this one, which has
    # it too.
    value = fields.get(OUTCOME_ATTRIBUTE) or getattr(
        fields.get("detail"), OUTCOME_ATTRIBUTE, None
    )
    # Where an error has it whose class guards its attributes.
    if value is None and isinstance(error.__cause__, WorkerTraceback):
        value = fields_of(error.__cause__).get(OUTCOME_ATTRIBUTE)
    return None if value is None else Outcome(value)


def fields_of(error: BaseException) -> dict[str, object]:
    """Return an exception's ``__dict__``, whatever its class does with attributes."""
    fields: dict[str, object]
    fields = BaseException.__dict__["__dict__"].__get__(error)
    return fields


class NotPlainError(DBPoolError, TypeError):
    """A value that is tied to a session or a connection was to cross processes.

    Found in a result, the job is rolled back; found in an argument, it never starts.

    Args:
        place: Where the value sits, such as ``result['rows'][3]``.
        type_name: The full name of its type.
        remedy: What to pass instead.
        outcome: ROLLED_BACK for a result, NEVER_STARTED for an argument.
    """

    outcome: Outcome

    def __init__(
        self, place: str, type_name: str, remedy: str, outcome: Outcome
    ) -> None:
        super().__init__(place, type_name, remedy, outcome)
        self.place = place
        self.type_name = type_name
        self.remedy = remedy
        self.outcome = outcome

    def __str__(self) -> str:
        article = "an" if self.type_name[:1].lower() in "aeiou" else "a"
        return (
            f"{self.place} is {article} {self.type_name}, which is tied to the process "
            f"that made it and cannot leave it (the job's outcome: {self.outcome.value}); "
            f"{self.remedy}"
        )


class OpenConnectionsError(DBPoolError, RuntimeError):
    """Workers were to be forked while this process has connections in use.

    Raised by ``submit()`` before anything is forked; nothing of this process is touched.

    Args:
        held: What is open, one text for each engine or file.
    """

    outcome: Outcome | None = Outcome.NEVER_STARTED

    def __init__(self, held: tuple[str, ...]) -> None:
        super().__init__(held)
        self.held = held

    def __str__(self) -> str:
        return (
            f"no worker was forked: {'; '.join(self.held)}; a forked worker would "
            "share what is open; close it before the first submit(), or submit a first "
            "job before you open it, or leave out mp_context: the default start method "
            "inherits nothing"
        )


class ForkedConnectionError(DBPoolError, DontWrapMixin, OperationalError):
    """A connection was used in a forked copy of the process that had it in use.

    Raised through SQLAlchemy, by a Session or Connection that was in use at the fork;
    no driver raised it, so ``orig`` is None. Nothing is sent to the server. To roll back
    or close does nothing and does not raise, and a Session may be used again then.

    Args:
        opener: Process id of the process that was forked.
        pid: Process id of the copy.
    """

    hide_parameters = False

    def __init__(self, opener: int, pid: int) -> None:
        # Not DBAPIError's constructor, which tells of a statement and of a driver.
        Exception.__init__(self, opener, pid)
        self.opener = opener
        self.pid = pid
        self.detail: list[str] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.opener, self.pid), vars(self)

    def __str__(self) -> str:
        return (
            f"this connection was in use by process {self.opener} when that was forked, "
            f"and this is the copy, process {self.pid}; what the copy sent over it "
            "would end up in the other process's transaction, so dbpool_executor has "
            "cut it off here; roll back or close the session or connection and open a "
            "new one in this process, and before a fork close those that are open"
        )


class OutsideJobError(DBPoolError, RuntimeError):
    """``session`` or ``current_engine()`` was used where no job is running.

    Args:
        name: What was used.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name

    def __str__(self) -> str:
        return (
            f"{self.name} was used outside a job: it exists only in a worker of a "
            "DBPoolExecutor, in the thread that runs the job; call it from the "
            "function that you submit, or make a Session of your own here"
        )


class JobFailedError(DBPoolError):
    """The job raised an exception that cannot be rebuilt in this process.

    Stands in for the exception: its class cannot be imported here, or its pickled
    form raises. The worker's traceback is the ``__cause__``.

    Args:
        class_name: Full name of the exception's class.
        text: What ``str()`` gave for it in the worker.
        outcome: What happened to the job's transaction.
    """

    outcome: Outcome

    def __init__(
        self, class_name: str, text: str, outcome: Outcome = Outcome.ROLLED_BACK
    ) -> None:
        super().__init__(class_name, text, outcome)
        self.class_name = class_name
        self.text = text
        self.outcome = outcome

    def __str__(self) -> str:
        return (
            f"the job raised {self.class_name}: {self.text} (the exception itself does "
            f"not pickle, so this stands in for it; the job's outcome: "
            f"{self.outcome.value}); "
            "define the class at the top level of a module that both processes import"
        )


class JobExitedError(DBPoolError):
    """The job raised SystemExit or another exception that is meant to end a process.

    The job is rolled back; neither the worker nor the parent exits.

    Args:
        text: What was raised, as ``repr()`` shows it.
    """

    outcome: Outcome = Outcome.ROLLED_BACK

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return (
            f"the job raised {self.text}, which would have ended its process (the "
            f"job's outcome: {self.outcome.value}); return a value or raise an Exception "
            "instead"
        )


class JobTimeoutError(DBPoolError, TimeoutError):
    """The job took longer than its ``timeout``.

    Args:
        timeout: The limit, in seconds from the start of the job.
        outcome: ROLLED_BACK as a rule. If the worker had to be killed, what its
            transaction came to: UNKNOWN if COMMIT was under way by then.
        done: What was done to the job, in words.
    """

    outcome: Outcome

    def __init__(
        self,
        timeout: float,
        outcome: Outcome = Outcome.ROLLED_BACK,
        done: str = "it was interrupted",
    ) -> None:
        super().__init__(timeout, outcome, done)
        self.timeout = timeout
        self.outcome = outcome
        self.done = done

    def __str__(self) -> str:
        return (
            f"the job was not done {self.timeout:g} s after its start, so {self.done} "
            f"(the job's outcome: {self.outcome.value}); give it more time with "
            "options(timeout=...), or less to do"
        )


class ResolveNotSupportedError(DBPoolError, ValueError):
    """``resolve=True`` was asked of a database that cannot tell.

    Args:
        dialect: SQLAlchemy's name of the database.
    """

    outcome: Outcome | None = Outcome.NEVER_STARTED

    def __init__(self, dialect: str) -> None:
        super().__init__(dialect)
        self.dialect = dialect

    def __str__(self) -> str:
        return (
            f"options(resolve=True) was given, but {self.dialect} cannot be asked what "
            "became of a transaction, only PostgreSQL can; the job never started; "
            "leave the option out"
        )


class TransactionAbortedError(DBPoolError):
    """The job swallowed a database error that had undone a part of its transaction.

    On PostgreSQL all of it: COMMIT is then answered with success and stores nothing
    (PostgreSQL documentation, "COMMIT"). On MySQL and MariaDB a lock wait timeout
    undoes one statement, and a deadlock everything before it (MariaDB documentation,
    "innodb_rollback_on_timeout"). The job is rolled back instead.

    Args:
        text: What happened.
    """

    outcome: Outcome = Outcome.ROLLED_BACK

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return (
            f"{self.text}, and the job went on without it; COMMIT would store half a "
            "job or nothing, so it was rolled back; let the error out of the job, or "
            "try the statement inside session.begin_nested()"
        )


class WorkLostError(TransactionAbortedError):
    """The job closed a session with work that was not committed, and returned.

    By ``session.close()``, ``session.remove()`` or ``with session() as s:``, which
    undoes it. What else the job wrote is rolled back, too. The remedy is to leave the
    session open: it is committed and closed when the job returns. What is only read may
    be closed; so may what the job has committed, or undone with ``session.rollback()``.
    """

    def __init__(
        self, text: str = "the job closed its session with work that was not committed"
    ) -> None:
        super().__init__(text)

    def __str__(self) -> str:
        return (
            f"{self.text}, by session.close(), session.remove() or `with session()`, "
            "which undoes it, so the job was rolled back; write session.add(...) and "
            "leave the session open, it is committed and closed when the job returns; "
            "if the work is not wanted, call session.rollback() first"
        )


class LedgerError(DBPoolError, RuntimeError):
    """What the ledger promises could not be kept for a job with a key.

    The table is not what it has to be, and the job never started; or the job commits by
    itself, or writes to another database, and is rolled back.

    Args:
        text: What is wrong, and what to do.
        outcome: NEVER_STARTED or ROLLED_BACK.
    """

    outcome: Outcome | None = Outcome.NEVER_STARTED

    def __init__(self, text: str, outcome: Outcome = Outcome.NEVER_STARTED) -> None:
        super().__init__(text, outcome)
        self.text = text
        self.outcome = outcome

    def __str__(self) -> str:
        what = {
            Outcome.NEVER_STARTED: "never started",
            Outcome.ROLLED_BACK: "is rolled back",
        }.get(self.outcome or Outcome.UNKNOWN, "has an unknown outcome")
        return f"the job with a key {what}, since {self.text}"


class KeyReusedError(DBPoolError, ValueError):
    """A key was given to a job of another function than the ledger has it for.

    Args:
        key: The key.
        stored: Qualified name of the function that the ledger has it for.
        name: That of the job.
    """

    outcome: Outcome | None = Outcome.NEVER_STARTED

    def __init__(self, key: str, stored: str, name: str) -> None:
        super().__init__(key, stored, name)
        self.key: str | tuple[str, ...] | None = key
        self.stored = stored
        self.name = name

    def __str__(self) -> str:
        return (
            f"the key {self.key!r} of a job {self.name} is one of {self.stored} in the "
            "ledger, whose result may be something else, so the job never started; use "
            "another key, or if the function was renamed "
            f'Ledger(names={{"{self.stored}": "{self.name}"}})'
        )


class NotStorableError(DBPoolError, TypeError):
    """The result of a job with a key is nothing that its ledger keeps.

    The job is rolled back, and its key is free.

    Args:
        place: Where the value sits, such as ``result['rows'][3]``.
        what: Its type, or what is wrong with it.
        remedy: What to return instead.
    """

    outcome: Outcome | None = Outcome.ROLLED_BACK

    def __init__(self, place: str, what: type | str, remedy: str) -> None:
        if isinstance(what, type):
            what = f"{what.__module__}.{what.__qualname__}".removeprefix("builtins.")
        super().__init__(place, what, remedy)
        self.place = place
        self.what = what
        self.remedy = remedy

    def __str__(self) -> str:
        return (
            f"{self.place} is {self.what}, which is not JSON, so the ledger cannot keep "
            f"it (the job's outcome: rolled back); {self.remedy}"
        )


class ArgumentsLostError(DBPoolError, BrokenProcessPool):
    """The function or its arguments could not be unpickled in the worker.

    The job never started; the error of the unpickling is the ``__cause__``.

    Args:
        text: The error of the unpickling.
    """

    outcome: Outcome | None = Outcome.NEVER_STARTED

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return (
            f"the job could not be unpickled in the worker ({self.text}), so it never "
            "started; pass a function that the worker can import and plain values"
        )


class ResultLostError(DBPoolError, BrokenProcessPool):
    """The job has ended well, and its result did not arrive.

    Args:
        text: What happened to the result.
        outcome: COMMITTED as a rule; UNKNOWN for a job that was to commit for itself
            and was not seen to.
    """

    outcome: Outcome

    def __init__(self, text: str, outcome: Outcome = Outcome.COMMITTED) -> None:
        super().__init__(text, outcome)
        self.text = text
        self.outcome = outcome

    def __str__(self) -> str:
        return (
            f"the job has ended, but its result is lost: {self.text} (the job's "
            f"outcome: {self.outcome.value}); do not run it again, read what it wrote "
            "from the database"
        )


class OutcomeUnknownError(DBPoolError, BrokenProcessPool):
    """Contact was lost when the job was, or may have been, committed.

    While COMMIT was under way, that is, or after the job may have committed something by
    itself. The ``__cause__`` is what ended the contact.

    Args:
        text: What ended the contact.
    """

    outcome: Outcome | None = Outcome.UNKNOWN

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return (
            f"{self.text}, and whether the job was committed by then is not known; look "
            "for its rows in the database before you run it again"
        )


class WorkerDiedError(DBPoolError, BrokenProcessPool):
    """The worker process ended while it had the job.

    Args:
        exitcode: As in ``multiprocessing.Process.exitcode``: a negative number is a
            signal; None if it could not be read.
        pid: Process id of the worker, for the system's own log; None if the executor
            ended before a worker had the job.
        outcome: ROLLED_BACK if COMMIT had not begun, which is what ends a job with
            this error; NEVER_STARTED if worker after worker died before the job's
            function was called; UNKNOWN as the cause of an OutcomeUnknownError.
        killed_for: Why the executor itself killed the worker, as a clause; None if it
            did not.
    """

    outcome: Outcome

    def __init__(
        self,
        exitcode: int | None,
        pid: int | None = None,
        outcome: Outcome = Outcome.ROLLED_BACK,
        killed_for: str | None = None,
    ) -> None:
        super().__init__(exitcode, pid, outcome, killed_for)
        self.exitcode = exitcode
        self.pid = pid
        self.outcome = outcome
        self.killed_for = killed_for

    def __str__(self) -> str:
        if self.pid is None:
            why = self.killed_for or "its workers were killed"
            how = f"no worker had the job when the executor ended: {why}"
        else:
            had = "ran the job"
            if self.outcome is Outcome.NEVER_STARTED:
                had = "had not called the job's function yet"
            end = describe_exit(self.exitcode, self.killed_for)
            how = f"worker {self.pid}, which {had}, {end}"
        remedy = (
            "the worker is replaced and other jobs are not affected; see the job's own "
            "log or the system's for the reason"
            if self.killed_for is None
            else "submit the job again if it is still wanted and its outcome allows it"
        )
        return f"{how} (the job's outcome: {self.outcome.value}); {remedy}"


class WorkerStartError(DBPoolError, BrokenProcessPool):
    """Several workers in a row could not start; the executor is broken.

    The ``__cause__`` holds what the last of them raised.

    Args:
        text: What the last worker raised, or how it ended.
        attempts: How many workers in a row failed to start.
    """

    outcome: Outcome | None = Outcome.NEVER_STARTED

    def __init__(self, text: str, attempts: int) -> None:
        super().__init__(text, attempts)
        self.text = text
        self.attempts = attempts

    def __str__(self) -> str:
        return (
            f"{self.attempts} workers in a row failed to start, the last one: "
            f"{self.text}; the executor is broken and its waiting jobs never started; "
            "fix the engine factory, the initializer or the import that fails (see "
            "the cause) and make a new executor"
        )


class WorkerTraceback(Exception):  # noqa: N818 - not raised: it is the cause of one
    """The traceback of an exception as the worker saw it, kept as text.

    Args:
        text: The formatted traceback.
    """

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


_LIKELY_CAUSES = {
    "SIGKILL": "out of memory (OOM killer), or kill -9",
    "SIGSEGV": "a fault in an extension module",
    "SIGABRT": "an assertion in an extension module",
    "SIGTERM": "sent by another process",
}


def describe_exit(exitcode: int | None, killed_for: str | None = None) -> str:
    """Say in words how a process ended.

    Args:
        exitcode: As in ``multiprocessing.Process.exitcode``; None if it is not to be had.
        killed_for: Why the executor itself killed it, as a clause; None if it did not.

    Returns:
        A verb phrase, such as ``was killed by SIGKILL: …`` or ``exited with code 3``.
    """
    name = None if exitcode is None or exitcode >= 0 else _name_of(-exitcode)
    if killed_for is not None:
        by = "" if name is None else f" with {name}"
        return f"was killed by the executor itself{by}: {killed_for}"
    if exitcode is None:
        return "ended, and its exit status is not to be had"
    if name is None:
        return f"exited with code {exitcode}"
    cause = _LIKELY_CAUSES.get(name)
    return f"was killed by {name}" + (f": {cause}" if cause else "")


def _name_of(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
