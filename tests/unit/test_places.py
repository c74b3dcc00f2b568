"""Where something sits, told as the code that would reach it.

No worker, no database.
"""

from __future__ import annotations

from collections import ChainMap, OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import values
from dbpool_executor._wire.calls import dumps_result, pack_call
from dbpool_executor._wire.locate import full_name, innermost, place_of
from dbpool_executor.errors import NotPlainError
from models import Item
from values import (
    Box,
    Colour,
    FrozenBox,
    ListWithAttributes,
    Pair,
    Slotted,
    SlottedThing,
    Thing,
)

WRAPPERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "alone": (lambda x: x, "result"),
    "dict": (lambda x: {"a": 1, "b": x}, "result['b']"),
    "dict by number": (lambda x: {1: x}, "result[1]"),
    "dict by tuple": (lambda x: {(1, "a"): x}, "result[(1, 'a')]"),
    "dict by quote": (lambda x: {"it's": x}, 'result["it\'s"]'),
    "list": (lambda x: [0, x], "result[1]"),
    "tuple": (lambda x: (0, x), "result[1]"),
    "deque": (lambda x: deque([0, x]), "result[1]"),
    "named tuple": (lambda x: Pair(1, x), "result.right"),
    "dataclass": (Box, "result.content"),
    "frozen dataclass": (FrozenBox, "result.content"),
    "attribute": (lambda x: Thing(name=x), "result.name"),
    "namespace": (lambda x: SimpleNamespace(name=x), "result.name"),
    "slots": (Slotted, "result.content"),
    "slots over a dict": (SlottedThing, "result.content"),
    "ordered dict": (lambda x: OrderedDict(a=x), "result['a']"),
    "default dict": (lambda x: defaultdict(list, a=[x]), "result['a'][0]"),
    "chain map": (lambda x: ChainMap({"a": 1}, {"b": x}), "result['b']"),
    "user dict": (lambda x: UserDict(a=x), "result['a']"),
    "partial": (lambda x: partial(print, 0, x), "result.args[1]"),
    "partial keyword": (lambda x: partial(print, end=x), "result.keywords['end']"),
    "bound method": (lambda x: Thing(name=x).method, "result.__self__.name"),
    "exception": (lambda x: ValueError(1, x), "result.args[1]"),
    "nested": (
        lambda x: {"rows": [0, Box((1, Pair(x, 2)))]},
        "result['rows'][1].content[1].left",
    ),
}


def list_with_attribute(value: object) -> list[Any]:
    """Put something beside the elements of a list."""
    wrapped = ListWithAttributes([1, 2])
    wrapped.extra = value  # type: ignore[attr-defined]
    return wrapped


WRAPPERS["list with attributes"] = (list_with_attribute, "result.extra")


@pytest.mark.parametrize("kind", WRAPPERS)
def test_place_is_the_code_that_reaches_the_value(kind: str) -> None:
    """Whatever holds the value, its place reads as Python and leads to it."""
    wrap, place = WRAPPERS[kind]
    item = Item(id=1)
    result = wrap(item)
    assert place_of(item, {"result": result}) == place
    assert eval(place, {"result": result}) is item


@pytest.mark.parametrize("kind", WRAPPERS)
def test_error_names_the_place(kind: str) -> None:
    """What the search finds is what the refused result is told with."""
    wrap, place = WRAPPERS[kind]
    with pytest.raises(NotPlainError) as caught:
        dumps_result(wrap(Item(id=1)))
    assert caught.value.place == place


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({1, "x"}, "an element of result"),
        (frozenset({"x"}), "an element of result"),
        ({"x": 1}, "a key of result"),
        ([{"x": 1}], "a key of result[0]"),
        ([[], {"x"}], "an element of result[1]"),
    ],
    ids=str,
)
def test_place_without_an_address_is_told_in_words(value: object, place: str) -> None:
    """What no code reaches is an element or a key of something that has a place."""

    def with_item(value: Any) -> Any:
        match value:
            case dict():
                return {with_item(k): v for k, v in value.items()}
            case set() | frozenset() | list():
                return type(value)(with_item(v) for v in value)
            case "x":
                return item
        return value

    item = Item(id=1)
    assert place_of(item, {"result": with_item(value)}) == place


def test_words_and_code_do_not_mix() -> None:
    """An object inside a key is inside the key, not inside the value of another."""
    item = Item(id=1)
    place = place_of(item, {"result": [{FrozenBox(item): 1}]})
    assert place is not None
    # Not "a key of result[0].content", which would be a key of another object.
    assert place.endswith("a key of result[0]") or "(a key of result[0])" in place


def test_value_that_is_not_there_has_no_place() -> None:
    """None, and no guess."""
    assert place_of(Item(id=1), {"result": [Item(id=1), {"a": 1}]}) is None


def test_equal_values_are_not_confused() -> None:
    """The object itself is found, not one that compares equal."""
    wanted: list[int] = []
    assert place_of(wanted, {"result": [[], (), wanted]}) == "result[2]"


