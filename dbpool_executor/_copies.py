"""Which forked copy of a process this is.

Runs in both processes, and at each fork of them. Who must not be used in a copy notes the
generation it was made in. ``os.getpid()`` would do as well, but it is a call to the
system, and two of them are a tenth of all that a trivial job takes.
"""

from __future__ import annotations

import os

generation = 0
"""How many forks lie between this process and the one that was started."""


def _count() -> None:
    global generation
    generation += 1


# Whoever forks in C and goes on with Python has these called too
# (docs.python.org/3/c-api/sys.html, PyOS_AfterFork_Child).
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_count)
