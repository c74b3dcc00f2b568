"""The log records of a worker, on their way to the parent's handlers.

Runs in a worker, and is imported only if records are forwarded. Each record is sent as it
is made, so those of a job are handled before its future is done, and those of a worker
that dies are not lost with it.
"""

from __future__ import annotations

import logging
import logging.handlers
import os
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from queue import SimpleQueue

from .._wire.logs import Levels


class Forwarder(logging.handlers.QueueHandler):
    """Sends records to the parent.

    Args:
        send: Sends one, as a pickle.

    Attributes:
        uninterrupted: Keeps the time limit of a job out of a message that is half sent.
    """

    def __init__(self, send: Callable[[bytes], object]) -> None:
        super().__init__(queue=SimpleQueue())  # enqueue() has no use for one
        self._send = send
        self._pid = os.getpid()
        self.uninterrupted: Callable[[], AbstractContextManager[None]] = nullcontext

    def enqueue(self, record: logging.LogRecord) -> None:
        """Send a record."""
        if self._pid != os.getpid():
            return  # a copy that a job has forked, which has no channel
        try:
            data = pickle.dumps(record.__dict__)
        except Exception:
            # What the program has added to it does not pickle.
            plain = logging.makeLogRecord({}).__dict__.keys() | {"message"}
            known = {k: v for k, v in record.__dict__.items() if k in plain}
            data = pickle.dumps(known)
        with self.uninterrupted():
            self._send(data)

    def take_over(self, levels: Levels) -> None:
        """Have all records of this process sent, and handled nowhere else.

        Args:
            levels: What the parent's loggers let through.
        """
        manager = logging.root.manager
        for logger in [logging.root, *manager.loggerDict.values()]:
            if isinstance(logger, logging.Logger):
                # Inherited by a fork. They are the parent's to call, and to close.
                logger.handlers = []
                logger.propagate = True
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        logging.root.addHandler(self)
        logging.captureWarnings(capture=True)
