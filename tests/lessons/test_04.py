"""Exercise 04: the script really has the nine mistakes, and its parts are run as they stand."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tlcourse import locations
from tlcourse.plain_data import compare
from tlcourse.questions import Question, load_questions

FOLDER = locations.lessons_dir() / "04_five_steps"
SOURCE = (FOLDER / "exercise.py").read_text(encoding="utf-8")
QUESTIONS = {question.id: question for question in load_questions(FOLDER / "questions.py")}
MENDS = [question for question in QUESTIONS.values() if not question.manual]


def script() -> dict[int, str]:
    """The script of the exercise: line number -> line."""
    listing = SOURCE.split("# ```text\n")[1].split("# ```")[0]
    rows = re.findall(r"^# ( \d|\d\d)(?:  (.*))?$", listing, flags=re.MULTILINE)
    return {int(number): line for number, line in rows}


def run_lines(first: int, last: int, names: dict) -> dict:
    """Run lines of the script with these names defined; returns the names afterwards."""
    lines = script()
    exec("\n".join(lines[number] for number in range(first, last + 1)), names)
    return names


def model_like(network: torch.nn.Module) -> torch.nn.Module:
    """A network called as those of transformers are: loss is None without labels."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, images, labels=None):
            logits = self.network(images)
            loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
            return SimpleNamespace(logits=logits, loss=loss)

    return Model()


def test_listing_is_numbered_from_1_without_gaps():
    assert list(script()) == list(range(1, 43))


def test_symptoms_run_the_lines_of_the_listing():
    lines = {line.strip() for line in script().values()}
    for name in ("train_model", "test_model"):
        body = SOURCE.split(f"\ndef {name}():\n")[1].split("\n\n")[0].splitlines()
        assert len(body) >= 6
        assert {line.strip() for line in body} <= lines


def test_line_26_gives_no_loss():
    network = torch.nn.Linear(2, 10)
    names = {"torch": torch, "model": model_like(network), "inputs": torch.zeros(3, 2)}
    names = run_lines(22, 29, names | {"num_epochs": 1, "optimizer": None})
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'backward'"):
        names["train_model"]()


def test_line_36_has_no_device_and_line_38_no_list():
    names = {"torch": torch, "model": model_like(torch.nn.Linear(2, 10))}
    names |= {"inputs": torch.zeros(3, 2), "targets": torch.zeros(3, dtype=torch.long)}
    names = run_lines(32, 39, names)
    with pytest.raises(NameError, match="'device'"):
        names["test_model"]()
    names["device"] = "cpu"
    with pytest.raises(AttributeError, match="'Tensor' object has no attribute 'extend'"):
        names["test_model"]()


def test_batch_size_is_defined_and_never_read():
    uses = [number for number, line in script().items() if "batch_size" in line]
    assert uses == [18]


def test_training_and_test_read_the_same_arrays():
    text = "\n".join(script().values())
    assert "inputs.split(" in text and "model(inputs.to(device))" in text
    assert "eval()" not in text


def test_nine_mends_and_each_rejects_the_mistake_of_the_script():
    assert [question.id for question in MENDS] == [f"04.q{number}" for number in range(1, 10)]
    for question in MENDS:
        assert next(iter(question.wrong)).startswith("original"), question.id
        assert len(question.wrong) >= 3


@pytest.mark.parametrize("question", MENDS, ids=lambda question: question.id)
@pytest.mark.parametrize("seed", [1, b"a class secret"])
def test_mends_do_not_depend_on_the_public_cases(question: Question, seed):
    for case in question.draw_cases(seed):
        got, expected = question.run(question.right, case), question.expect(case)
        assert compare(got, expected, question.rtol, question.atol) is None


def test_optimizer_by_the_formula_is_torchs_adamw():
    rng = np.random.default_rng(3)
    theta = rng.normal(size=(2, 2))
    gradients = [(rng.normal(size=(2, 2)), rng.normal(size=2)) for _ in range(50)]
    case = (theta, np.zeros(2), gradients, 0.03, 0.7)
    weight = torch.tensor(theta, requires_grad=True)
    optimizer = torch.optim.AdamW([weight], lr=0.03, weight_decay=0.7)
    for gradient, _ in gradients:
        weight.grad = torch.tensor(gradient)
        optimizer.step()
    by_formula = QUESTIONS["04.q1"].expect(case)["weight after the steps"]
    np.testing.assert_allclose(by_formula, weight.detach().numpy(), rtol=1e-12)
