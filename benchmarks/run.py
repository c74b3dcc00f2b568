"""Measures the executor against what a user would take instead, in one run.

    python benchmarks/run.py [--scenario NAME]... [--contender NAME]... [--rounds N]

Each sample is taken by a program of its own (``sample.py``), which starts one contender
with fresh workers, warms them, measures, and ends: at no time is anything of another
contender there to disturb, neither a thread that polls nor a process that the workers
are forked from. The contenders take turns, each round in another order, so that a noisy
minute hits all of them; what counts are the ratios of their medians.

DBPOOL_BENCH_URL says where PostgreSQL is, for the scenarios with rows.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from contenders import CONTENDERS, OURS
from database import execute, tables
from scenarios import GOALS, SCENARIOS

LONGEST_SAMPLE = 120.0
"""Seconds after which a sample is given up: some pools replace workers that fail for ever."""


class SampleError(Exception):
    """A sample could not be taken, or a result was wrong."""


def take_sample(*args: str) -> dict[str, float]:
    """Run the program that measures, and leave none of its processes behind."""
    command = [sys.executable, Path(__file__).with_name("sample.py"), *args]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as program:
        try:
            output, _ = program.communicate(timeout=LONGEST_SAMPLE)
        except subprocess.TimeoutExpired as exc:
            raise SampleError("it takes too long") from exc
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)
    if program.returncode != 0:
        raise SampleError(f"it ended with {program.returncode}; see above")
    return json.loads(output)


def measure(
    scenarios: list[str], contenders: list[str], rounds: int, workers: int, quick: bool
) -> tuple[dict[str, Any], list[str]]:
    """Take all samples.

    Returns:
        The samples by scenario, figure and contender; and what went wrong.
    """
    samples: dict[str, dict[str, dict[str, list[float]]]] = {}
    failures = []
    for name in scenarios:
        scenario = SCENARIOS[name]
        size = scenario.quick if quick else scenario.size
        turns = [other for other in scenario.contenders if other in contenders]
        found = samples[name] = {}
        with tables() if scenario.has_tables else contextlib.nullcontext():
            for turn in range(rounds):
                first = turn % len(turns) if turns else 0
                for contender in turns[first:] + turns[:first]:
                    print(f"{name}, round {turn + 1}: {contender}", file=sys.stderr)
                    try:
                        figures = take_sample(name, contender, str(workers), str(size))
                    except SampleError as exc:
                        failures.append(f"{name}, {contender}: {exc}")
                        continue
                    for figure, value in figures.items():
                        of_figure = found.setdefault(figure, {})
                        of_figure.setdefault(contender, []).append(value)
    return samples, failures


def medians(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Give the median of each figure and contender of a scenario."""
    return {
        figure: {name: statistics.median(values) for name, values in by_name.items()}
        for figure, by_name in found.items()
    }


def report(run: dict[str, Any]) -> Iterator[str]:
    """Give the lines of the tables: medians, ranges, ratios to ours, and the goals."""
    machine = ", ".join(f"{name} {value}" for name, value in run["machine"].items())
    versions = ", ".join(f"{name} {value}" for name, value in run["versions"].items())
    yield machine
    yield versions
    yield f"workers: {run['workers']}, rounds: {run['rounds']}; median (least, most)"
    yield from (f"{name} is not installed and is left out" for name in run["left_out"])
    yield from (f"FAILED: {failure}" for failure in run["failures"])
    for name, found in run["samples"].items():
        middle = medians(found)
        yield ""
        yield name
        for figure, by_name in found.items():
            yield f"  {figure}"
            ours = middle[figure].get(OURS)
            for contender, values in by_name.items():
                median = middle[figure][contender]
                span = f"({min(values):.1f}, {max(values):.1f})"
                ratio = f"{median / ours:8.2f} x ours" if ours else ""
                yield f"    {contender:22}{median:12.1f} {span:24}{ratio}".rstrip()
        for goal in GOALS:
            if goal.scenario == name:
                value = goal.value(middle)
                if value is None:
                    continue
                verdict = "met" if goal.is_met_by(value) else "not met"
                times = " x" if goal.than else ""
                yield f"  goal: {goal}: {value:.2f}{times}, {verdict}"


def describe_machine(has_tables: bool) -> dict[str, Any]:
    """Say where this runs."""
    machine = {
        "Python": platform.python_version(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
    }
    if has_tables:
        machine["PostgreSQL"] = execute("SHOW server_version")
    return machine


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def describe_versions(contenders: list[str]) -> dict[str, str]:
    """Say what takes part."""
    packages = [OURS, "sqlalchemy", "psycopg", "numpy"]
    packages += [CONTENDERS[name].package or "" for name in contenders]
    found = {}
    for package in filter(None, packages):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenario", action="append", choices=list(SCENARIOS))
    parser.add_argument("--contender", action="append", choices=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, help="5 unless it is quick, then 1")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="only show that it works")
    parser.add_argument("--json", action="store_true", help="print all samples")
    parser.add_argument("--out", type=Path, help="write all samples to a file as well")
    args = parser.parse_args()
    scenarios = args.scenario or list(SCENARIOS)
    asked = args.contender or list(CONTENDERS)
    contenders = [name for name in asked if CONTENDERS[name].is_installed]
    rounds = args.rounds or (1 if args.quick else 5)
    samples, failures = measure(scenarios, contenders, rounds, args.workers, args.quick)
    run = {
        "machine": describe_machine(any(SCENARIOS[s].has_tables for s in scenarios)),
        "versions": describe_versions(contenders),
        "workers": args.workers,
        "rounds": rounds,
        "left_out": [name for name in asked if name not in contenders],
        "failures": failures,
        "samples": samples,
    }
    if args.out:
        args.out.write_text(json.dumps(run, indent=1) + "\n")
    if args.json:
        print(json.dumps(run, indent=1))
    else:
        print(*report(run), sep="\n")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
