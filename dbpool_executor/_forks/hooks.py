"""All that is done when this process forks, from top to bottom as it is done.

Runs in every process that imports the package, at each fork of it. The system runs the
hooks; nothing else here is called.
"""

from __future__ import annotations

import os
import threading

from . import connections, ends, process_id

job_lock = threading.RLock()
"""Guards every job's fast path: its state, and that it has no condition yet."""

# A lock that another thread holds at the fork is held in the copy for ever, so each of
# ours is taken first. Each is a hook of its own, and C: a Ctrl-C, which is raised in
# Python code, falls between no acquire and its release. What is Python is looked up
# when it is called: a module may have been reloaded by then.
_BEFORE = (
    # Before the lock of jobs: its owner may collect garbage, and so cancel the jobs of a
    # forgotten map().
    ends.lock.acquire,
    job_lock.acquire,
    process_id.lock.acquire,
    lambda: process_id.forget(),  # noqa: PLW0108
    # Last, so that no connection is opened between this and the fork that could be held.
    lambda: connections.hold(),  # noqa: PLW0108
)
_AFTER_IN_PARENT = (
    lambda: connections.let_go(),  # noqa: PLW0108
    lambda: process_id.note(),  # noqa: PLW0108
    process_id.lock.release,
    job_lock.release,
    ends.lock.release,
)
_AFTER_IN_CHILD = (
    # First, before anything could be collected, or be done with what is inherited.
    lambda: connections.bury(),  # noqa: PLW0108
    lambda: process_id.note(),  # noqa: PLW0108
    process_id.lock.release,
    job_lock.release,
    lambda: ends.close_inherited(),  # noqa: PLW0108
    ends.lock.release,
)

# Hooks cannot be taken back, so a reload of this module registers none. Whoever forks in
# C and goes on with Python has them called too (docs.python.org/3/c-api/sys.html,
# "PyOS_AfterFork_Child").
if "_is_registered" not in globals() and hasattr(os, "register_at_fork"):
    for _hook in reversed(_BEFORE):  # the last registered is called first
        os.register_at_fork(before=_hook)
    for _hook in _AFTER_IN_PARENT:
        os.register_at_fork(after_in_parent=_hook)
    for _hook in _AFTER_IN_CHILD:
        os.register_at_fork(after_in_child=_hook)
_is_registered = True
