"""Comparison of plain data, against numpy.isclose and by cases that must differ."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tlcourse.plain_data import NotPlainError, compare, describe, from_json, to_json, to_plain

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        (1, 1),
        (1, 1.0),  # a whole number where a floating one is expected
        (1.0 + 1e-9, 1.0),
        (NAN, NAN),
        (-INF, -INF),
        (True, True),
        (None, None),
        ("a", "a"),
        (np.float32(0.5), 0.5),
        (np.array(2.0), 2.0),
        (torch.tensor(2.0), 2.0),
        (torch.tensor([1.0, 2.0], requires_grad=True), np.array([1.0, 2.0])),
        (torch.tensor([1.5], dtype=torch.bfloat16), np.array([1.5])),
        (np.array([1, 2]), np.array([1.0, 2.0])),
        (np.array([1, 2], dtype=np.int32), np.array([1, 2], dtype=np.int64)),
        (np.array([NAN, INF]), np.array([NAN, INF])),
        (np.array(["a", "b"]), np.array(["a", "b"])),
        (np.zeros((0, 3)), np.zeros((0, 3))),
        ((1, 2), [1, 2]),
        ({"a": [1, {"b": 2.0}]}, {"a": [1, {"b": 2.0}]}),
    ],
)
def test_equal_values_agree(got: object, expected: object) -> None:
    assert compare(to_plain(got), to_plain(expected)) is None


@pytest.mark.parametrize(
    ("got", "expected", "words"),
    [
        (1, True, "expected a bool"),
        (True, 1, "yours is a bool"),
        (1.0, 1, "whole number"),
        (1.001, 1.0, "expected 1, yours is 1.001"),
        (NAN, 1.0, "yours is nan"),
        (1.0, NAN, "expected nan"),
        (INF, 1e308, "yours is inf"),
        (None, 1.0, "yours is None"),
        ("1", 1, "expected an int (1), yours is a str"),
        ("a", "b", "expected 'b', yours is 'a'"),
        ([1, 2], [1, 2, 3], "expected 3 items, yours has 2"),
        ([1, 2], [1, 3], "at [1]: expected 3"),
        ({"a": 1}, {"b": 1}, "keys ['b'], yours are ['a']"),
        ({"a": [1, 2.5]}, {"a": [1, 2.0]}, "at ['a'][1]: expected 2"),
        ([1.0], np.array([1.0]), "numpy.array(...)"),
        (np.zeros((2, 1)), np.zeros(2), "expected shape (2,), yours has shape (2, 1)"),
        (np.array(["1"]), np.array([1]), "expected integer entries"),
        (np.array([1.0]), np.array([1]), "yours are float64"),
        (np.array([1, 0]), np.array([True, False]), "expected bool entries"),
        (np.array([[1.0, 2]]), np.array([[1.0, 2.1]]), "[0, 1]: expected 2.1, yours is 2 (1 of"),
        (np.array([NAN]), np.array([0.0]), "yours is nan"),
    ],
)  # fmt: skip
def test_different_values_differ(got: object, expected: object, words: str) -> None:
    difference = compare(to_plain(got), to_plain(expected))
    assert words in str(difference)


def test_tolerance_is_that_of_numpy() -> None:
    rng = np.random.default_rng(0)
    expected = rng.normal(size=500)
    got = expected * (1 + rng.normal(size=500) * 1e-3)
    for a, b in zip(got, expected, strict=True):
        agree = compare(a.item(), b.item(), rtol=1e-3, atol=1e-5) is None
        assert agree == np.isclose(a, b, rtol=1e-3, atol=1e-5)


class Everything(float):
    """Equal to all: the kind of object that beats a check made of asserts."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (object(), "an object"),
        (Everything(1.0), "an Everything"),
        ([1, {2}], "a set at [1]"),
        ({"a": {1: 2}}, "dict key 1 at ['a']"),
        (np.array([object()]), "dtype object"),
        (np.array([1j]), "dtype complex128"),
        (lambda: 1, "a function"),
        ([10**5000], "beyond 64 bits"),
    ],
)
def test_what_is_not_plain_is_refused(value: object, words: str) -> None:
    with pytest.raises(NotPlainError) as info:
        to_plain(value)
    assert words in str(info.value)


def test_endless_list_is_refused() -> None:
    endless: list = []
    endless.append(endless)
    with pytest.raises(NotPlainError, match="nested deeper"):
        to_plain(endless)


def test_copies_do_not_share_memory() -> None:
    array, tensor = np.zeros(3), torch.zeros(3)
    plain = to_plain([array, tensor])
    array[:], tensor[:] = 1, 1
    assert compare(plain, [np.zeros(3), np.zeros(3, dtype=np.float32)]) is None


@pytest.mark.parametrize(
    "value",
    [
        None, True, 3, -1.5, NAN, "text", [], {}, {"array": 1, "dict": {"array": []}},
        np.arange(6, dtype=np.int16).reshape(2, 3), np.array(1.5), np.zeros((2, 0)),
        np.array([True]), np.array(["a", "bc"]), np.arange(3, dtype=">f8"),
        [np.array([NAN, INF], dtype=np.float32), {"x": [1]}],
    ],
)  # fmt: skip
def test_json_round_trip(value: object) -> None:
    plain = to_plain(value)
    back = from_json(json.loads(json.dumps(to_json(plain))))
    assert compare(back, plain, rtol=0, atol=0) is None
    if isinstance(value, np.ndarray) and value.dtype.kind != "U":
        assert back.dtype.itemsize == value.dtype.itemsize


@pytest.mark.parametrize(
    "data",
    [
        {"object": 1},
        {"array": {"dtype": "|O8", "shape": [1], "base64": "AAAAAAAAAAA="}},
        {"array": {"dtype": "<f8", "shape": [2], "base64": "AAAAAAAAAAA="}},
        {"array": {"dtype": "<f8", "shape": [-1], "base64": ""}},
        {"array": {"dtype": "<f8", "shape": [1], "base64": 7}},
        {"array": {"dtype": "U", "shape": [1], "text": [1]}},
        {"array": {"dtype": "<f8", "shape": [10**12], "base64": ""}},
        {"array": []},
        10**30,
    ],
)
def test_forged_json_is_refused(data: object) -> None:
    with pytest.raises(ValueError, match=r"array|plain"):
        from_json(data)


def test_description_has_shape_and_stays_short() -> None:
    text = describe(np.ones((300, 300), dtype=np.float32))
    assert "(shape (300, 300), float32)" in text and len(text) < 300
    assert len(describe("x" * 10_000)) < 400
