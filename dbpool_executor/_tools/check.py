"""The check: will it work in production, and with how many workers?

Runs in the parent; what the workers are asked is in ``_check_jobs``, how they are measured
in ``_check_measures``, what follows from it in ``_check_rules``.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import operator
import os
import statistics
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import BaseContext
from typing import Any, NamedTuple

from sqlalchemy import URL, Engine

from .. import DBPoolExecutor, OpenConnectionsError
from .._api.arguments import default_context, factory_of
from . import check_jobs as jobs
from . import check_measures as measures
from .check_measures import NoAnswerError
from .check_rules import (
    WITHIN,
    Finding,
    Status,
    count_of,
    counts_to_measure,
    judged_connections,
    recommended,
    tightest,
)
from .redact import place_of, told_of

_GOES_ON = (
    "if all processes of the program are killed at once, nobody is left to cancel its "
    "statements: set client_connection_check_interval, which is 0 here"
)
_MOST_SECONDS = 20.0  # for the rates of all numbers of workers


class Options(NamedTuple):
    """What the command line asks for.

    Attributes:
        url: The database; None if a factory is named, or there is a problem with it.
        factory: An engine factory, as ``module:function``; None for the URL.
        problem: What is wrong with the URL; None if nothing is.
        workers: The most that there are to be.
        start_method: How they are started; None for the executor's own choice.
        as_json: Whether to print one JSON object.
    """

    url: URL | None
    factory: str | None
    problem: str | None
    workers: int
    start_method: str | None
    as_json: bool


def run(options: Options, tell: Callable[[str], object]) -> bool:
    """Check everything that can be checked, and tell what was found.

    Args:
        options: What to check.
        tell: Called with each line as it is known, or with the JSON object.

    Returns:
        Whether nothing failed.

    Raises:
        KeyboardInterrupt: Ctrl-C; no worker is left.
    """
    check = _Check(options)
    failed = False
    for finding in check.findings():
        failed = failed or finding.status is Status.FAILED
        check.report["checks"].append(
            {**finding._asdict(), "status": finding.status.value}
        )
        if not options.as_json:
            tell(_line(finding))
    check.report["ok"] = not failed
    if options.as_json:
        tell(json.dumps(check.report, indent=2))
    return not failed


def _line(finding: Finding) -> str:
    told = "; ".join(filter(None, (finding.what, finding.remedy)))
    return f"{finding.status.value:<8} {finding.name:<15} {told}"


class _Check:
    """One run of the check; later steps use what earlier ones found.

    Args:
        options: What to check.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        method = options.start_method
        self._context: BaseContext = (
            default_context() if method is None else multiprocessing.get_context(method)
        )
        self._factory: Callable[[], Engine] | None = None
        self._facts: jobs.Facts | None = None
        self._free: int | None = None  # connections that the server still allows
        self._rates: dict[int, float] = {}
        self._failure = ""  # what ended the measurement of rates
        self.report: dict[str, Any] = {
            "ok": False,
            "database": None if options.url is None else place_of(options.url),
            "driver": None,
            "workers": options.workers,
            "start_method": self._context.get_start_method(),
            "checks": [],
            "connections": None,
            "round_trip_us": None,
            "jobs_per_second": None,
            "recommended_max_workers": None,
        }

    def findings(self) -> Iterator[Finding]:
        """Go through the steps; a step that needs what failed is left out."""
        yield self._engine_factory()
        yield self._start_method()
        if self._factory is None:
            return
        with self._executor(1) as executor:
            yield from self._database(executor)
            if self._facts is None:
                return
            yield self._connections(self._facts)
            if self._facts.failure is not None:
                return
            yield self._cancel(executor, self._facts)
            yield self._round_trip(executor)
            self._measure(executor, 1)
        yield from self._rate()

    # -- The engine factory and the start method ------------------------------------

    def _engine_factory(self) -> Finding:
        name = "engine factory"
        if self._options.problem is not None:
            return Finding(name, Status.FAILED, self._options.problem, "mend the URL")
        try:
            given, told = self._given()
            self._factory = factory_of(given)
        except (Exception, SystemExit) as exc:  # an import runs whatever it likes
            remedy = "mend what --url or --factory names"
            first = self._told(str(exc).partition("\n")[0]).removesuffix(":")
            text = f"{type(exc).__name__}: {first}"
            return Finding(name, Status.FAILED, text, remedy)
        return Finding(name, Status.OK, f"{told} pickles")

    def _given(self) -> tuple[Any, str]:
        if self._options.factory is None:
            return self._options.url, "create_engine(url)"
        module, _, path = self._options.factory.partition(":")
        found = importlib.import_module(module)
        return operator.attrgetter(path)(found), self._options.factory

    def _start_method(self) -> Finding:
        method = self._context.get_start_method()
        if method == "fork":
            return Finding(
                "start method",
                Status.WARNING,
                "fork: a worker inherits all that this process has open, and a copy of "
                "locks that its threads hold",
                "leave out mp_context, or see that no connection is in use at the first "
                "submit(), and name the engines of this process in parent_engine",
            )
        how = (
            "which is forked from a process that never had one"
            if method == "forkserver"
            else "which is a new interpreter and starts more slowly"
        )
        what = f"{method}: no connection is inherited by a worker, {how}"
        return Finding("start method", Status.OK, what)

    # -- The database -------------------------------------------------------------------

    def _database(self, executor: DBPoolExecutor) -> Iterator[Finding]:
        name = "database"
        try:
            facts = self._facts = measures.answer(executor, jobs.look)
        except NoAnswerError as exc:
            remedy = (
                "mend the engine factory, install the driver that it names, or see "
                "that the server can be reached from here"
            )
            if isinstance(exc.__cause__, OpenConnectionsError):
                remedy = ""  # it tells its own
            yield Finding(name, Status.FAILED, self._told(exc), remedy)
            return
        self.report |= {"database": facts.place, "driver": facts.driver}
        if facts.failure is not None:
            remedy = "start the server, or mend the URL's host, port, user or database"
            what = f"{facts.place} cannot be reached: {facts.failure}"
            yield Finding(name, Status.FAILED, what, remedy)
            return
        milliseconds = facts.connect_seconds * 1e3
        what = (
            f"{facts.server} answers at {facts.place}; the first connection takes "
            f"{milliseconds:.0f} ms"
        )
        yield Finding(name, Status.OK, what)
        for note in facts.notes:
            yield Finding("engine", Status.WARNING, note)

    def _connections(self, facts: jobs.Facts) -> Finding:
        workers, most = self._options.workers, facts.pool.most
        bound = tightest(facts.bounds)
        self._free = None if bound is None else bound.free
        self.report["connections"] = {
            "per_worker_at_most": most,
            "needed_at_least": workers,
            "needed_at_most": None if most is None else workers * most,
            "free": self._free,
            "bounds": [b._asdict() for b in facts.bounds],
        }
        is_sqlite = facts.dialect == "sqlite"
        return judged_connections(
            workers, facts.pool, facts.bounds, is_sqlite=is_sqlite
        )

    def _cancel(self, executor: DBPoolExecutor, facts: jobs.Facts) -> Finding:
        name, slow = "timeout", jobs.slow_statement(facts.dialect)
        dies = "a job that exceeds its timeout is ended with its worker, kill_after"
        if slow is None:
            what = (
                f"whether {facts.driver} cancels a statement is not known; if it does "
                f"not, {dies} seconds later"
            )
            return Finding(name, Status.WARNING, what, "try options(timeout=...)")
        try:
            seconds, runs_on, was_killed = measures.cancelled(executor, slow)
        except NoAnswerError as exc:
            what = f"no statement could be cancelled: {self._told(exc)}"
            return Finding(name, Status.FAILED, what, "do not rely on timeout=")
        if runs_on or was_killed:
            what = f"{facts.driver} does not cancel a statement: " + (
                "the server goes on with it" if runs_on else f"{dies} seconds later"
            )
            remedy = "use psycopg, psycopg2, PyMySQL, mysqlclient or sqlite3"
            return Finding(name, Status.WARNING, what, remedy)
        what = (
            f"{facts.driver} can cancel a statement: a job with timeout={measures.TIMEOUT:g}"
            f" ended after {seconds:.2f} s, and its worker goes on"
        )
        return Finding(name, Status.OK, what, _GOES_ON if facts.goes_on else "")

    # -- Measurements ---------------------------------------------------------------------

    def _round_trip(self, executor: DBPoolExecutor) -> Finding:
        try:
            taken = measures.round_trips(executor)
        except NoAnswerError as exc:
            remedy = "see the server's log"
            return Finding("round trip", Status.FAILED, self._told(exc), remedy)
        median = self.report["round_trip_us"] = round(statistics.median(taken) * 1e6)
        what = f"{median:,} microseconds for a job of one SELECT 1, median of {len(taken):,} jobs"
        return Finding("round trip", Status.OK, what)

    def _rate(self) -> Iterator[Finding]:
        wanted = self._options.workers
        most = wanted if self._free is None else max(1, min(wanted, self._free))
        deadline = time.monotonic() + _MOST_SECONDS
        for workers in counts_to_measure(most)[1:]:
            if self._failure or time.monotonic() > deadline:
                break
            with self._executor(workers) as executor:
                self._measure(executor, workers)
        rates, failure = self._rates, self._failure
        self.report["jobs_per_second"] = {n: round(rate) for n, rate in rates.items()}
        what = ", ".join(f"{rate:,.0f} with {n}" for n, rate in rates.items())
        what = f"jobs of one SELECT 1 per second, by workers: {what}" if what else ""
        if failure:
            told = "; ".join(filter(None, (what, failure)))
            remedy = "see the server's log, or use fewer workers"
            yield Finding("rate", Status.FAILED, told, remedy)
        else:
            yield Finding("rate", Status.OK, what)
        if rates:
            yield self._max_workers(rates)

    def _measure(self, executor: DBPoolExecutor, workers: int) -> None:
        try:
            self._rates[workers] = measures.rate_of(executor, workers)
        except NoAnswerError as exc:
            self._failure = f"with {count_of(workers)}: {self._told(exc)}"

    def _max_workers(self, rates: dict[int, float]) -> Finding:
        best = recommended(rates, self._free)
        self.report["recommended_max_workers"] = best
        what = (
            f"{best} is the least number within {WITHIN:.0%} of the best rate for jobs "
            "as short as these"
        )
        if max(rates) < self._options.workers:
            what += f", of the {max(rates)} that were measured"
        remedy = (
            f"pass max_workers={best}; more for jobs that wait long for the database, "
            f"and for jobs that compute as many as processors ({os.cpu_count()})"
        )
        return Finding("max_workers", Status.OK, what, remedy)

    # -- For all of them -------------------------------------------------------------

    def _executor(self, workers: int) -> DBPoolExecutor:
        assert self._factory is not None  # noqa: S101 - for the type checker
        return DBPoolExecutor(self._factory, workers, self._context)

    def _told(self, exc: BaseException | str) -> str:
        return told_of(exc, self._options.url)
