"""A log whose handlers and filters may raise.

Runs in the parent. What they raise in the dispatcher's thread would end it, and with it
all jobs.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Any


class GuardedLog(logging.LoggerAdapter[logging.Logger]):
    """Logs, and drops a record if a handler or a filter of the program raises.

    Args:
        logger: To which the records go.
    """

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__(logger, None)

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        """Log as a logger does; never raises."""
        with suppress(BaseException):  # to tell of it would take a log
            # The frame that is named as the place is the caller's, not this one.
            super().log(level, msg, *args, stacklevel=2, **kwargs)


log = GuardedLog(logging.getLogger("dbpool_executor"))
