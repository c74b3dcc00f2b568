"""Measures the least that a job takes which has a future and an answer of its own.

    python benchmarks/floor.py

The floor is a pool of two workers with nothing else: calls are pickled five hundred at
once, each is answered before the next one begins, so that a crash loses no other answer,
and the answers are read together. There are no options, limits, sessions, transactions
or retries, no crash and no shutdown is handled, nothing can be cancelled, and who waits
looks again every half a millisecond. Its answers go through a socket, as the executor's
do, through a pipe, or through memory that worker and parent share, where they need no
call to the system, and nothing says that a processor sees them in the order written.

joblib, which takes all jobs in one call and has neither, takes turns with them and with
the executor; each sample is a program of its own.
"""

from __future__ import annotations

import argparse
import mmap
import multiprocessing
import os
import pickle
import platform
import random
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version

from contenders import CONTENDERS, OURS, Contender, Runner, runner

import jobs

JOBS = 10_000
BURSTS = 8  # in a sample; the median of all but the first three counts
_GROUP = 500  # jobs
_NAP = 0.001  # seconds
_HEAD = struct.Struct("<QQ")  # nanoseconds, length
_MEMORY = 1 << 22  # bytes, for the answers of all bursts


class FloorFuture(Future):  # type: ignore[type-arg]
    """A future that makes nothing until it is asked for something unusual."""

    __slots__ = ("_exception", "_result", "_state", "call")

    def __init__(self, call: object) -> None:
        self._state = "PENDING"
        self._exception = None
        self.call = call

    def result(self, timeout: float | None = None) -> object:  # noqa: ARG002
        """Wait for it."""
        while self._state != "FINISHED":
            time.sleep(_NAP / 2)
        return self._result


class Floor:
    """Two workers, one thread.

    Args:
        way: Of the answers: "socket", "pipe" or "memory".
    """

    def __init__(self, way: str) -> None:
        self._waiting: deque[FloorFuture] = deque()
        self._lock = threading.Lock()
        self._workers = [_Worker(way) for _ in range(2)]
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, fn: Callable[..., object], *args: object) -> FloorFuture:
        """Queue a job."""
        future = FloorFuture((fn.__module__, fn.__name__, args))
        self._waiting.append(future)
        return future

    def _run(self) -> None:
        waiting = self._waiting
        while True:
            for worker in self._workers:
                while waiting and len(worker.sent) <= _GROUP:
                    share = (len(waiting) + 1) // 2
                    futures = [waiting.popleft() for _ in range(min(_GROUP, share))]
                    with self._lock:
                        for future in futures:
                            future._state = "RUNNING"
                    worker.send(futures)
            time.sleep(_NAP)
            for worker in self._workers:
                answers = worker.answers()
                values = [pickle.loads(answer) for answer in answers]
                futures = [worker.sent.popleft() for _ in values]
                with self._lock:
                    for future, value in zip(futures, values, strict=True):
                        future._result = value
                        future._state = "FINISHED"


class _Worker:
    def __init__(self, way: str) -> None:
        self.sent: deque[FloorFuture] = deque()
        self._end, theirs = socket.socketpair()
        for end in (self._end, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MEMORY)
        self._memory: memoryview | None = None
        self._read = 8  # bytes of the memory; the first eight say how many are written
        self._rest = b""  # of what was received
        write: Callable[[bytes], object] = theirs.send
        self._receive = partial(self._end.recv, 1 << 16)
        if way == "memory":
            self._memory = memoryview(mmap.mmap(-1, _MEMORY))
            write = _writer(self._memory)
        elif way == "pipe":
            ours, written = os.pipe()
            os.set_blocking(ours, False)
            write = partial(os.write, written)
            self._receive = partial(os.read, ours, 1 << 16)
        # Forked, so that the memory is shared.
        serving = multiprocessing.get_context("fork").Process(
            target=_serve, args=(theirs, write), daemon=True
        )
        serving.start()
        self._end.setblocking(False)

    def send(self, futures: Sequence[FloorFuture]) -> None:
        self.sent += futures
        calls = pickle.dumps([future.call for future in futures], 5)
        self._end.send(_HEAD.pack(0, len(calls)) + calls)

    def answers(self) -> list[bytes | memoryview]:
        data: bytes | memoryview
        if self._memory is not None:
            data, start, end = self._memory, self._read, self._memory[:8].cast("Q")[0]
        else:
            try:
                data = self._rest + self._receive()
            except BlockingIOError:
                return []
            start, end = 0, len(data)
        found: list[bytes | memoryview] = []
        size, unpack = _HEAD.size, _HEAD.unpack_from
        while end - start >= size:
            body = start + size
            _, length = unpack(data, start)
            if end - body < length:
                break
            start = body + length
            found.append(data[body:start])
        self._read = start
        if isinstance(data, bytes):
            self._rest = data[start:]
        return found


def _writer(memory: memoryview) -> Callable[[bytes], object]:
    words, end = memory[:8].cast("Q"), 8

    def write(message: bytes) -> None:
        nonlocal end
        start, end = end, end + len(message)
        memory[start:end] = message
        words[0] = end

    return write


def _serve(end: socket.socket, write: Callable[[bytes], object]) -> None:
    rest = b""
    while True:
        while len(rest) < (size := _HEAD.size) or len(rest) < (
            size := size + _HEAD.unpack_from(rest)[1]
        ):
            more = end.recv(1 << 16)
            if not more:
                return
            rest += more
        calls, rest = pickle.loads(rest[_HEAD.size : size]), rest[size:]
        start = time.monotonic_ns()
        for module, name, args in calls:
            answer = pickle.dumps(getattr(sys.modules[module], name)(*args), 5)
            now = time.monotonic_ns()
            write(_HEAD.pack(now - start, len(answer)) + answer)
            start = now


@contextmanager
def _floor(way: str, _workers: int) -> Iterator[Runner]:
    pool = Floor(way)
    yield runner(pool.submit)


ALL = {name: CONTENDERS[name] for name in (OURS, "joblib")} | {
    f"floor, by {way}": Contender(partial(_floor, way))
    for way in ("socket", "pipe", "memory")
}


def sample(contender: Contender) -> float:
    """Give the microseconds that a trivial job takes."""
    keys = list(range(JOBS))
    times = []
    with contender.start(2) as started:
        for _ in range(BURSTS):
            start = time.perf_counter()
            if started.run_all(jobs.trivial, keys) != keys:
                raise AssertionError("a result is wrong")
            times.append((time.perf_counter() - start) / JOBS * 1e6)
    return statistics.median(times[3:])


def main() -> None:
    """Have all take turns, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sample", choices=ALL, help="only one of this, to be printed")
    options = parser.parse_args()
    if options.sample:
        print(sample(ALL[options.sample]))
        return
    found: dict[str, list[float]] = {name: [] for name in ALL}
    for _ in range(options.rounds):
        for name in random.sample(list(ALL), len(ALL)):
            command = [sys.executable, __file__, "--sample", name]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[name].append(float(done.stdout))
    print(
        f"Python {platform.python_version()}, joblib {version('joblib')}, "
        f"{options.rounds} rounds, us a trivial job: median (least, most)"
    )
    joblib = statistics.median(found["joblib"])
    for name, times in found.items():
        median = statistics.median(times)
        print(
            f"{name:<18}{median:7.2f} ({min(times):.2f}, {max(times):.2f})"
            f"{joblib / median:8.2f} x the rate of joblib"
        )


if __name__ == "__main__":
    main()
