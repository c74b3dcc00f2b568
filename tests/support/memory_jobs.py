"""Jobs that take memory, and say how much their worker has had."""

from __future__ import annotations

from pathlib import Path

MEGABYTE = 1 << 20


def leave_a_cycle(megabytes: int) -> None:
    """Leave a cycle that holds much and has few objects."""
    cycle: list[object] = [bytearray(megabytes * MEGABYTE)]
    cycle.append(cycle)


def peak() -> int:
    """Give the most bytes that the worker has had."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise LookupError
