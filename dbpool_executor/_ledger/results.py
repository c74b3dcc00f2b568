"""How results become the text that a ledger keeps, and come back.

Runs in both processes.
"""

from __future__ import annotations

import base64
import enum
import json
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from ..errors import NotStorableError


class Stored(enum.Enum):
    """What stands for the result of a job that was not run again."""

    STORED = "stored"


STORED: Final = Stored.STORED
"""The result of a skipped job, where the ledger keeps no results."""


class Encoding(NamedTuple):
    """A way to keep results.

    Attributes:
        dumps: Gives the text of a result; None where there is nothing to keep. Raises
            NotStorableError.
        loads: Gives the result of a text.
    """

    dumps: Callable[[object], str | None]
    loads: Callable[[str | None], Any]


class Kept:
    """Results on their way to the parent, as the ledger has them.

    It pickles as what makes the results of their texts, so that the parent unpickles the
    very values that a job which is skipped later gives.

    Args:
        results: The encoding, as ``Ledger(results=...)`` names it.
        texts: One for each call.
        is_chunk: Whether a list of results is wanted.
    """

    def __init__(
        self, results: str | None, texts: Sequence[str | None], *, is_chunk: bool
    ) -> None:
        self._results = results
        self._texts = tuple(texts)
        self._is_chunk = is_chunk

    def __reduce__(self) -> tuple[Any, ...]:
        if self._is_chunk:
            return _many, (self._results, self._texts)
        return _one, (self._results, *self._texts)


def _one(results: str | None, text: str | None) -> Any:
    return ENCODINGS[results].loads(text)


def _many(results: str | None, texts: Sequence[str | None]) -> list[Any]:
    return [ENCODINGS[results].loads(text) for text in texts]


def _dumps_json(value: object) -> str | None:
    if value is None:
        return None
    _check_json("result", value, set())
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _loads_json(text: str | None) -> Any:
    return None if text is None else json.loads(text)


def _check_json(place: str, value: object, above: set[int]) -> None:
    """Find what json.dumps() would refuse, or would give back as something else."""
    if value is None or isinstance(value, (bool, int, str)):
        # An enumeration's member would come back as its value.
        if isinstance(value, enum.Enum):
            raise NotStorableError(place, type(value), "return its value")
        return
    if isinstance(value, float):
        if not math.isfinite(value):
            raise NotStorableError(place, repr(value), "return None or a string")
        return
    if id(value) in above:
        raise NotStorableError(place, "a reference to what holds it", "return a tree")
    above.add(id(value))
    if isinstance(value, Mapping) and isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str) or isinstance(key, enum.Enum):
                what = f"a key of {place}"
                raise NotStorableError(what, type(key), "use strings as keys")
            _check_json(f"{place}[{key!r}]", item, above)
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            _check_json(f"{place}[{number}]", item, above)
    else:
        raise NotStorableError(
            place,
            type(value),
            'return what JSON has, such as str(value), or use Ledger(results="pickle")',
        )
    above.discard(id(value))


def _dumps_pickle(value: object) -> str | None:
    return None if value is None else base64.b64encode(pickle.dumps(value, 5)).decode()


def _loads_pickle(text: str | None) -> Any:
    return None if text is None else pickle.loads(base64.b64decode(text))


def _dumps_nothing(_value: object) -> None:
    return None


def _loads_nothing(_text: str | None) -> Any:
    return STORED


ENCODINGS: Mapping[str | None, Encoding] = {
    "json": Encoding(_dumps_json, _loads_json),
    "pickle": Encoding(_dumps_pickle, _loads_pickle),
    None: Encoding(_dumps_nothing, _loads_nothing),
}
"""By what ``Ledger(results=...)`` is given."""
