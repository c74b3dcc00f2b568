"""Checks what an executor is made with, so that bad input fails at once.

Runs in the parent.
"""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing.context import (
    BaseContext,
    get_spawning_popen,
    set_spawning_popen,
)
from multiprocessing.reduction import ForkingPickler
from typing import Any, cast

from sqlalchemy import URL, Engine, create_engine, make_url

from .._dispatch.starts import StartLimits
from .._ledger.ledger import Ledger
from .._wire.calls import pack_call
from .._wire.locate import asyncio_classes, full_name, innermost
from .._wire.picklers import by_value_pickler, is_interactive, with_code
from ..errors import NotPlainError

_FORMS = (
    "pass a URL, or a function that is defined at the top level of a module:\n\n"
    "    def make_engine():\n"
    "        return create_engine(url)\n\n"
    "    DBPoolExecutor(make_engine)"
)


def factory_of(
    engine_factory: Callable[[], Engine] | str | URL,
) -> Callable[[], Engine]:
    """Give the callable that an executor's first argument stands for.

    Args:
        engine_factory: A callable, or a URL that stands for ``create_engine(url)``.

    Raises:
        TypeError: It is an Engine, cannot be called, or does not pickle.
        ValueError: The URL names an asynchronous driver.
        sqlalchemy.exc.ArgumentError: The URL cannot be parsed.
    """
    if isinstance(engine_factory, (Engine, *asyncio_classes("AsyncEngine"))):
        raise TypeError(
            f"engine_factory is {engine_factory!r}, whose connections cannot cross "
            f"into a worker; {_FORMS}"
        )
    if isinstance(engine_factory, (str, URL)):
        url = make_url(engine_factory)
        if url.get_dialect().is_async:
            raise ValueError(
                f"engine_factory is the URL {url!r}, whose driver is asynchronous; a "
                "job runs without an event loop: name a synchronous driver"
            )
        return partial(create_engine, url)
    if not callable(engine_factory):
        raise TypeError(
            f"engine_factory is a {full_name(type(engine_factory))}, which cannot be "
            f"called; {_FORMS}"
        )
    check_pickles("engine_factory", engine_factory)
    return engine_factory


def check_pickles(name: str, value: object) -> None:
    """Refuse what could not be sent to a worker.

    Raises:
        TypeError: It does not pickle.
    """
    try:
        with_code(value, _dumps_as_at_a_start)
    except Exception as exc:
        place, culprit, advice = _culprit_in(name, value)
        raise TypeError(
            f"{name} cannot be sent to a worker: {place} is a "
            f"{full_name(type(culprit))} that does not pickle ({exc}); {advice}"
        ) from exc


class _Start:
    """Stands in for the start of a process, when multiprocessing's locks do pickle."""

    @staticmethod
    def duplicate_for_child(descriptor: int) -> int:
        return descriptor

    DupFd = duplicate_for_child


def _dumps_as_at_a_start(value: object) -> bytes:
    outer = get_spawning_popen()
    set_spawning_popen(cast("Any", _Start()))
    try:
        return bytes(ForkingPickler.dumps(value))
    finally:
        set_spawning_popen(outer)


def _pickles(value: object) -> bool:
    try:
        with_code(value, _dumps_as_at_a_start)
    except Exception:
        return False
    return True


def _culprit_in(name: str, value: object) -> tuple[str, object, str]:
    # Only where something fails: it imports much that no program needs.
    from .._wire.instead import instead_of

    known = partial(instead_of, is_result=False)
    found = innermost(
        lambda inner: not _pickles(inner), {name: value}, lambda v: bool(known(v))
    )
    place, culprit = found or (name, value)
    if type(culprit).__module__.startswith("multiprocessing."):
        advice = "make it by the context that is mp_context, such as mp_context.Lock()"
    elif name == "engine_factory":
        advice = _FORMS + _or_install("\n\nor")
    else:
        advice = known(culprit) or _top_level()
    return place, culprit, advice


def _top_level() -> str:
    return "define it at the top level of a module that the worker can import" + (
        _or_install(", or")
    )


