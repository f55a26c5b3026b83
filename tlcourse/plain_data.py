"""Plain data: what goes into a graded question and what comes out of an answer.

Plain data is None, bool, int, float, str, NumPy arrays of these, and lists and
string-keyed dicts of plain data. Nothing else crosses from a learner's code to a grade: no
object with its own idea of equality, no pickle.
"""

from __future__ import annotations

import base64
import math
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

# NumPy's letters for the kinds of entries that count as plain.
_KINDS = {"b": "bool", "i": "integer", "u": "integer", "f": "floating", "U": "text"}
_MAX_DEPTH = 20


@dataclass(frozen=True)
class Difference:
    """The first place where an answer departs from what was expected.

    Attributes:
        place: path into the value, such as ``['loss'][0, 2]``; empty for the whole value.
        reason: one sentence that says what differs there.
    """

    place: str
    reason: str

    def __str__(self) -> str:
        return f"at {self.place}: {self.reason}" if self.place else self.reason


class NotPlainError(TypeError):
    """A value that is not plain data; the message names its type and place."""


def to_plain(value: Any, place: str = "", depth: int = 0) -> Any:
    """Copy a value into plain data.

    Torch tensors are detached and become arrays (bfloat16 becomes float32), NumPy scalars
    become Python numbers, tuples become lists.

    Raises:
        NotPlainError: if the value, or something inside it, is not plain; names the place.
    """
    if value is None or type(value) in (bool, int, float, str):
        if type(value) is int and not _fits(value):
            raise NotPlainError(f"an int beyond 64 bits{_at(place)}")
        return value
    if depth > _MAX_DEPTH:
        raise NotPlainError(f"nested deeper than {_MAX_DEPTH} levels{_at(place)}")
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    if isinstance(value, np.generic | np.ndarray):
        array = np.array(value, subok=False)
        if array.dtype.kind not in _KINDS:
            raise NotPlainError(f"array of dtype {array.dtype}{_at(place)}; expected numbers")
        if array.dtype.kind == "f" and array.dtype.itemsize > 8:
            array = array.astype(np.float64)
        return array.item() if isinstance(value, np.generic) else array
    if isinstance(value, list | tuple):
        return [to_plain(v, f"{place}[{i}]", depth + 1) for i, v in enumerate(value)]
    if isinstance(value, dict):
        for key in value:
            if type(key) is not str:
                raise NotPlainError(f"dict key {key!r}{_at(place)}; expected keys of type str")
        return {k: to_plain(v, f"{place}[{k!r}]", depth + 1) for k, v in value.items()}
    raise NotPlainError(f"{_type_name(value)}{_at(place)}; expected numbers, arrays, text or lists")


def to_json(value: Any) -> Any:
    """Plain data -> what ``json.dumps`` takes; :func:`from_json` gives the same data back."""
    if isinstance(value, np.ndarray):
        shape = list(value.shape)
        if value.dtype.kind == "U":
            return {"array": {"dtype": "U", "shape": shape, "text": value.ravel().tolist()}}
        little = value.astype(value.dtype.newbyteorder("<"))
        data = base64.b64encode(little.tobytes()).decode("ascii")
        return {"array": {"dtype": little.dtype.str, "shape": shape, "base64": data}}
    if isinstance(value, dict):
        return {"dict": {key: to_json(item) for key, item in value.items()}}
    if isinstance(value, list):
        return [to_json(item) for item in value]
    return value


def from_json(data: Any, depth: int = 0) -> Any:
    """The inverse of :func:`to_json`; safe on data that comes from an untrusted process.

    Raises:
        ValueError: if the data is not something :func:`to_json` makes.
    """
    if depth > _MAX_DEPTH:
        raise ValueError(f"nested deeper than {_MAX_DEPTH} levels")
    if data is None or type(data) in (bool, float, str) or (type(data) is int and _fits(data)):
        return data
    if type(data) is list:
        return [from_json(item, depth + 1) for item in data]
    if type(data) is dict and set(data) == {"dict"} and type(data["dict"]) is dict:
        return {key: from_json(item, depth + 1) for key, item in data["dict"].items()}
    if type(data) is dict and set(data) == {"array"} and type(data["array"]) is dict:
        return _array_from_json(data["array"])
    raise ValueError(f"not plain data in JSON: {_short(data)}")


def compare(got: Any, expected: Any, rtol: float = 1e-6, atol: float = 1e-8) -> Difference | None:
    """Compare two values of plain data.

    Numbers agree when ``|got - expected| <= atol + rtol * |expected|``; NaN agrees with NaN.
    Whole numbers are accepted where floating ones are expected, not the other way round;
    True is not 1. A number and an array of shape () count as the same thing.

    Returns:
        None if they agree, else the first difference.
    """
    return _compare(got, expected, rtol, atol, "")


def describe(value: Any) -> str:
    """One short text for a value; arrays with shape and dtype, long ones abbreviated."""
    if isinstance(value, np.ndarray):
        with np.printoptions(precision=6, threshold=24, edgeitems=2, suppress=False):
            text = np.array2string(value, separator=", ", prefix="array(", max_line_width=88)
        return f"array({text}) (shape {value.shape}, {value.dtype})"
    return _short(value)


