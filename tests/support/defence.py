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
    from dbpool_executor._api import executor
    from dbpool_executor._forks import connections
    from dbpool_executor._launch import local
    from dbpool_executor._worker import main, transaction

    def nothing(*_args: object, **_options: object) -> None:
        pass

    connections.hold = nothing
    connections.bury = nothing
    transaction.refuse_inherited = nothing
    executor.prepare = nothing
    local.prepare_fork = nothing
    main.bury_inherited = list
