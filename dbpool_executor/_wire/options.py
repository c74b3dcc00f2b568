"""The options of a single job, which never ride in the job's own keywords.

Runs in both processes. Durations are seconds.
"""

from __future__ import annotations

import functools
import math
import pickle
from typing import Any, NamedTuple


class JobOptions(NamedTuple):
    """How one job is run; see :meth:`DBPoolExecutor.options` for what each means."""

    commit: bool = True
    timeout: float | None = None
    kill_after: float = 5.0
    retries: int = 0
    isolation_level: str | None = None
    read_only: bool = False
    resolve: bool = False
    keyed: bool = False  # the keys ride beside the call

    def with_(self, **changes: Any) -> JobOptions:
        """Give these options with those changes that are not None.

        Raises:
            TypeError: A value is of the wrong kind.
            ValueError: A number is out of range, or two options exclude each other.
        """
        options = self._replace(
            **{name: value for name, value in changes.items() if value is not None}
        )
        options._check()
        return options

    def _check(self) -> None:
        for name in ("commit", "read_only", "resolve"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False")
        for name, least in (("timeout", 0), ("kill_after", 0)):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number of seconds, not {value!r}")
            if not (value >= least and math.isfinite(value)) or (
                name == "timeout" and value == 0
            ):
                raise ValueError(f"{name} must be a positive number, not {value!r}")
        if isinstance(self.retries, bool) or not isinstance(self.retries, int):
            raise TypeError(f"retries must be an integer, not {self.retries!r}")
        if self.retries < 0:
            raise ValueError(f"retries must be 0 or more, not {self.retries}")
        if self.isolation_level is not None and not isinstance(
            self.isolation_level, str
        ):
            raise TypeError("isolation_level must be a string, such as 'SERIALIZABLE'")
        if self.keyed and (
            not self.commit
            or self.read_only
            or (self.isolation_level or "").upper() == "AUTOCOMMIT"
        ):
            raise ValueError(
                "key= excludes commit=False, read_only=True and AUTOCOMMIT: the row of "
                "the key is committed with the job's work, in one transaction"
            )
        if not self.commit and (self.retries or self.resolve):
            raise ValueError(
                "commit=False excludes retries and resolve: of a job that commits for "
                "itself it is not known that it was rolled back"
            )


DEFAULTS = JobOptions()


@functools.lru_cache(maxsize=64)
def dumps_options(options: JobOptions) -> bytes:
    """Encode options: as nothing if they are the defaults."""
    return b"" if options == DEFAULTS else pickle.dumps(tuple(options))


@functools.lru_cache(maxsize=64)
def loads_options(data: bytes) -> JobOptions:
    """Decode what :func:`dumps_options` encoded."""
    return JobOptions(*pickle.loads(data)) if data else DEFAULTS