def _or_install(text: str) -> str:
    if by_value_pickler(calls=True) is not None:
        return ""
    return f"{text} install dbpool-executor[cloudpickle]"


def check_reachable(name: str, value: object) -> None:
    """Refuse what workers would look for in a main module that they cannot import.

    Raises:
        TypeError: It is a function or class of a notebook, of the prompt or of
            ``python -c``, and cloudpickle is not installed.
    """
    if by_value_pickler(calls=True) is not None or not is_interactive():
        return
    if b"__main__" in _dumps_as_at_a_start(value):
        raise TypeError(
            f"{name} is made of something that is defined in a main module which "
            f"workers cannot import; {_top_level()}"
        )


def check_session_options(
    options: Mapping[str, Any] | Callable[[Engine], Mapping[str, Any]] | None,
) -> dict[str, Any] | Callable[[Engine], Mapping[str, Any]]:
    """Refuse what would tie a worker's sessions to another process's engine.

    Args:
        options: Keyword arguments for ``sessionmaker``; or a callable that gives them
            in a worker, where it may make engines.

    Raises:
        TypeError: They name an engine or a connection, or are neither.
    """
    if options is None:
        return {}
    if callable(options):
        return options
    try:
        pack_call(dict, (), dict(options))
    except NotPlainError as exc:
        place = exc.place.replace("kwargs", "session_options", 1)
        raise TypeError(
            f"{place} is a {exc.type_name}; leave it out, the sessions of a worker use "
            "what the engine factory makes there; or pass a function of that engine "
            "which makes others and returns the options"
        ) from None
    except Exception:  # noqa: S110 - under fork it need not pickle
        pass
    return dict(options)


def check_ledger(ledger: object) -> Ledger | None:
    """Refuse what is no ledger.

    Raises:
        TypeError: It is something else.
    """
    if ledger is None or isinstance(ledger, Ledger):
        return ledger
    raise TypeError(
        f"ledger is a {full_name(type(ledger))}; pass dbpool_executor.Ledger(name), or "
        "leave it out"
    )


def check_context(context: object) -> BaseContext:
    """Refuse what is not a context of multiprocessing.

    Raises:
        TypeError: It is something else, such as the name of a start method.
    """
    if not isinstance(context, BaseContext):
        raise TypeError(
            f"mp_context is {context!r}; pass multiprocessing.get_context(name) for a "
            "start method, or leave it out"
        )
    return context


def check_count(name: str, value: object) -> int:
    """Refuse what is not a number of things.

    Raises:
        TypeError: It is not an integer.
        ValueError: It is below 1.
    """
    if not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, not {full_name(type(value))}")
    if value < 1:
        raise ValueError(f"{name} must be greater than 0, not {value}")
    return value


def check_start_limits(start_timeout: object, connect_patience: object) -> StartLimits:
    """Refuse what are no numbers of seconds.

    Raises:
        TypeError: One is no number.
        ValueError: One is infinite or below 0, or ``start_timeout`` is 0.
    """
    for name, value in (
        ("start_timeout", start_timeout),
        ("connect_patience", connect_patience),
    ):
        if value is None and name == "start_timeout":
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number of seconds, not {value!r}")
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be a number of seconds, not {value!r}")
    if start_timeout == 0:
        raise ValueError("start_timeout must be more than 0; None is for no bound")
    return StartLimits(
        cast("float | None", start_timeout), cast("float", connect_patience)
    )


def default_max_workers() -> int:
    """Give the number of processors that this process may use."""
    count: Callable[[], int | None] = getattr(os, "process_cpu_count", os.cpu_count)
    return count() or 1


def default_context() -> BaseContext:
    """Give the start method that inherits least.

    Never fork, which a program's default can have become without anyone choosing it:
    before Python 3.14 the first ``multiprocessing.Queue()`` fixes it.
    """
    methods = multiprocessing.get_all_start_methods()
    chosen = multiprocessing.get_start_method(allow_none=True)
    spawns = chosen == "spawn" or "forkserver" not in methods
    return multiprocessing.get_context("spawn" if spawns else "forkserver")
