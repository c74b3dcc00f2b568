"""A module that no worker can import."""

from __future__ import annotations

import multiprocessing

from sqlalchemy import Engine, create_engine

if multiprocessing.parent_process() is not None:
    raise ImportError("a worker cannot import this")


def make_engine() -> Engine:
    """Make an engine that no worker will have."""
    return create_engine("sqlite://")
