"""How a worker hears what its engines do: commits, statements, connections it lends.

Runs in a worker.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, Dialect, Engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.engine.base import OptionEngine
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.pool import Pool, PoolProxiedConnection

from .commit_watch import CommitWatch
from .traits import Traits, traits_of


def hook(watch: CommitWatch | WhileHere, engine: Engine) -> None:
    """Have a watch hear of all that an engine and its views do.

    By the methods of its dialect, through which all of it goes. Dearer are an engine's
    events: with a single listener, SQLAlchemy joins two sets of them anew for each
    connection of each job (benchmarks/README.md).
    """
    dialect, traits = engine.dialect, traits_of(engine.dialect)

    def before(name: str, call: Callable[..., None]) -> None:
        method = getattr(dialect, name)

        def wrapped(*args: Any, **options: Any) -> Any:
            call(*args)
            return method(*args, **options)

        setattr(dialect, name, wrapped)

    def begin(connection: PoolProxiedConnection) -> None:
        watch.before_begin(connection, traits)

    # What each job does goes through as few calls as it can.
    does_nothing = DefaultDialect.do_begin
    if getattr(dialect.do_begin, "__func__", None) is does_nothing:
        vars(dialect)["do_begin"] = begin
    else:
        before("do_begin", begin)
    do_commit, do_rollback = dialect.do_commit, dialect.do_rollback

    def commit(connection: PoolProxiedConnection) -> None:
        watch.before_commit(connection, traits)
        do_commit(connection)
        watch.after_commit_of(connection)

    def rollback(connection: PoolProxiedConnection) -> None:
        written = watch.before_rollback(connection)
        do_rollback(connection)
        if written is not None:
            watch.after_rollback_of(connection, written)

    vars(dialect).update(do_commit=commit, do_rollback=rollback)
    before("set_isolation_level", lambda _on, level, *_: watch.note_level(level))
    if traits.undoes:
        before(
            "do_rollback_to_savepoint",
            lambda on, _name: watch.before_rollback_to_savepoint(on.connection),
        )
    _hook_statements(watch, dialect, traits)
    _hook_lending(watch, engine, traits)
    if traits.undoes:

        def note_undone(context: ExceptionContext) -> None:
            watch.note_undone(context)

        event.listen(engine, "handle_error", note_undone)


def call_for_new_engines(call: Callable[[Engine], None]) -> None:
    """Have a function called with each engine that is made in this process from now on.

    A job may use one beside its session, which nobody else tells of.
    """
    make = Engine.__init__

    @functools.wraps(make)
    def make_and_call(self: Engine, *args: Any, **options: Any) -> None:
        make(self, *args, **options)
        call(self)

    Engine.__init__ = make_and_call  # type: ignore[method-assign]


class WhileHere:
    """A watch that hears only of what is done in the thread that runs jobs.

    Args:
        watch: It.
        is_here: Whether a call comes from there.
    """

    def __init__(self, watch: CommitWatch, is_here: Callable[[], bool]) -> None:
        self._watch = watch
        self._is_here = is_here

    def __getattr__(self, name: str) -> Any:
        """Give a method of the watch, or one that does nothing."""
        return getattr(self._watch, name) if self._is_here() else _do_nothing


def _do_nothing(*_: object) -> None:
    pass


def _hook_statements(
    watch: CommitWatch | WhileHere, dialect: Dialect, traits: Traits
) -> None:
    effect_of = traits.effect_of
    is_between_phases = False  # what is sent there is SQLAlchemy's own

    def execute_by(method: Callable[..., None]) -> Callable[..., None]:
        def execute(cursor: Any, statement: str, *rest: Any, **options: Any) -> None:
            effect = effect_of(statement)
            if not effect or is_between_phases:
                method(cursor, statement, *rest, **options)
                return
            context = options.get("context", rest[-1] if rest else None)
            where = _where(cursor, context)
            is_open = watch.before_statement(effect, where, statement, traits)
            method(cursor, statement, *rest, **options)
            if is_open:
                watch.after_statement(where)

        return execute

    for name in ("do_execute", "do_executemany", "do_execute_no_params"):
        setattr(dialect, name, execute_by(getattr(dialect, name)))

    def twophase(name: str) -> None:
        method = getattr(dialect, name)

        def wrapped(on: Connection, *args: Any, **options: Any) -> None:
            nonlocal is_between_phases
            fairy, written = on.connection, None
            if name == "do_rollback_twophase":
                written = watch.before_rollback(fairy)
            elif name == "do_begin_twophase":
                watch.before_begin(fairy, traits)
            else:
                watch.before_commit(fairy, traits)
            is_between_phases = True
            try:
                method(on, *args, **options)
            finally:
                is_between_phases = False
            if written is not None:
                watch.after_rollback_of(fairy, written)
            if name == "do_commit_twophase":
                watch.after_commit_of(fairy)
            elif name == "do_prepare_twophase":
                watch.after_prepare_of(fairy)
            elif name == "do_rollback_twophase":
                watch.forget_prepared(fairy.dbapi_connection)

        setattr(dialect, name, wrapped)

    for phase in ("begin", "prepare", "rollback", "commit"):
        twophase(f"do_{phase}_twophase")


def _where(cursor: Any, context: Any) -> Any:
    """Give the driver's connection that a statement is sent over."""
    if context is not None:
        return context.root_connection._dbapi_connection.dbapi_connection
    return getattr(cursor, "connection", None)


