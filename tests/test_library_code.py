"""Code and documentation of the standard library, and how texts become blocks."""

import ast

import pytest
import torch

from tlcourse.docstrings import package_prose, place
from tlcourse.language_modelling import pack
from tlcourse.language_models import load_tokeniser
from tlcourse.library_code import functions_of, library_styles

SOURCE = '''
"""A module."""
import os  # imported

def f(x):
    """What f does."""
    # a comment
    return x  # the end

class A:
    """A class."""

    def g(self):
        """Only a docstring."""

    async def h(self):
        def inside(): pass
        return inside
'''


def test_functions_lose_docstrings_and_comments_and_nothing_else(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(SOURCE, encoding="utf-8")
    assert functions_of(path) == [
        "def f(x):\n    return x",
        "def g(self):\n    pass",
        "async def h(self):\n\n    def inside():\n        pass\n    return inside",
    ]


def test_a_file_that_does_not_parse_is_an_error(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("def f(:", encoding="utf-8")
    with pytest.raises(SyntaxError):
        functions_of(path)


def test_both_styles_are_large_enough_and_no_text_is_in_two_splits():
    styles = library_styles()
    texts = {part: [text for file in files for text in file] for part, files in styles.items()}
    assert set(texts) == {"train code", "val code", "test code", "val docs", "test docs"}
    assert len(texts["train code"]) > 1_500 and all(len(x) > 150 for x in texts.values())
    for text in texts["test code"][::20]:
        ast.parse(text)
    # Short methods ("def __enter__(self): return self") stand in many files; long ones do not.
    long = {part: {text for text in x if len(text) > 400} for part, x in texts.items()}
    assert not long["test code"] & long["train code"] and not long["test docs"] & long["val docs"]


def test_a_place_depends_on_the_name_alone():
    places = [place(f"module_{n}.py") for n in range(2_000)]
    assert min(places) >= 0 and max(places) < 1
    assert sum(p < 0.25 for p in places) == pytest.approx(500, abs=60)
    assert place("json/decoder.py") == pytest.approx(0.2312, abs=1e-4)


def test_prose_between_two_places_is_that_part_of_the_whole():
    whole = [(f, p) for f, p in package_prose(("joblib",)) if 0.2 <= place(f) < 0.6]
    part = list(package_prose(("joblib",), 0.2, 0.6))
    assert part and set(whole) <= set(part)


def test_pack_puts_an_end_before_the_first_and_behind_each_text():
    tokenizer = load_tokeniser("docgpt").tokenizer
    end, texts = tokenizer.eos_token_id, ["Return the sum.", "Return the mean."]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    expected = [end, *ids[0], end, *ids[1], end]
    packed = pack(texts, tokenizer, 3)
    assert packed.shape == ((len(expected) - 1) // 3, 4)
    assert packed[:, :-1].flatten().tolist() == expected[: 3 * len(packed)]
    assert torch.equal(packed[1:, 0], packed[:-1, -1]), "a block ends where the next begins"


@pytest.mark.parametrize("texts", [[], ["Return"]])
def test_pack_refuses_what_does_not_fill_a_block(texts):
    with pytest.raises(ValueError, match="do not fill a block of 64"):
        pack(texts, load_tokeniser("docgpt").tokenizer, 64)
