"""Says which SQL statements may commit a transaction, by a closed list for each database.

Runs in both processes. A commit is excluded, not detected: a statement that is not on the
list of its database may commit. So may a string with several statements, unless each of
them is on it. Only the beginning of a statement is read, and where it ends, in a time
that is linear in its length.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable
from typing import NamedTuple


class Effect(enum.IntEnum):
    """What a statement may do to its transaction, the least first."""

    READS = 0  # it neither commits nor counts as work that could be lost
    WRITES = 1  # it cannot commit
    WRITES_ALONE = 2  # it commits if no transaction is open: SQLite alone has it
    COMMITS = 3  # or may, for all that is known


class Grammar(NamedTuple):
    """What is known of the SQL of a database.

    Attributes:
        reads: Beginnings of the statements that do not write, a regular expression.
        writes: Of those that write and cannot commit.
        writes_alone: Of those that commit if no transaction is open.
        is_postgresql: Whether its lexical rules are PostgreSQL's.
        is_mysql: Whether they are MySQL's.
    """

    reads: str
    writes: str
    writes_alone: str = "(?!)"
    is_postgresql: bool = False
    is_mysql: bool = False


_SQL = Grammar(
    r"SELECT|VALUES|SHOW|EXPLAIN|SAVEPOINT|RELEASE|ROLLBACK",
    r"INSERT|UPDATE|DELETE|MERGE|WITH",
)

_POSTGRESQL = Grammar(
    r"SELECT|VALUES|TABLE|SHOW|EXPLAIN(?!.*\bANALY[SZ]E\b)|FETCH|MOVE|CLOSE|DECLARE"
    r"|SAVEPOINT|RELEASE|ROLLBACK|ABORT|SET|RESET|DISCARD|DEALLOCATE|LOCK|LISTEN"
    r"|UNLISTEN|NOTIFY|LOAD|BEGIN|START",
    # The drivers begin a transaction before the first of them, and inside it the server
    # refuses VACUUM and its like, and a COMMIT in a procedure or a DO block (PostgreSQL
    # documentation, "CALL" and "DO").
    r"INSERT|UPDATE|DELETE|MERGE|WITH|COPY|CREATE|ALTER|DROP|TRUNCATE|COMMENT|GRANT"
    r"|REVOKE|REFRESH|REINDEX|CLUSTER|ANALYZE|VACUUM|IMPORT|SECURITY|REASSIGN|CALL|DO"
    r'|EXECUTE|PREPARE\s+(?!TRANSACTION\b)[\w"]|EXPLAIN',
    is_postgresql=True,
)

# MariaDB documentation, "SQL statements that cause an implicit commit", names what must
# not be here. A stored function cannot commit; a procedure can.
_MYSQL = Grammar(
    r"SELECT|VALUES|TABLE|SHOW|DESC|DESCRIBE|EXPLAIN|HELP|SAVEPOINT|RELEASE|ROLLBACK|USE"
    r"|DO|SET\b(?!.*\b(?:AUTOCOMMIT|PASSWORD|STATEMENT|ROLE|GLOBAL|PERSIST|RESOURCE"
    r"|PERSIST_ONLY)\b)",
    r"INSERT|UPDATE|DELETE|REPLACE|WITH|LOAD\s+DATA"
    r"|CREATE\s+(?:OR\s+REPLACE\s+)?TEMPORARY\s+TABLE|DROP\s+TEMPORARY\s+TABLE",
    is_mysql=True,
)

# What reads, and what is set for a connection and not for the file (sqlite.org/pragma.html).
_HARMLESS_PRAGMA = (
    r"PRAGMA\s+(?:\w+\s*\.\s*)?(?:(?:table_x?info|table_list|index_list|index_x?info"
    r"|foreign_key_list|foreign_key_check|foreign_keys|integrity_check|quick_check"
    r"|database_list|busy_timeout|cache_size|synchronous|temp_store|query_only|mmap_size"
    r"|recursive_triggers|case_sensitive_like|defer_foreign_keys|read_uncommitted"
    r"|threads|trusted_schema|cell_size_check|automatic_index|analysis_limit)\b"
    r"|(?!incremental_vacuum|optimize)\w+\s*(?:;\s*)?\Z)"
)
_SQLITE = Grammar(
    rf"SELECT|VALUES|EXPLAIN|BEGIN|ROLLBACK|SAVEPOINT|ATTACH|DETACH|{_HARMLESS_PRAGMA}"
    # It is of the connection, which is given back to the pool as it is.
    r"|CREATE\s+TEMP(?:ORARY)?",
    # Before these alone the sqlite3 module begins a transaction (Python documentation,
    # "sqlite3", "Transaction control").
    r"INSERT|UPDATE|DELETE|REPLACE",
    r"CREATE|DROP|ALTER|ANALYZE|REINDEX|VACUUM|PRAGMA|WITH",
)

# It does not hear of a ROLLBACK that it has not sent itself, and begins no transaction
# after it: the next statement would be committed.
_PSYCOPG2 = _POSTGRESQL._replace(
    reads=_POSTGRESQL.reads.replace(
        "ROLLBACK|ABORT", r"ROLLBACK(?:\s+(?:WORK|TRANSACTION))?\s+TO"
    )
)

_GRAMMARS = {
    "psycopg2": _PSYCOPG2,
    "postgresql": _POSTGRESQL,
    "duckdb": _POSTGRESQL,
    "mysql": _MYSQL,
    "mariadb": _MYSQL,
    "sqlite": _SQLITE,
}

# Of several in one string each must be one of these: after a ROLLBACK among them the
# rest would be outside the transaction.
_AMONG_OTHERS = re.compile(
    r"(?:SELECT|VALUES|INSERT|UPDATE|DELETE|MERGE|WITH)\b"
    r"|(?:SET|CREATE|ALTER|DROP|TRUNCATE|COMMENT|GRANT|REVOKE|LOCK)\b",
    re.IGNORECASE,
)

_LARGE = 4_000  # characters: what is larger is not kept
_KEPT = 512  # statements

_SPACE = re.compile(r"[\s(]*+")
_SPACE_TO_SEMICOLON = re.compile(r"[\s;]*+")
_BLOCK_ENDS = re.compile(r"/\*|\*/")
_LINE_ENDS = re.compile(r"\n"), re.compile(r"[\r\n]")
_DOLLAR_QUOTE = re.compile(r"\$(?:[^\W\d]\w*)?\$")


def _up_to_next(string: str, *, backquotes: bool = True) -> re.Pattern[str]:
    """Match up to what has to be looked at: a semicolon, a comment, a dollar.

    No quantifier gives back what it took, so the time is linear.
    """
    backquoted, special = ("|`[^`]*+`", "`") if backquotes else ("", "")
    return re.compile(
        rf"(?:[^'\"{special};/#$-]++|{string}{backquoted}|/(?!\*)|-(?!-))*+",
        re.DOTALL,
    )


_QUOTED = r"'[^']*+'|\"[^\"]*+\""
_ESCAPING = r"'(?:[^'\\]++|\\.)*+'"
_E_STRING = r"(?<=[^\w$][eE])'(?:[^'\\]++|\\.|'')*+'"
_STANDARD = _up_to_next(_QUOTED)
_MYSQL_ESCAPING = _up_to_next(rf"{_ESCAPING}|\"(?:[^\"\\]++|\\.)*+\"")
# By what the setting standard_conforming_strings may be.
_POSTGRESQL_STANDARD = _up_to_next(
    rf"{_E_STRING}|(?<![^\w$][eE]){_QUOTED}|\"[^\"]*+\"", backquotes=False
)
_POSTGRESQL_ESCAPING = _up_to_next(rf"{_ESCAPING}|\"[^\"]*+\"", backquotes=False)
# The verb of a WITH, and not a function replace(), a string, or FOR UPDATE.
_WRITES_IN_WITH = re.compile(
    r"(?<![\w'\"`.])(?<!FOR )(?<!KEY )(?:INSERT|UPDATE|DELETE|MERGE|REPLACE)"
    r"(?![\w'\"`]|\s*\()",
    re.IGNORECASE,
)


def effect_on(dialect: str, driver: str = "") -> Callable[[str], Effect]:
    """Give the function that says what a statement may do on a database.

    Args:
        dialect: The name of SQLAlchemy's dialect. One that is not known has the closed
            list of standard SQL.
        driver: The name of its driver, where one has a list of its own.
    """
    grammar = _GRAMMARS.get(driver) or _GRAMMARS.get(dialect, _SQL)
    found_by_text: dict[str, Effect] = {}
    lists = [
        (re.compile(rf"(?:{words})(?![\w$])", re.IGNORECASE | re.DOTALL), effect)
        for words, effect in (
            (grammar.reads, Effect.READS),
            (grammar.writes, Effect.WRITES),
            (grammar.writes_alone, Effect.WRITES_ALONE),
        )
    ]
    is_known = dialect in _GRAMMARS

    def effect_of(statement: str) -> Effect:
        effect = found_by_text.get(statement)
        if effect is None:
            effect = judge(statement)
            if len(statement) <= _LARGE:
                if len(found_by_text) >= _KEPT:
                    found_by_text.clear()
                found_by_text[statement] = effect
        return effect

    def judge(statement: str) -> Effect:
        if grammar.is_mysql and ("/*!" in statement or "/*M!" in statement):
            return Effect.COMMITS  # what stands in such a comment is executed
        if not is_known and "commit" in statement.lower():
            return Effect.COMMITS  # T-SQL needs no semicolon between two statements
        starts = statement_starts(statement, grammar)
        if not starts:
            return Effect.READS if starts is not None else Effect.COMMITS
        if len(starts) > 1 and any(
            _AMONG_OTHERS.match(statement, start) is None for start in starts
        ):
            return Effect.COMMITS
        return max(judge_one(statement, start) for start in starts)

    def judge_one(statement: str, start: int) -> Effect:
        for beginning, effect in lists:
            if beginning.match(statement, start):
                # Of the sqlite3 module too: a WITH that only reads begins nothing.
                if (
                    effect is not Effect.READS
                    and statement[start : start + 4].upper() == "WITH"
                    and _WRITES_IN_WITH.search(statement, start) is None
                ):
                    return Effect.READS
                return effect
        return Effect.COMMITS

    return effect_of


def statement_starts(text: str, grammar: Grammar) -> list[int] | None:
    """Find where the statements of a string begin, comments before them aside.

    Args:
        text: What is sent.
        grammar: Of the database.

    Returns:
        A position for each of them, empty ones aside; None if that cannot be told.
    """
    first = _first_start(text, 0, grammar)
    if first is None or first == len(text):
        return None if first is None else []
    # Most have none, and then nobody need know how the server reads the rest.
    semicolon = text.find(";", first)
    if semicolon < 0 or _is_blank(text, semicolon):
        return [first]
    # Whether a backslash escapes a quote is for the server's settings to say.
    readings = [_POSTGRESQL_STANDARD if grammar.is_postgresql else _STANDARD]
    if "\\" in text:
        if grammar.is_mysql and '"' in text:
            return None  # ANSI_QUOTES is one more setting
        readings.append(
            _POSTGRESQL_ESCAPING if grammar.is_postgresql else _MYSQL_ESCAPING
        )
    found = [_starts(text, first, grammar, reading) for reading in readings]
    return found[0] if found[0] == found[-1] else None


def _is_blank(text: str, position: int) -> bool:
    match = _SPACE_TO_SEMICOLON.match(text, position)
    return match is not None and match.end() == len(text)


def _starts(
    text: str, start: int, grammar: Grammar, up_to_next: re.Pattern[str]
) -> list[int] | None:
    starts = [start]
    position = start
    while True:
        match = up_to_next.match(text, position)
        assert match is not None  # noqa: S101 - it matches nothing, too
        position = match.end()
        if position == len(text):
            return starts
        character = text[position]
        if character == ";":
            following = _first_start(text, position + 1, grammar)
            if following is None:
                return None
            if following == len(text):
                return starts
            position = following
            if text[position] != ";":
                starts.append(position)
        elif character == "$" and grammar.is_postgresql:
            position = _after_dollar(text, position)
        elif character in "'\"`":
            return None  # it does not end
        elif character == "$":
            position += 1
        else:
            after = _after_comment(text, position, grammar)
            if after is None:
                return None
            position = max(after, position + 1)
        if position < 0:
            return None


def _first_start(text: str, position: int, grammar: Grammar) -> int | None:
    """Skip space, comments and opening parentheses; None if a comment does not end."""
    while True:
        match = _SPACE.match(text, position)
        assert match is not None  # noqa: S101 - it matches nothing, too
        position = match.end()
        after = _after_comment(text, position, grammar)
        if after is None:
            return None
        if after == position:
            return position
        position = after


def _after_comment(text: str, position: int, grammar: Grammar) -> int | None:
    """Give the end of the comment at a position, or the position if there is none."""
    if text.startswith("--", position):
        following = text[position + 2 : position + 3]
        if grammar.is_mysql and following and not following.isspace():
            return position  # two minus signs
        return _line_end(text, position, _LINE_ENDS[grammar.is_postgresql])
    if grammar.is_mysql and text.startswith("#", position):
        return _line_end(text, position, _LINE_ENDS[grammar.is_postgresql])
    if not text.startswith("/*", position):
        return position
    if not grammar.is_postgresql:
        end = text.find("*/", position + 2)
        return None if end < 0 else end + 2
    depth = 1
    position += 2
    while depth:
        match = _BLOCK_ENDS.search(text, position)
        if match is None:
            return None
        depth += 1 if match.group() == "/*" else -1
        position = match.end()
    return position


def _line_end(text: str, position: int, ends: re.Pattern[str]) -> int:
    match = ends.search(text, position)
    return len(text) if match is None else match.end()


def _after_dollar(text: str, position: int) -> int:
    """Skip a string in dollar quotes, or one dollar; -1 if the string does not end."""
    match = _DOLLAR_QUOTE.match(text, position)
    if match is None or (
        position and (text[position - 1].isalnum() or text[position - 1] in "_$")
    ):
        return position + 1
    end = text.find(match.group(), match.end())
    return -1 if end < 0 else end + len(match.group())
