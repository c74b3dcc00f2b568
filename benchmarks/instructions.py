"""Counts the instructions of a trivial job, in the parent and in the worker.

    python benchmarks/instructions.py

Callgrind runs a program with one worker twice, with few jobs and with more; the
difference is what the jobs cost, without any start or end. That is a figure which a busy
machine does not change much, though it is not the same at each run either: how many jobs
share a wake-up depends on who is faster. Callgrind runs one thread of a process at a
time, and counts nothing of the kernel.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path

FEW, MANY = 1_000, 3_000
TOTAL = r"^(?:summary|totals): (\d+)"
CONTENDERS = ("dbpool_executor", "ProcessPoolExecutor")


def trivial(x: int) -> int:
    """Do nothing."""
    return x


def make_executor(contender: str) -> Executor:
    """Make it with one worker, which is forked: so it imports nothing."""
    context = multiprocessing.get_context("fork")
    if contender == "ProcessPoolExecutor":
        return ProcessPoolExecutor(1, context)
    from dbpool_executor import DBPoolExecutor

    # The file does not exist, and no job asks for it.
    return DBPoolExecutor("sqlite:////nowhere/unused.db", 1, context)


def run(contender: str, count: int) -> None:
    """Run the jobs; print the process ids of the parent and the worker."""
    with make_executor(contender) as executor:
        print(os.getpid(), executor.submit(os.getpid).result())
        futures = [executor.submit(trivial, number) for number in range(count)]
        assert [future.result() for future in futures] == list(range(count))


def count_instructions(contender: str, count: int) -> tuple[int, int]:
    """Give the instructions of the parent and of the worker."""
    with tempfile.TemporaryDirectory() as folder:
        callgrind = [
            *("valgrind", "--tool=callgrind", "--trace-children=yes", "--quiet"),
            *("--fair-sched=yes", f"--callgrind-out-file={folder}/%p"),
        ]
        program = [sys.executable, __file__, contender, str(count)]
        done = subprocess.run(
            callgrind + program, stdout=subprocess.PIPE, text=True, check=True
        )
        parent, worker = (
            re.search(TOTAL, Path(folder, pid).read_text(), re.MULTILINE)
            for pid in done.stdout.split()
        )
        assert parent, "valgrind wrote no total"
        assert worker, "valgrind wrote no total"
        return int(parent[1]), int(worker[1])


def main() -> None:
    """Count, and print."""
    if shutil.which("valgrind") is None:
        sys.exit("valgrind is not installed")
    print(f"instructions a trivial job, from {FEW} and {MANY} jobs")
    for contender in CONTENDERS:
        few, many = (count_instructions(contender, n) for n in (FEW, MANY))
        parent, worker = (
            (more - less) // (MANY - FEW) for less, more in zip(few, many, strict=True)
        )
        print(f"{contender:22}parent {parent:10,}, worker {worker:10,}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        run(sys.argv[1], int(sys.argv[2]))
    else:
        main()
