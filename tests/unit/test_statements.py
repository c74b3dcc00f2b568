"""Which statements may commit, by their text alone."""

from __future__ import annotations

import pytest

from dbpool_executor._drivers.statements import Effect, effect_on

READS, WRITES, ALONE, COMMITS = Effect

STATEMENTS = [
    # Everywhere.
    ("postgresql mysql sqlite oracle", "SELECT 1", READS),
    ("postgresql mysql sqlite oracle", "  select 1 ;\n", READS),
    ("postgresql mysql sqlite oracle", "(SELECT 1) UNION (SELECT 2)", READS),
    ("postgresql mysql sqlite oracle", "SELECT a FROM t FOR UPDATE", READS),
    ("postgresql mysql sqlite oracle", "insert into t values (1)", WRITES),
    ("postgresql mysql sqlite oracle", "/* a */ -- b\n UPDATE t SET n = 1", WRITES),
    ("postgresql mysql sqlite oracle", "DELETE FROM t", WRITES),
    ("postgresql mysql sqlite oracle", "SAVEPOINT sa_savepoint_1", READS),
    ("postgresql mysql oracle", "RELEASE SAVEPOINT a", READS),
    ("postgresql mysql sqlite oracle", "ROLLBACK TO SAVEPOINT a", READS),
    ("postgresql mysql sqlite oracle", "COMMIT", COMMITS),
    ("postgresql mysql sqlite oracle", "/**/ commit and chain", COMMITS),
    ("postgresql mysql sqlite oracle", "FROBNICATE t", COMMITS),
    ("postgresql mysql sqlite oracle", "", READS),
    ("postgresql mysql sqlite oracle", "SELECTED", COMMITS),
    ("postgresql mysql sqlite oracle", "INSERT INTO t VALUES (1); COMMIT", COMMITS),
    ("postgresql mysql sqlite oracle", "WITH a AS (SELECT 1) SELECT * FROM a", READS),
    ("postgresql mysql", "WITH a AS (SELECT 1) UPDATE t SET n = 1", WRITES),
    ("postgresql mysql", "WITH a AS (SELECT 1) SELECT 1 FOR UPDATE", READS),
    (
        "postgresql mysql",
        "WITH a AS (SELECT 'update' AS b) SELECT replace(b, 'a', '')",
        READS,
    ),
    (
        "postgresql mysql",
        "INSERT INTO t VALUES (';'); INSERT INTO t VALUES (1)",
        WRITES,
    ),
    ("postgresql mysql", "INSERT INTO t VALUES ('a;COMMIT')", WRITES),
    ("postgresql mysql", "SELECT 1; -- the end; it is\n", READS),
    ("postgresql mysql", "SELECT 1 /* ; COMMIT */; SELECT 2", READS),
    ("postgresql mysql", "SELECT 1 /* it's */; COMMIT; -- '", COMMITS),
    ("postgresql mysql", "ROLLBACK; DO 1", COMMITS),
    ("postgresql mysql", "SELECT '; COMMIT", COMMITS),
    # A driver that begins no transaction after a ROLLBACK that it has not sent.
    ("psycopg2", "ROLLBACK", COMMITS),
    ("psycopg2", "abort work", COMMITS),
    ("psycopg2", "ROLLBACK WORK TO a", READS),
    ("psycopg2", "ROLLBACK TO SAVEPOINT a", READS),
    ("psycopg2", "SELECT 1", READS),
    ("postgresql", "ROLLBACK", READS),
    ("sqlite", "CREATE TEMP TABLE t (n int)", READS),
    ("sqlite", "CREATE TABLE temp (n int)", ALONE),
    # PostgreSQL.
    ("postgresql duckdb", "CREATE TABLE t (n int)", WRITES),
    ("postgresql", "END", COMMITS),
    ("postgresql", "PREPARE TRANSACTION 'a'", COMMITS),
    ("postgresql", "PREPARE/**/TRANSACTION 'a'", COMMITS),
    ("postgresql", "PREPARE a AS INSERT INTO t VALUES (1)", WRITES),
    ("postgresql", "DO $$ BEGIN INSERT INTO t VALUES (1); COMMIT; END $$", WRITES),
    ("postgresql", "DO $$ BEGIN NULL; END $$; COMMIT", COMMITS),
    ("postgresql", "SELECT $a$ ; COMMIT; $$ $a$", READS),
    ("postgresql", "SELECT a$$ FROM t; COMMIT; SELECT b$$ FROM t", COMMITS),
    ("postgresql", "SELECT $1; SELECT $2", READS),
    ("postgresql", "SELECT $a$ ; COMMIT", COMMITS),
    ("postgresql", "/* a /* b */ COMMIT; */ SELECT 1", READS),
    ("postgresql", "/* a /* b */ */ COMMIT", COMMITS),
    ("postgresql", "SELECT 1 -- a\r; COMMIT", COMMITS),
    ("postgresql", r"SELECT E'\''; COMMIT; --'", COMMITS),
    ("postgresql", r"SELECT E'\'', '\'; COMMIT; --'", COMMITS),
    ("postgresql", r"SELECT E'a''\''; COMMIT; --'", COMMITS),
    ("postgresql", r"SELECT '\'; COMMIT; --'", COMMITS),
    ("postgresql", r"SELECT a FROM t WHERE a LIKE '%\' ESCAPE '\'", READS),
    ("postgresql", "SELECT 1 ` 2; COMMIT; SELECT 1 ` 2", COMMITS),
    ("postgresql", "SELECT 1 # 2; SELECT 3", READS),
    ("postgresql", "EXPLAIN SELECT 1", READS),
    ("postgresql", "EXPLAIN (ANALYZE) DELETE FROM t", WRITES),
    ("postgresql", "CALL p()", WRITES),
    ("postgresql", "SET LOCAL statement_timeout = 1", READS),
    # MySQL and MariaDB.
    ("mysql mariadb", "CREATE TABLE t (n int)", COMMITS),
    ("mysql mariadb", "CREATE TEMPORARY TABLE t (n int)", WRITES),
    ("mysql mariadb", "DROP TEMPORARY TABLE t", WRITES),
    ("mysql mariadb", "/*!50000 CREATE TABLE t (n int) */", COMMITS),
    ("mysql mariadb", "SELECT 1 /*M! ; COMMIT */", COMMITS),
    ("mysql mariadb", "SET STATEMENT max_statement_time = 1 FOR COMMIT", COMMITS),
    ("mysql mariadb", "SET @a = 1, AUTOCOMMIT = 1", COMMITS),
    ("mysql mariadb", "SET DEFAULT ROLE a", COMMITS),
    ("mysql mariadb", "SET SESSION innodb_lock_wait_timeout = 1", READS),
    ("mysql mariadb", "SET TRANSACTION READ ONLY", READS),
    ("mysql mariadb", "CALL p()", COMMITS),
    ("mysql mariadb", "EXECUTE IMMEDIATE 'COMMIT'", COMMITS),
    ("mysql mariadb", "PREPARE p FROM 'COMMIT'", COMMITS),
    ("mysql mariadb", "BACKUP STAGE START", COMMITS),
    ("mysql mariadb", "LOCK TABLES t WRITE", COMMITS),
    ("mysql mariadb", "REPLACE INTO t VALUES (1)", WRITES),
    ("mysql mariadb", "# a\nSELECT 1", READS),
    ("mysql mariadb", "SELECT 5--1; COMMIT", COMMITS),
    ("mysql mariadb", "SELECT 5 -- 1; COMMIT", READS),
    ("mysql mariadb", "/* a /* b */ SELECT 1", READS),
    ("mysql mariadb", r"SELECT '\'; COMMIT; -- '", COMMITS),
    ("mysql mariadb", r"SELECT 'a\\; b'", READS),
    ("mysql mariadb", "SELECT a$$; COMMIT; SELECT b$$", COMMITS),
    ("mysql mariadb", "SELECT `a;b` FROM t", READS),
    # SQLite.
    ("sqlite", "CREATE TABLE t (n int)", ALONE),
    ("sqlite", "WITH a AS (SELECT 1) INSERT INTO t SELECT * FROM a", ALONE),
    ("sqlite", "PRAGMA user_version", READS),
    ("sqlite", "PRAGMA user_version = 5", ALONE),
    ("sqlite", "PRAGMA main.user_version(5)", ALONE),
    ("sqlite", 'PRAGMA main.table_info("t")', READS),
    ("sqlite", "PRAGMA query_only = 1", READS),
    ("sqlite", "PRAGMA optimize", ALONE),
    ("sqlite", "RELEASE SAVEPOINT a", COMMITS),
    ("sqlite", "END", COMMITS),
    ("sqlite", "ATTACH 'b.db' AS b", READS),
    # One that nobody has described.
    ("oracle", "CREATE TABLE t (n int)", COMMITS),
    ("mssql", "INSERT INTO t VALUES (1) COMMIT", COMMITS),
]


