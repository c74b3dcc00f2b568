"""The lean suite: what it takes of all tests."""

from __future__ import annotations

from itertools import product

import lean

DATABASES = [
    "sqlite",
    "postgresql-psycopg",
    "postgresql-psycopg2",
    "mariadb-pymysql",
    "mariadb-mysqldb",
]
METHODS = ["fork", "forkserver", "spawn"]


def chosen(tests):
    """Give those that are chosen, in order."""
    tests = list(tests)
    return [tests[number] for number in sorted(lean.choose(tests))]


def test_each_case_is_taken_on_each_kind_of_database_once():
    """By way of one driver, with one start method, which take turns."""
    every = [
        lean.Test("one", case, database, method)
        for case, database, method in product(range(4), DATABASES, METHODS)
    ]
    found = chosen(every)
    assert len(found) == 4 * 3
    assert {(t.case, t.kind) for t in found} == {(t.case, t.kind) for t in every}
    assert {test.database for test in found} == set(DATABASES)
    assert {test.start_method for test in found} == set(METHODS)


def test_each_start_method_is_taken():
    """Also where there are fewer databases than start methods, or none."""
    every = [lean.Test("one", start_method=method) for method in METHODS]
    every += [lean.Test("two", (), "sqlite", method) for method in METHODS]
    assert chosen(every) == every


def test_drivers_take_turns_from_function_to_function():
    """A function with one case does not take them all."""
    every = [
        lean.Test(function, (), database)
        for function, database in product(["one", "two"], DATABASES)
    ]
    found = chosen(every)
    assert len(found) == 2 * 3
    assert {test.database for test in found} == set(DATABASES)


def test_one_combination_is_taken_of_what_is_heavy():
    """And all of what has no combinations."""
    every = [lean.Test("one", (), "sqlite", m, is_heavy=True) for m in METHODS]
    every += [lean.Test("two", case) for case in range(3)]
    assert chosen(every) == [every[0], *every[3:]]


def test_parameters_say_what_the_choice_depends_on():
    """The rest of them is the case; two values that are alike are one."""
    value = ["not hashable"]
    tests = [
        lean.test_of(f"f.py::one[{n}]", {"database": name, "value": value, "n": 1})
        for n, name in enumerate(DATABASES)
    ]
    assert {test.function for test in tests} == {"f.py::one"}
    assert [test.database for test in tests] == DATABASES
    assert len({test.case for test in tests}) == 1
    assert lean.test_of("f.py::two[1]", {"method": "fork"}).start_method == "fork"