def _compare(got: Any, expected: Any, rtol: float, atol: float, place: str) -> Difference | None:
    if isinstance(expected, np.ndarray) or isinstance(got, np.ndarray):
        return _compare_arrays(got, expected, rtol, atol, place)
    if isinstance(expected, list):
        if not isinstance(got, list):
            return Difference(place, f"expected a list, yours is {_type_name(got)}")
        if len(got) != len(expected):
            return Difference(place, f"expected {len(expected)} items, yours has {len(got)}")
        pairs = [
            (f"{place}[{i}]", g, e) for i, (g, e) in enumerate(zip(got, expected, strict=True))
        ]
        return _first(pairs, rtol, atol)
    if isinstance(expected, dict):
        if not isinstance(got, dict):
            return Difference(place, f"expected a dict, yours is {_type_name(got)}")
        if set(got) != set(expected):
            keys, yours = sorted(expected), sorted(got)
            return Difference(place, f"expected the keys {keys}, yours are {yours}")
        return _first([(f"{place}[{k!r}]", got[k], expected[k]) for k in expected], rtol, atol)
    if _is_number(expected) and _is_number(got):
        if isinstance(expected, int) and isinstance(got, float):
            return Difference(place, f"expected a whole number (int), yours is the float {got!r}")
        if _close(got, expected, rtol, atol):
            return None
    elif type(got) is type(expected) and got == expected:
        return None
    if type(got) is not type(expected) and not (_is_number(expected) and _is_number(got)):
        want, have = _type_name(expected), _type_name(got)
        return Difference(place, f"expected {want} ({_short(expected)}), yours is {have}")
    return Difference(place, f"expected {_short(expected)}, yours is {_short(got)}")


def _first(pairs: list[tuple[str, Any, Any]], rtol: float, atol: float) -> Difference | None:
    for place, got, expected in pairs:
        difference = _compare(got, expected, rtol, atol, place)
        if difference is not None:
            return difference
    return None


def _compare_arrays(
    got: Any, expected: Any, rtol: float, atol: float, place: str
) -> Difference | None:
    a, b = _as_array(got), _as_array(expected)
    if a is None or b is None:
        return Difference(
            place, f"expected {_type_name(expected)}, yours is {_type_name(got)}{_array_hint(got)}"
        )
    if a.shape != b.shape:
        return Difference(place, f"expected shape {b.shape}, yours has shape {a.shape}")
    kind_a, kind_b = _KINDS[a.dtype.kind], _KINDS[b.dtype.kind]
    if kind_a != kind_b and (kind_a, kind_b) != ("integer", "floating"):
        return Difference(place, f"expected {kind_b} entries ({b.dtype}), yours are {a.dtype}")
    if kind_b == "floating":
        wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
        bad = ~np.isclose(wide_a, wide_b, rtol=rtol, atol=atol, equal_nan=True)
    else:
        bad = a != b
    if not np.any(bad):
        return None
    index = tuple(int(i) for i in np.argwhere(bad)[0])
    where = f"[{', '.join(map(str, index))}]" if index else ""
    want, have = _short(b[index].item()), _short(a[index].item())
    count = f" ({np.count_nonzero(bad)} of {bad.size} entries differ)" if bad.size > 1 else ""
    return Difference(place + where, f"expected {want}, yours is {have}{count}")


def _array_from_json(fields: dict[str, Any]) -> np.ndarray:
    shape, letters = fields.get("shape"), fields.get("dtype")
    if type(shape) is not list or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"array shape must be a list of sizes, got {_short(shape)}")
    size = math.prod(shape)
    if letters == "U" and set(fields) == {"dtype", "shape", "text"}:
        text = fields["text"]
        if type(text) is not list or len(text) != size or any(type(t) is not str for t in text):
            raise ValueError(f"array of text must hold {size} strings, got {_short(text)}")
        return np.array(text, dtype=np.str_).reshape(shape)
    if type(letters) is not str or set(fields) != {"dtype", "shape", "base64"}:
        raise ValueError(f"array must have dtype, shape and base64, got {sorted(fields)}")
    allowed = ("|b1", "|i1", "|u1", *(f"<{k}{n}" for k in "iuf" for n in (2, 4, 8)))
    if letters not in allowed:
        raise ValueError(f"array dtype must be one of {allowed}, got {letters!r}")
    if type(fields["base64"]) is not str:
        raise ValueError(f"array base64 must be text, got {_short(fields['base64'])}")
    raw = base64.b64decode(fields["base64"], validate=True)
    dtype = np.dtype(letters)
    if len(raw) != size * dtype.itemsize:
        raise ValueError(f"array needs {size * dtype.itemsize} bytes, got {len(raw)}")
    return np.frombuffer(raw, dtype=dtype).reshape(shape).copy()


def _as_array(value: Any) -> np.ndarray | None:
    if isinstance(value, np.ndarray):
        return value
    return np.asarray(value) if type(value) in (bool, int, float) else None


def _fits(value: int) -> bool:
    return -(2**63) <= value < 2**64


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _close(got: float, expected: float, rtol: float, atol: float) -> bool:
    if isinstance(expected, int) and isinstance(got, int):
        return got == expected
    if math.isnan(expected) or math.isnan(got):
        return math.isnan(expected) and math.isnan(got)
    if math.isinf(expected) or math.isinf(got):
        return expected == got
    return abs(got - expected) <= atol + rtol * abs(expected)


def _array_hint(got: Any) -> str:
    return "; numpy.array(...) makes an array of it" if isinstance(got, list) else ""


def _type_name(value: Any) -> str:
    if value is None:
        return "None"
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape}"
    name = type(value).__name__
    return f"an {name}" if name[0].lower() in "aeiou" else f"a {name}"


def _at(place: str) -> str:
    return f" at {place}" if place else ""


def _short(value: Any) -> str:
    if type(value) is int and not _fits(value):
        return "an int beyond 64 bits"
    text = f"{value:.7g}" if type(value) is float else repr(value)
    return text if len(text) <= 300 else text[:150] + " ... " + text[-100:]
