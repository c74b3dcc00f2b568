"""An engine's cache of compiled statements, bounded by their size as well.

Runs in a worker.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Engine
from sqlalchemy.util import LRUCache

_MOST = 1 << 24  # characters of SQL, several times as many bytes of memory


class _BoundedCache(LRUCache[Any, Any]):
    """Lets go of the statements that were used least, also when they are few and long.

    SQLAlchemy bounds their number alone ("SQL Compilation Caching"): several hundred
    with long texts take more memory than all the rest of a worker.
    """

    __slots__ = ("_size",)

    def __init__(self, like: LRUCache[Any, Any]) -> None:
        super().__init__(like.capacity, like.threshold, like.size_alert)
        self._size = 0

    def __setitem__(self, key: Any, compiled: Any) -> None:
        size = _size_of(compiled)
        if self._size + size > _MOST:
            self._shrink()
        self._size += size
        super().__setitem__(key, compiled)

    def _shrink(self) -> None:
        # By what it holds now: those it has too many of, it lets go of by itself.
        oldest = sorted(self._data.values(), key=lambda item: item[2][0])
        self._size = sum(_size_of(compiled) for _, compiled, _ in oldest)
        for key, compiled, _ in oldest:
            if self._size <= _MOST // 2:
                break
            self._size -= _size_of(compiled)
            self._data.pop(key, None)


def _size_of(compiled: Any) -> int:
    return len(getattr(compiled, "string", None) or "")


def bound_statement_cache(engine: Engine) -> None:
    """Bound the statements that an engine keeps; one with a cache of its own is let be.

    Args:
        engine: Just made.
    """
    cache = engine._compiled_cache
    if type(cache) is LRUCache and not len(cache):
        engine._compiled_cache = _BoundedCache(cache)
