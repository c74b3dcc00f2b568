"""What ``submit()`` returns.

Runs in the parent.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import TypeVar

from ..errors import Outcome

T = TypeVar("T")


class JobFuture(Future[T]):
    """The future of a job, which also tells what happened to its transaction.

    Returned by ``submit()``; not to be made by anybody else.
    """

    __slots__ = ()

    @property
    def outcome(self) -> Outcome | None:
        """What is known of the job's transaction; None until the future is done.

        COMMITTED for a job that returned, also after a rollback of its own. With
        ``commit=False`` or AUTOCOMMIT only if every transaction that it began was seen
        to be committed, else UNKNOWN. NEVER_STARTED for one that was cancelled. For one
        that raised, what :func:`outcome_of` says of the exception.
        """
        raise NotImplementedError
