"""Plain values come back equal, or are refused by name."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint import CorruptCheckpoint, InvalidState, objects

keys = st.one_of(st.text(), st.integers(), st.booleans(), st.none(), st.tuples(st.integers(), st.text()))
leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.binary(), st.just("$")
)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(st.one_of(st.text(), st.just("$")), inner, max_size=4),
        st.dictionaries(keys, inner, max_size=4),
    ),
    max_leaves=12,
)


def exactly(left: object, right: object) -> bool:
    """Equality that tells tuple from list, True from 1 and 0.0 from -0.0."""
    return repr(left) == repr(right)


@given(values)
def test_a_plain_value_comes_back_as_itself(value):
    assert exactly(objects.decode(objects.encode(value, "v"), "v"), value)


def test_nan_comes_back():
    assert math.isnan(objects.decode(objects.encode({"loss": math.nan}, "v"), "v")["loss"])


def test_the_text_is_strict_json():
    assert b"NaN" not in objects.encode([math.nan, math.inf], "v")
    assert objects.encode({"b": 1, "a": [True, None, 1.5]}, "v") == b'{"b":1,"a":[true,null,1.5]}'


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"a": [1, {2, 3}]}, r"objects\['a'\]\[1\]: is a set"),
        ((1, object()), r"objects\[1\]: is a object"),
        ({"f": print}, r"objects\['f'\]: is a builtin_function_or_method"),
    ],
)
def test_a_value_that_is_not_plain_is_refused_by_its_place(value: object, place: str):
    with pytest.raises(InvalidState, match=place):
        objects.encode(value, "objects")


def test_what_no_json_text_can_hold_is_refused_by_its_place():
    with pytest.raises(InvalidState, match=r"objects\['name'\]: has half of a surrogate pair"):
        objects.encode({"name": "\ud800"}, "objects")
    with pytest.raises(InvalidState, match=r"objects\['seeds'\]\[1\]: has 14001 bits; allowed are 14000; pass bytes"):
        objects.encode({"seeds": [2**13_999, -(2**14_000)]}, "objects")
    assert objects.decode(objects.encode(2**14_000 - 1, "objects"), "file.json") == 2**14_000 - 1


@pytest.mark.parametrize(
    "text",
    [
        b"{",
        b"\xff",
        b'{"$": "exec", "value": 1}',
        b'{"$": ["list"], "value": 1}',
        b'{"$": "tuple"}',
        b'{"$": "bytes", "value": "@"}',
        b'{"$": "float", "value": "x"}',
        b'{"$": "dict", "value": [[1]]}',
        b'{"$": "dict", "value": [[[], 1]]}',
        b"[" * 100_000,
    ],
)
def test_a_malformed_text_is_refused(text: bytes):
    with pytest.raises(CorruptCheckpoint, match=r"file\.json: "):
        objects.decode(text, "file.json")
