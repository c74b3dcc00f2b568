"""Takes the package's defence away, to show that the tests of inheritance need it.

Set ``DBPOOL_TEST_WITHOUT_DEFENCE=1`` and run them: programs that fork by themselves
never import the package, and the executor forks whatever is open. Imports no pytest.
"""

from __future__ import annotations

import os

SWITCH = "DBPOOL_TEST_WITHOUT_DEFENCE"


def is_taken_away() -> bool:
    """Whether the tests are to run without the package's defence."""
    return os.environ.get(SWITCH, "0") not in ("", "0")


def take_away() -> None:
    """Make all that the package does against inheritance do nothing in this process."""
    # Here and not above: programs that must not know the package import this module.
    from dbpool_executor import (
        _database,
        _executor,
        _inheritance,
        _local,
        _worker,
    )

    def nothing(*_args: object, **_options: object) -> None:
        pass

    _inheritance._before_fork = nothing
    _inheritance._after_fork_in_child = nothing
    _database.refuse_inherited = nothing
    _executor.prepare = nothing
    _local.prepare_fork = nothing
    _worker.bury_inherited = list