def test_first_place_is_told() -> None:
    """Of several places the first that a reader meets."""
    item = Item(id=1)
    result = {"a": [[], [0, item]], "b": item}
    assert place_of(item, {"result": result}) == "result['a'][1][1]"


def test_search_ends_in_cycles() -> None:
    """A value that holds itself is searched once."""
    item = Item(id=1)
    result: list[Any] = [{}]
    result[0]["again"] = result
    result.append(item)
    assert place_of(item, {"result": result}) == "result[1]"
    assert place_of(Item(id=2), {"result": result}) is None


@pytest.mark.parametrize("cls", [values.Hostile, values.HostileMapping])
def test_search_passes_by_what_will_not_be_looked_at(cls: type) -> None:
    """A proxy, say, that raises at every touch but pickles."""
    with pytest.raises(NotPlainError) as caught:
        dumps_result([cls(), Item(id=1)])
    assert caught.value.place == "result[1]"


def test_search_goes_deeper_than_the_stack() -> None:
    """A list nested ten thousand times is no reason to fail."""
    item = Item(id=1)
    result: list[Any] = [item]
    for _ in range(10_000):
        result = [result]
    assert place_of(item, {"result": result}) == "result" + "[0]" * 10_001


def test_arguments_have_places_too() -> None:
    """Positional, by keyword, and inside the function itself."""
    item = Item(id=1)
    calls: list[tuple[Any, Any, Any, str]] = [
        (print, (1, [item]), {}, "args[1][0]"),
        (print, (), {"end": {"a": item}}, "kwargs['end']['a']"),
        (partial(print, item), (), {}, "fn.args[0]"),
        (Box(item).__eq__, (), {}, "fn.__self__.content"),
    ]
    for fn, args, kwargs, place in calls:
        with pytest.raises(NotPlainError) as caught:
            pack_call(fn, args, kwargs)
        assert caught.value.place == place
        assert eval(place, {"fn": fn, "args": args, "kwargs": kwargs}) is item


def test_innermost_culprit_is_the_one_named() -> None:
    """Of all the values that are to blame, the one that holds no other."""
    bad = object()
    values: dict[str, Any] = {"a": [1], "b": {"c": (1, [bad, bad]), "d": bad}}

    def holds_bad(value: object) -> bool:
        return value is bad or place_of(bad, {"": value}) is not None

    assert innermost(holds_bad, values) == ("b['c'][1][0]", bad)


def test_nothing_innermost_where_nothing_is_to_blame() -> None:
    """None if no value is."""
    assert innermost(lambda _: False, {"a": [1], "b": 2}) is None


def test_names_of_classes_are_as_an_import_spells_them() -> None:
    """Module and qualified name; builtins need no module."""
    assert full_name(int) == "int"
    assert full_name(OrderedDict) == "collections.OrderedDict"
    assert full_name(Item) == "models.Item"


# -- A mapped instance anywhere ------------------------------------------------------

KEYS = (
    st.text(max_size=8)
    | st.integers()
    | st.booleans()
    | st.none()
    | st.binary(max_size=4)
    | st.tuples(st.integers(), st.text(max_size=3))
)
LEAVES = KEYS | st.floats() | st.decimals() | st.dates() | st.sampled_from(Colour)


def containers(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Give values that hold other values."""
    return st.one_of(
        st.lists(children, max_size=4),
        st.lists(children, max_size=4).map(tuple),
        st.lists(children, max_size=4).map(deque),
        st.dictionaries(KEYS, children, max_size=4),
        st.builds(Pair, children, children),
        st.builds(Box, children),
        st.builds(FrozenBox, children),
        st.builds(Slotted, children),
        st.builds(Thing, first=children, second=children),
        st.builds(partial, st.just(print), children, end=children),
    )


OTHERS = st.recursive(LEAVES, containers, max_leaves=5)


@st.composite
def values_around(draw: st.DrawFn, inside: object) -> object:
    """Give a value that holds an object somewhere, once, among much else."""
    value = inside
    for _ in range(draw(st.integers(0, 5))):
        before, after = draw(st.lists(OTHERS, max_size=2)), draw(OTHERS)
        match draw(st.integers(0, 8)):
            case 0:
                value = [*before, value, after]
            case 1:
                value = (*before, value, after)
            case 2:
                value = deque([*before, value, after])
            case 3:
                value = {draw(KEYS): after, draw(KEYS): value}
            case 4:
                value = Pair(after, value)
            case 5:
                value = Box(value)
            case 6:
                value = Slotted(value)
            case 7:
                value = Thing(before=before, here=value, after=after)
            case _:
                value = partial(print, *before, value)
    return value


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_mapped_instance_is_found_anywhere(data: st.DataObject) -> None:
    """Evaluated, the place that the error names is the mapped instance itself."""
    item = Item(id=1)
    result = data.draw(values_around(item))
    with pytest.raises(NotPlainError) as caught:
        dumps_result(result)
    assert eval(caught.value.place, {"result": result}) is item
