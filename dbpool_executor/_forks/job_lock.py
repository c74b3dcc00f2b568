"""The lock that all jobs of a process share, and what a fork does with it.

Runs in every process that has channels, at each fork of it.
"""

from __future__ import annotations

import os
import threading

job_lock = threading.RLock()
"""Guards every job's fast path: its state, and that it has no condition yet."""

if hasattr(os, "register_at_fork"):
    # Not while another thread has it: in the child it would have it for ever. Before a
    # fork the last registered come first, so the lock of `ends`, which imports this
    # module, is taken before this one: who has that may collect garbage, and cancel the
    # jobs of a forgotten map().
    os.register_at_fork(
        before=job_lock.acquire,
        after_in_parent=job_lock.release,
        after_in_child=job_lock.release,
    )
