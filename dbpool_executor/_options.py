"""The options of a single job, which never ride in the job's own keywords.

Runs in both processes.
"""

from __future__ import annotations

import functools
import pickle
from typing import NamedTuple


class JobOptions(NamedTuple):
    """How one job is run.

    Attributes:
        commit: Whether the worker commits when the job returns. If not, the job
            commits for itself, and what it leaves uncommitted is rolled back.
    """

    commit: bool = True


DEFAULTS = JobOptions()


def dumps_options(options: JobOptions) -> tuple[bytes, ...]:
    """Encode options as message parts: none for the defaults."""
    return () if options == DEFAULTS else (pickle.dumps(tuple(options)),)


@functools.lru_cache(maxsize=64)
def loads_options(*parts: bytes) -> JobOptions:
    """Decode what :func:`dumps_options` encoded."""
    return JobOptions(*pickle.loads(parts[0])) if parts else DEFAULTS