def listen(watch: CommitWatch, target: Engine | Connection) -> None:
    """Have a watch hear of what an engine does, or one connection, and nobody else.

    Args:
        watch: It.
        target: What it listens to; what others do with the same dialect it does not hear.
    """
    traits = traits_of(target.dialect)
    effect_of = traits.effect_of

    def before(name: str, call: Callable[..., object]) -> None:
        event.listen(target, name, lambda on, *rest: call(on.connection, *rest))

    def statement(
        _on: object, cursor: Any, text: str, _: object, context: Any, *_rest: object
    ) -> None:
        if effect := effect_of(text):
            where = _where(cursor, context)
            if watch.before_statement(effect, where, text, traits):
                looks.append(where)

    def after(*_: object) -> None:
        while looks:
            watch.after_statement(looks.pop())

    looks: list[Any] = []
    before("begin", lambda on: watch.before_begin(on, traits))
    for name in ("commit", "prepare_twophase", "commit_twophase"):
        before(name, lambda on, *_rest: watch.before_untold_commit(on, traits))
    for name in ("rollback", "rollback_twophase"):
        before(name, lambda on, *_rest: watch.before_rollback(on))
    if traits.undoes:
        before(
            "rollback_savepoint",
            lambda on, *_rest: watch.before_rollback_to_savepoint(on),
        )
    event.listen(target, "before_cursor_execute", statement)
    event.listen(target, "after_cursor_execute", after)
    event.listen(
        target,
        "set_connection_execution_options",
        lambda _on, options: watch.note_level(options.get("isolation_level")),
    )
    if isinstance(target, Engine):
        event.listen(
            target,
            "engine_connect",
            lambda on: watch.note_level(
                on.get_execution_options().get("isolation_level")
            ),
        )
        if traits.undoes:
            event.listen(target, "handle_error", watch.note_undone)
        _hook_lending(watch, target, traits)


def _hook_lending(
    watch: CommitWatch | WhileHere, engine: Engine, traits: Traits
) -> None:
    """Have a watch hear when a program, and not SQLAlchemy, gets a driver's connection.

    It may do there what nobody sees.
    """

    class WatchedConnection(engine._connection_cls):  # type: ignore[name-defined,misc]
        @property
        def connection(self) -> PoolProxiedConnection:
            lent: PoolProxiedConnection = super().connection
            if _is_asked_by_a_program():
                watch.note_lent(lent.dbapi_connection, traits)
            return lent

    WatchedConnection.__name__ = WatchedConnection.__qualname__ = "Connection"

    class WatchedView(OptionEngine):
        _connection_cls = WatchedConnection

        def raw_connection(self) -> PoolProxiedConnection:
            return lend(super().raw_connection)

    WatchedView.__name__ = WatchedView.__qualname__ = "OptionEngine"
    WatchedView._option_cls = WatchedView
    raw_connection = engine.raw_connection

    def lend(get: Callable[[], PoolProxiedConnection]) -> PoolProxiedConnection:
        lent = get()
        if _is_asked_by_a_program(3):
            watch.note_lent(lent.dbapi_connection, traits)
        return lent

    def lend_of_pool(pool: Pool) -> Pool:
        connect, recreate = pool.connect, pool.recreate
        vars(pool).update(
            connect=lambda: lend(connect), recreate=lambda: lend_of_pool(recreate())
        )
        return pool

    lend_of_pool(engine.pool)
    vars(engine).update(
        _connection_cls=WatchedConnection,
        _option_cls=WatchedView,
        raw_connection=lambda: lend(raw_connection),
    )


_OURS = ("sqlalchemy.", f"{__package__.partition('.')[0]}.")


def _is_asked_by_a_program(depth: int = 2) -> bool:
    module: str = sys._getframe(depth).f_globals.get("__name__", "")
    return not module.startswith(_OURS)