@pytest.mark.parametrize(
    ("dialect", "statement", "effect"),
    [
        (d, statement, effect)
        for ds, statement, effect in STATEMENTS
        for d in ds.split()
    ],
)
def test_effect_of_a_statement(dialect: str, statement: str, effect: Effect) -> None:
    """Also when it is asked for a second time."""
    effect_of = effect_on(dialect)
    assert [effect_of(statement), effect_of(statement)] == [effect, effect]


@pytest.mark.parametrize("dialect", ["postgresql", "mysql", "sqlite", "oracle"])
@pytest.mark.parametrize(
    "piece",
    [
        "/* a */ ",
        "-- a\n",
        "# a\n",
        "/*",
        "(",
        ";",
        "$a$ ",
        "'a' ",
        "SELECT 1;",
        "--",
        "\\'",
    ],
)
def test_time_is_linear(dialect: str, piece: str) -> None:
    """A quadratic one would reach the time limit of the test."""
    effect_of = effect_on(dialect)
    for before in ("", "SELECT 1; ", "SELECT 'a"):
        assert effect_of(before + piece * 50_000 + "SELECT 1; SELECT 2") in Effect


def test_large_statements_are_not_kept() -> None:
    """A worker that is sent many of a megabyte does not grow."""
    effect_of = effect_on("postgresql")
    for i in range(20):
        effect_of(f"SELECT {i}" + " " * 1_000_000)
    kept = effect_of.__closure__ or ()
    found = [c.cell_contents for c in kept if isinstance(c.cell_contents, dict)]
    assert found == [{}]
