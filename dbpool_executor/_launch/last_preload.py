"""Ends the preloads of a forkserver: imported as the last of them.

Runs in the parent of all workers, never in a worker or in the program itself.
"""

import multiprocessing.sharedctypes  # noqa: F401 - of which each phase record is
import signal

from .._forks.connections import freeze

freeze()

if hasattr(signal, "pthread_sigmask"):
    # A Ctrl-C that came meanwhile is for the program, which has had its own.
    if hasattr(signal, "sigtimedwait"):
        signal.sigtimedwait({signal.SIGINT}, 0)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
