"""Which tests make up the lean suite: what runs unless ``--all`` asks for everything.

Most tests are parametrized by the database, that is by its drivers, by how workers
start, and some besides by what happens. Every combination takes a quarter of an hour on
two cores. Of each test function the lean suite takes

- each case on each kind of database, once: by way of one driver, with one start method;
- each start method at least once;
- of one that is marked ``heavy``, which takes seconds, one combination.

Drivers and start methods take turns, so that each has its share. A file that is named on
the command line runs with everything.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping
from typing import NamedTuple

_DATABASES = ("database", "wired", "both")
_START_METHODS = ("start_method", "method")


class Test(NamedTuple):
    """What the choice depends on.

    Attributes:
        function: The file and the function.
        case: What happens, wherever the data is and however workers start.
        database: Its driver, such as ``postgresql-psycopg``; empty if there is no choice.
        start_method: Of its workers; empty if there is no choice.
        is_heavy: Whether one of its combinations is enough.
    """

    function: str
    case: Hashable = ()
    database: str = ""
    start_method: str = ""
    is_heavy: bool = False

    @property
    def kind(self) -> str:
        """The kind of database, such as ``postgresql``."""
        return self.database.partition("-")[0]


def test_of(
    nodeid: str, params: Mapping[str, object], *, is_heavy: bool = False
) -> Test:
    """Describe a test that pytest has collected.

    Args:
        nodeid: Its file, function and parameters' names.
        params: Its parameters.
        is_heavy: Whether it is marked so.
    """
    databases = [str(params[name]) for name in _DATABASES if name in params]
    methods = [str(params[name]) for name in _START_METHODS if name in params]
    others = params.keys() - {*_DATABASES, *_START_METHODS}
    case = frozenset((name, _comparable(params[name])) for name in others)
    function = nodeid.partition("[")[0]
    return Test(function, case, "".join(databases), "".join(methods), is_heavy)


def _comparable(value: object) -> Hashable:
    return value if isinstance(value, str | int | None) else id(value)


def choose(tests: Iterable[Test]) -> set[int]:
    """Choose the lean suite.

    Args:
        tests: All of them.

    Returns:
        The numbers of those that are in it.
    """
    every = list(tests)
    groups: defaultdict[Hashable, list[int]] = defaultdict(list)
    for number, test in enumerate(every):
        what = () if test.is_heavy else (test.case, test.kind)
        groups[test.function, what].append(number)
    chosen: set[int] = set()
    drivers: Counter[str] = Counter()
    methods: Counter[tuple[str, str]] = Counter()

    def take(number: int) -> None:
        test = every[number]
        chosen.add(number)
        drivers[test.database] += 1
        methods[test.function, test.start_method] += 1

    def uses(number: int) -> tuple[int, int]:
        test = every[number]
        return methods[test.function, test.start_method], drivers[test.database]

    for group in groups.values():
        take(min(group, key=uses))
    for number, test in enumerate(every):
        if not (test.is_heavy or methods[test.function, test.start_method]):
            take(number)
    return chosen
