"""The pauses of garbage collection, and what they leave behind."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, create_engine

from dbpool_executor._forks.connections import freeze, living
from dbpool_executor._forks.gc_pause import counted_as_old
from waiting import LONGEST


@pytest.fixture(autouse=True)
def nothing_frozen() -> Iterator[None]:
    """What a test freezes is frozen for that test alone."""
    gc.unfreeze()
    yield
    gc.unfreeze()


def test_what_is_made_in_the_block_is_old_after_it() -> None:
    """And it is collected as ever when it becomes garbage."""
    with counted_as_old():
        assert not gc.isenabled()
        made: list[object] = []
        made.append(made)
    assert gc.isenabled()
    assert any(each is made for each in gc.get_objects(generation=2))
    assert gc.get_freeze_count() == 0


def test_what_the_program_has_frozen_stays_so() -> None:
    """Servers that fork freeze what their children have in common."""
    gc.freeze()
    frozen = gc.get_freeze_count()
    with counted_as_old():
        pass
    assert gc.get_freeze_count() == frozen
    assert gc.isenabled()


def test_what_is_frozen_by_the_package_is_found_all_the_same() -> None:
    """A job may make an executor of its own, for which all engines are looked at."""
    engine = create_engine("sqlite://")
    freeze()
    assert not any(each is engine for each in gc.get_objects())
    assert any(each is engine for each in living(Engine))


def test_what_a_forkserver_has_imported_is_frozen() -> None:
    """So its workers have it in common, and none of them looks for garbage there."""
    program = (
        "import dbpool_executor._worker.main, dbpool_executor._launch.last_preload, gc, sqlalchemy\n"
        "print(gc.isenabled(), any(o is vars(sqlalchemy) for o in gc.get_objects()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=LONGEST,
    )
    assert done.stdout.split() == ["True", "False"]
