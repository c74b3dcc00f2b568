"""The levels of loggers on their way to workers, and what comes back from there.

Runs in both processes.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping

from .calls import Buffer

Levels = Mapping[str, int]
"""The levels that were set, by the names of their loggers; the root's is empty."""

log = logging.getLogger("dbpool_executor")


def levels_set() -> Levels:
    """Give the levels of this process's loggers, for its workers."""
    loggers = logging.root.manager.loggerDict.items()
    found = {
        n: g.level for n, g in loggers if isinstance(g, logging.Logger) and g.level
    }
    return {"": logging.root.level, **found}


def handle_record(data: Buffer) -> None:
    """Hand a worker's record to the handlers of this process; never raises."""
    try:
        record = logging.makeLogRecord(pickle.loads(data))
        logger = logging.getLogger(record.name)
        if logger.isEnabledFor(record.levelno):
            logger.handle(record)
    except Exception:
        log.warning("a log record of a worker was lost", exc_info=True)
