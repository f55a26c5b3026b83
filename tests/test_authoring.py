"""Sources -> notebooks on a small course made in a temporary folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook, new_output

from tlcourse import authoring, contents, execution, lesson_rules, lessons, notebooks
from tlcourse.authoring import Options, build, check_products
from tlcourse.execution import BuildError

REPO = Path(__file__).resolve().parents[1]
SETUP = '# %% tags=["setup"]\nimport tlcourse as tl\n\nrun = tl.setup(seed=0)\n'
LESSON = f"""\
# %% [markdown]
# # 03 Sample & more
#
# Text. The [exercise](../exercises/03_sample.ipynb).

{SETUP}
# %% tags=["nbval-check-output"]
import os
import matplotlib.pyplot as plt
print(6 * 7, os.getcwd(), object())

# %%
plt.plot([1, 2])
plt.show()

# %%
from tqdm.auto import tqdm
for i in tqdm(range(3)):
    pass

# %%
def draw(k):
    print("drawn", k)
tl.widgets.explore(draw, k=tl.widgets.slider(0, 3, 1, 1, "k"))
"""
EXERCISE = f"""\
# %% [markdown]
# # 03 Exercise

{SETUP}
# %% [markdown]
# ## Question 1

# %% question="03.q1"
def double(x):
    \"\"\"Twice x.\"\"\"
    ### BEGIN SOLUTION
    secret = 2 * x
    return secret
    ### END SOLUTION

# %% check="03.q1"
tl.check("03.q1", double)

# %% question="03.q2"
# Set rate.
### BEGIN SOLUTION
helper = 1
rate = helper / 2
### END SOLUTION

# %% check="03.q2"
tl.check("03.q2", rate)

# %% [markdown] question="03.q3"
# Why?
#
# <!-- BEGIN SOLUTION -->
# Because of the secret.
# <!-- END SOLUTION -->
"""
QUESTIONS = """\
from tlcourse.checks import Question
QUESTIONS = [
    Question(id="03.q1", title="Double", points=2, cases=lambda rng: [(rng.normal(),)],
             expected=lambda x: 2 * x),
    Question(id="03.q2", title="Rate", points=1, cases=lambda rng: [()], expected=lambda: 0.5),
    Question(id="03.q3", title="Why", points=3, manual=True, rubric="a reason"),
]
"""
PYPROJECT = '[project]\nname = "x"\n[project.urls]\nRepository = "https://github.com/a/b"\n'


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text, old
    path.write_text(text.replace(old, new, 1))


def fill(root: Path) -> Path:
    folder = root / "lessons" / "03_sample"
    folder.mkdir(parents=True)
    for name, text in (("lesson", LESSON), ("exercise", EXERCISE), ("questions", QUESTIONS)):
        (folder / f"{name}.py").write_text(text)
    (root / "pyproject.toml").write_text(PYPROJECT)
    (root / "README.md").write_text(f"# Top\n{contents.BEGIN}\nold\n{contents.END}\n# End\n")
    return root


def copy_library(root: Path) -> None:
    """The real library, but a setup that does not load torch: kernels start at once."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPO / "tlcourse", root / "tlcourse", ignore=ignored)
    (root / "tlcourse" / "runtime.py").write_text("def setup(seed=0): pass\n")


@pytest.fixture
def course(tmp_path: Path) -> Path:
    """A course of one lesson, nothing built."""
    return fill(tmp_path)


@pytest.fixture(scope="module")
def built_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = fill(tmp_path_factory.mktemp("course"))
    copy_library(root)
    assert build(root, lessons.find_lessons(root)) == []
    return root


@pytest.fixture
def built(built_once: Path, tmp_path: Path) -> Path:
    """The same course after a build, free to be changed."""
    root = tmp_path / "built"
    shutil.copytree(built_once, root)
    return root


def sample(root: Path) -> lessons.Lesson:
    return lessons.find_lessons(root)[0]


def product(root: Path, kind: lessons.Kind) -> Path:
    return root / sample(root).product(kind)


def read(root: Path, kind: lessons.Kind) -> NotebookNode:
    return nbformat.read(product(root, kind), as_version=4)


def rebuild(root: Path, **options: Any) -> list[str]:
    return build(root, lessons.find_lessons(root), Options(**options))


def texts(nb: NotebookNode) -> str:
    return "\n".join(cell.source for cell in nb.cells)


def bytes_of(root: Path) -> dict[str, bytes]:
    kinds: tuple[lessons.Kind, ...] = ("lesson", "exercise", "solution")
    return {kind: product(root, kind).read_bytes() for kind in kinds}


# Making notebooks, nothing executed.


def test_products_go_where_learners_look(course: Path) -> None:
    lesson = sample(course)
    assert lesson.product("lesson").as_posix() == "notebooks/part1_foundations/03_sample.ipynb"
    assert lesson.product("exercise").as_posix() == "notebooks/exercises/03_sample.ipynb"
    assert lesson.product("solution").as_posix() == "solutions/03_sample.ipynb"


@pytest.mark.parametrize(
    ("number", "part"),
    [("00", 1), ("04", 1), ("05", 2), ("10", 2), ("11", 3), ("17", 3), ("18", 4), ("22", 4),
     ("23", 5), ("28", 5), ("29", 6), ("38", 6)],
)  # fmt: skip
def test_parts(number: str, part: int, tmp_path: Path) -> None:
    assert lessons.Lesson(tmp_path, f"{number}_x").part[0].startswith(f"part{part}_")


def test_exercise_has_stubs_and_no_solutions(course: Path) -> None:
    nb = notebooks.make(sample(course), "exercise")
    text = texts(nb)
    assert "secret" not in text and "SOLUTION" not in text and "helper" not in text
    assert '    raise NotImplementedError("03.q1: write your answer here")' in text
    assert "rate = ...  # 03.q2: write your answer here" in text
    assert "Why?\n\n*Write your answer here.*" in text


def test_solution_keeps_answers_without_marks(course: Path) -> None:
    text = texts(notebooks.make(sample(course), "solution"))
    assert "    return secret" in text and "Because of the secret." in text
    assert "SOLUTION" not in text and "NotImplementedError" not in text


def test_unanswered_cells_compile_and_define_their_names(course: Path) -> None:
    names: dict[str, Any] = {}
    for cell in notebooks.make(sample(course), "exercise").cells:
        if cell.metadata.get("nbgrader", {}).get("solution") and cell.cell_type == "code":
            exec(compile(cell.source, "cell", "exec"), names)
    assert names["rate"] is Ellipsis
    with pytest.raises(NotImplementedError, match=r"03\.q1: write"):
        names["double"](1)


def test_head_links_and_setup(course: Path) -> None:
    first = {kind: notebooks.make(sample(course), kind).cells for kind in sample(course).kinds()}
    colab = "https://colab.research.google.com/github/a/b/blob/main/"
    lesson, exercise = first["lesson"], first["exercise"]
    assert (
        f"[Open in Colab]({colab}notebooks/part1_foundations/03_sample.ipynb)" in lesson[0].source
    )
    assert "[Exercise](../exercises/03_sample.ipynb)" in lesson[0].source
    assert "[Lesson](../part1_foundations/03_sample.ipynb)" in exercise[0].source
    assert "[Solution](../../solutions/03_sample.ipynb)" in exercise[0].source
    assert lesson[0].source.startswith("# 03 Sample & more\n\n[")
    setup = lesson[1].source
    assert '%pip install -q "tlcourse @ git+https://github.com/a/b"' in setup
    assert setup.endswith(lesson_rules.SETUP) and len(setup.split("\n")) <= 15


def test_without_a_public_address_there_is_no_colab(course: Path) -> None:
    (course / "pyproject.toml").write_text('[project]\nname = "x"\n')
    cells = notebooks.make(sample(course), "lesson").cells
    assert "Colab" not in cells[0].source
    assert cells[1].source == lesson_rules.SETUP


def test_cell_ids_are_fixed_and_unique(course: Path) -> None:
    ids = [cell.id for cell in notebooks.make(sample(course), "exercise").cells]
    assert ids == [cell.id for cell in notebooks.make(sample(course), "exercise").cells]
    assert len(set(ids)) == len(ids)
    assert {"03-q1-answer", "03-q1-check", "03-q3-answer"} <= set(ids)
    edit(course / "lessons/03_sample/exercise.py", "## Question 1", "## Question one")
    again = [cell.id for cell in notebooks.make(sample(course), "exercise").cells]
    assert sum(a != b for a, b in zip(ids, again, strict=True)) == 1


def test_repeated_cells_have_different_ids(course: Path) -> None:
    path = course / "lessons/03_sample/lesson.py"
    path.write_text(path.read_text() + "\n# %%\nx = 1\n\n# %%\nx = 1\n")
    ids = [cell.id for cell in notebooks.make(sample(course), "lesson").cells]
    assert len(set(ids)) == len(ids) and ids[-1] == f"{ids[-2]}-2"


def test_nbgrader_accepts_the_metadata(course: Path) -> None:
    v3 = pytest.importorskip("nbgrader.nbgraderformat.v3")
    kinds: tuple[lessons.Kind, ...] = ("exercise", "solution")
    for nb in [*(notebooks.make(sample(course), kind) for kind in kinds),
               notebooks.make_teacher(sample(course))]:  # fmt: skip
        v3.MetadataValidatorV3().validate_nb(nb)
        nbformat.validate(nb)
        graded = {
            cell.metadata.nbgrader.grade_id: cell.metadata.nbgrader.points
            for cell in nb.cells
            if cell.metadata.get("nbgrader", {}).get("grade")
        }
        assert graded == {"03-q1-check": 2, "03-q2-check": 1, "03-q3-answer": 3}
        assert [c.metadata.nbgrader.locked for c in nb.cells if c.id == "03-q1-check"] == [True]


RULES: list[tuple[str, Callable[[Path], None], str]] = [
    ("long cell", lambda p: edit(p / "lesson.py", "plt.show()", "x = 1\n" * 20), "at most 15"),
    ("no setup", lambda p: edit(p / "lesson.py", ' tags=["setup"]', ""), "tag setup"),
    ("other setup", lambda p: edit(p / "exercise.py", "seed=0", "seed=1"), "tag setup"),
    ("no title", lambda p: edit(p / "lesson.py", "# # 03", "# 03"), "must begin"),
    ("unknown tag", lambda p: edit(p / "lesson.py", "nbval-check-output", "nbval"), "unknown tags"),
    ("typing slip", lambda p: edit(p / "exercise.py", "question=", "quesiton="), "unknown words"),
    ("unknown id", lambda p: edit(p / "exercise.py", 'check="03.q1"', 'check="03.q8"'), "03.q8"),
    ("open region", lambda p: edit(p / "exercise.py", "    ### END SOLUTION\n", ""), "its pair"),
    ("no region", lambda p: edit(p / "exercise.py", 'question="03.q1"', ""), "belong together"),
    ("no check", lambda p: edit(p / "exercise.py", 'check="03.q1"', ""), "needs one check cell"),
    ("other check", lambda p: edit(p / "exercise.py", 'tl.check("03.q1"', 'tl.check("03.q2"'),
     "must call tl.check"),
    ("manual code", lambda p: edit(p / "questions.py", "cases=lambda rng: [()]",
     "manual=True, rubric='r', cases=lambda rng: [()]"), "a manual question is a markdown cell"),
    ("order", lambda p: edit(p / "questions.py", "QUESTIONS = [", "QUESTIONS = [][::-1] + ["), ""),
    ("fewer", lambda p: edit(p / "questions.py", "]\n", "][::-1]\n"), "but questions.py lists"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "words"), RULES, ids=[rule[0] for rule in RULES])
def test_rules(course: Path, name: str, change: Callable[[Path], None], words: str) -> None:
    assert lesson_rules.source_problems(sample(course)) == []
    change(course / "lessons" / "03_sample")
    problems = "\n".join(lesson_rules.source_problems(sample(course)))
    assert (words in problems) if words else problems == ""


def test_docstrings_and_folded_figures_may_be_longer(course: Path) -> None:
    folder = course / "lessons" / "03_sample"
    edit(folder / "exercise.py", "Twice x.", "Twice x.\n" + "    line\n" * 20 + "    ")
    assert lesson_rules.source_problems(sample(course)) == []
    edit(folder / "lesson.py", "# %%\nplt.plot", '# %% jupyter={"source_hidden": true}\nplt.plot')
    edit(folder / "lesson.py", "plt.show()", "x = 1\n" * 20)
    assert lesson_rules.source_problems(sample(course)) == []


# Cleaning outputs, without a kernel.


def executed(*outputs: Any, tags: tuple[str, ...] = ()) -> NotebookNode:
    cell = new_code_cell("f()", outputs=list(outputs), metadata={"tags": list(tags)})
    return new_notebook(cells=[cell])


def stream(text: str, name: str = "stdout") -> Any:
    return new_output("stream", name=name, text=text)


def test_progress_bars_go_and_streams_join() -> None:
    bar = stream("\r 50%|#####     | 1/2 [00:01<00:01]\r100%|###| 2/2 [00:02<00:00]\n", "stderr")
    nb = executed(stream("a"), bar, stream("b at 0x7f12ab34cd56 /secret/x"))
    assert execution.clean(nb, "n", {"/secret": "."}) == []
    assert [out.text for out in nb.cells[0].outputs] == ["ab at 0x... ./x"]


def test_warnings_are_problems_unless_allowed() -> None:
    warning = stream("x.py:1: UserWarning: mind the gap", "stderr")
    assert "mind the gap" in execution.clean(executed(warning), "n")[0]
    assert execution.clean(executed(warning, tags=("allow-warning",)), "n") == []


def test_output_needs_a_text() -> None:
    picture = new_output("display_data", data={"image/png": "AAAA"})
    assert "without text/html or text/plain" in execution.clean(executed(picture), "n")[0]


def widget(nb: NotebookNode, **state: Any) -> NotebookNode:
    models = {"a" * 32: {"state": state}, "b" * 32: {"state": {"child": "IPY_MODEL_" + "a" * 32}}}
    nb.metadata.widgets = {execution.WIDGET_STATE: {"state": models, "version_major": 2}}
    data = {execution.WIDGET_VIEW: {"model_id": "b" * 32}, "text/plain": "Explorer"}
    nb.cells[0].outputs.append(new_output("display_data", data=data))
    return nb


@pytest.mark.parametrize(
    "state",
    [
        {"outputs": [{"output_type": "error", "ename": "ZeroDivisionError", "evalue": "zero"}]},
        {"outputs": [{"output_type": "stream", "name": "stderr", "text": "zero"}]},
        {"value": '<pre role="alert">zero</pre>'},
        {"value": "Traceback (most recent call last) zero"},
    ],
)
def test_error_inside_a_widget_is_found(state: dict) -> None:
    problems = execution.clean(widget(executed(), **state), "n")
    assert len(problems) == 1 and "zero" in problems[0]


def test_widget_with_html_beside_it_is_kept_as_html() -> None:
    nb = widget(executed(), value="fine")
    nb.cells[0].outputs[0].data["text/html"] = "<p>picture</p>"
    assert execution.clean(nb, "n") == []
    assert "widgets" not in nb.metadata
    assert set(nb.cells[0].outputs[0].data) == {"text/html", "text/plain"}


def test_progress_bar_widget_goes() -> None:
    nb = widget(executed(), value="bar")
    nb.cells[0].outputs[0].data["text/plain"] = "  0%|          | 0/3 [00:00<?, ?it/s]"
    assert execution.clean(nb, "n") == []
    assert nb.cells[0].outputs == [] and "widgets" not in nb.metadata


def test_widget_ids_are_fixed() -> None:
    nb = widget(executed(), value="fine")
    assert execution.clean(nb, "n") == []
    first, second = nb.metadata.widgets[execution.WIDGET_STATE].state
    assert "a" * 32 not in str(nb) and "b" * 32 not in str(nb)
    assert nb.cells[0].outputs[0].data[execution.WIDGET_VIEW].model_id == second
    child = nb.metadata.widgets[execution.WIDGET_STATE].state[second].state.child
    assert child == f"IPY_MODEL_{first}"


def test_large_widget_state_goes_and_its_text_stays() -> None:
    nb = widget(executed(), value="x" * execution.MAX_WIDGET_STATE_BYTES)
    assert execution.clean(nb, "n") == []
    assert "widgets" not in nb.metadata
    assert nb.cells[0].outputs[0].data == {"text/plain": "Explorer"}


def test_large_notebook_names_its_largest_output() -> None:
    nb = executed(stream("x" * 1000), stream("y" * 700_000))
    with pytest.raises(BuildError, match=r"at most 600 kB; the largest output has 700 kB, of cell"):
        execution.as_bytes(nb, "n")


# Building for real: one kernel for the lesson, one for the solution.


@pytest.mark.build
def test_lesson_is_executed_and_clean(built: Path) -> None:
    nb = read(built, "lesson")
    outputs = [out for cell in nb.cells if cell.cell_type == "code" for out in cell.outputs]
    printed = next(out.text for out in outputs if "42" in out.get("text", ""))
    assert printed == "42 . <object object at 0x...>\n"
    assert any("image/png" in out.get("data", {}) for out in outputs)
    assert str(built) not in str(nb) and "stderr" not in str(nb)
    info = nb.metadata.tlcourse
    assert info.generated and info.source == "lessons/03_sample/lesson.py" and info.seconds > 0
    assert "Edit that file" in info.note
    assert nb.metadata.kernelspec == {
        "display_name": "Python 3", "language": "python", "name": "python3",
    }  # fmt: skip
    explorer = outputs[-1].data
    assert set(explorer) == {"text/html", "text/plain"} and "widgets" not in nb.metadata
    assert "drawn 1" in explorer["text/html"]


@pytest.mark.build
def test_exercise_has_no_outputs_and_solution_is_right(built: Path) -> None:
    exercise = [cell for cell in read(built, "exercise").cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in exercise)
    shown = str([cell.outputs for cell in read(built, "solution").cells if "outputs" in cell])
    assert "03.q1 Double: right" in shown and "03.q2 Rate: right" in shown


@pytest.mark.build
def test_unchanged_sources_are_not_executed_or_written(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = bytes_of(built)
    times = {kind: product(built, kind).stat().st_mtime_ns for kind in ("lesson", "solution")}
    monkeypatch.setattr(authoring, "execute", lambda *_: pytest.fail("executed"))
    assert rebuild(built) == [] and check_products(built, [sample(built)]) == []
    assert bytes_of(built) == before
    assert times == {k: product(built, k).stat().st_mtime_ns for k in ("lesson", "solution")}


@pytest.mark.build
def test_forced_rebuild_changes_no_byte_but_measured_time(built: Path) -> None:
    before = bytes_of(built)
    assert rebuild(built, force=True, jobs=2) == []
    for kind, data in bytes_of(built).items():
        seconds = re.compile(rb'"seconds": [\d.]+')
        assert seconds.sub(b"", data) == seconds.sub(b"", before[kind]), kind


@pytest.mark.build
def test_change_of_prose_keeps_outputs(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = [cell.get("outputs") for cell in read(built, "lesson").cells]
    edit(built / "lessons/03_sample/lesson.py", "# Text.", "# Better text.")
    assert "is older than lessons/03_sample/lesson.py" in str(
        check_products(built, [sample(built)])
    )
    monkeypatch.setattr(authoring, "execute", lambda *_: pytest.fail("executed"))
    assert rebuild(built) == []
    nb = read(built, "lesson")
    assert "Better text." in nb.cells[0].source
    assert [cell.get("outputs") for cell in nb.cells] == outputs
    assert check_products(built, [sample(built)]) == []


@pytest.mark.build
@pytest.mark.parametrize(
    "change",
    [
        lambda root: edit(root / "lessons/03_sample/lesson.py", "6 * 7", "6 * 8"),
        lambda root: edit(root / "lessons/03_sample/questions.py", "2 * x", "x + x"),
        lambda root: edit(root / "tlcourse/plain_data.py", "_DEPTH = 20", "_DEPTH = 9"),
        lambda root: (root / "requirements.lock").write_text("torch==3"),
    ],
    ids=["code", "questions", "library", "lock"],
)  # fmt: skip
def test_change_of_what_decides_outputs_executes(
    built: Path, change: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    change(built)

    def fake(nb: NotebookNode, name: str, root: Path) -> float:
        ran.append(name)
        raise BuildError("stop here")

    monkeypatch.setattr(authoring, "execute", fake)
    before = bytes_of(built)
    rebuild(built)
    assert ran
    after = bytes_of(built)
    assert after["lesson"] == before["lesson"] and after["solution"] == before["solution"]


@pytest.mark.build
def test_change_of_the_library_alone_is_not_stale(built: Path) -> None:
    (built / "requirements.lock").write_text("torch==3")
    assert check_products(built, [sample(built)]) == []


@pytest.mark.build
def test_edited_notebook_is_refused_and_kept(built: Path) -> None:
    edit(product(built, "exercise"), "write your answer here", "my own answer")
    mine = product(built, "exercise").read_bytes()
    assert "was edited by hand" in str(check_products(built, [sample(built)]))
    assert "was edited by hand" in str(rebuild(built))
    assert product(built, "exercise").read_bytes() == mine
    assert rebuild(built, force=True, execute=False) == []
    assert product(built, "exercise").read_bytes() != mine


@pytest.mark.build
def test_notebook_run_by_hand_is_named_and_executed_again(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = product(built, "lesson")
    nb = nbformat.read(path, as_version=4)
    nbformat.write(nb, path)
    assert check_products(built, [sample(built)]) == []  # saved, not run
    nb.cells[2].outputs = []
    nbformat.write(nb, path)
    assert "was run or cleared by hand" in str(check_products(built, [sample(built)]))
    ran = []
    monkeypatch.setattr(authoring, "execute", lambda nb, name, root: ran.append(name) or 1.0)
    rebuild(built)
    assert ran == ["notebooks/part1_foundations/03_sample.ipynb"]


@pytest.mark.build
def test_missing_orphan_and_stale_pages_are_named(built: Path) -> None:
    product(built, "solution").unlink()
    shutil.copy(product(built, "exercise"), built / "notebooks/exercises/99_old.ipynb")
    edit(built / "README.md", "Sample", "Simple")
    own = new_notebook(cells=[new_code_cell("1")])
    nbformat.write(own, built / "notebooks" / "my_own.ipynb")
    problems = "\n".join(check_products(built, [sample(built)]))
    assert "solutions/03_sample.ipynb is missing" in problems
    assert "notebooks/exercises/99_old.ipynb has no source" in problems
    assert "README.md is not up to date" in problems
    assert "my_own" not in problems


@pytest.mark.build
def test_pages(built: Path) -> None:
    readme = (built / "README.md").read_text()
    assert readme.startswith("# Top\n") and readme.endswith("\n# End\n")
    assert (
        "| 03 | [Sample & more](notebooks/part1_foundations/03_sample.ipynb) | [6 points]("
        in readme
    )
    timings = (built / contents.TIMINGS).read_text()
    assert re.search(r"\| 03_sample \| 5 \| [\d.]+ \| \d+ \| \d+ cores, ", timings)


@pytest.mark.build
def test_link_that_leads_nowhere(built: Path) -> None:
    edit(built / "lessons/03_sample/lesson.py", "(../exercises/03_", "(../exercises/04_")
    assert "link to ../exercises/04_sample.ipynb leads nowhere" in str(rebuild(built))


@pytest.mark.build
def test_failing_cell_is_shown_and_nothing_is_written(
    course: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy_library(course)
    edit(course / "lessons/03_sample/lesson.py", "print(6 * 7, os.getcwd(), object())", "1 / 0")
    assert authoring.main(["03", "--root", str(course)]) == 1
    shown = capsys.readouterr().err
    assert "    1 / 0" in shown and "ZeroDivisionError: division by zero" in shown
    assert not product(course, "lesson").exists()
    assert not list(course.rglob("*.part"))


@pytest.mark.build
def test_solution_that_is_not_right_fails(built: Path) -> None:
    edit(built / "lessons/03_sample/exercise.py", "secret = 2 * x", "secret = 3 * x")
    before = product(built, "solution").read_bytes()
    problems = str(rebuild(built))
    assert (
        "03-q1-check of the solution is not right" in problems and "03.q1 Double: wrong" in problems
    )
    assert product(built, "solution").read_bytes() == before


def test_drafts(course: Path) -> None:
    assert rebuild(course, execute=False) == []
    assert "is a draft without outputs" in str(check_products(course, [sample(course)]))


def test_command_line(course: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert authoring.main(["--root", str(course), "--check"]) == 1
    assert "notebooks/exercises/03_sample.ipynb is missing" in capsys.readouterr().err
    assert authoring.main(["--root", str(course), "--no-execute"]) == 0
    with pytest.raises(SystemExit):
        authoring.main(["--root", str(course), "07"])
    assert "no lesson '07'; there are 03" in capsys.readouterr().err


@pytest.mark.build
def test_nbgrader_takes_the_assignment(
    course: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = pytest.importorskip("nbgrader.apps.api")
    from traitlets.config import Config

    school = tmp_path / "school"
    source = school / "source" / "ps03"
    source.mkdir(parents=True)
    nbformat.write(notebooks.make_teacher(sample(course)), source / "03_sample.ipynb")
    command = [sys.executable, "-m", "nbgrader", "generate_assignment", "ps03", "--create",
               f"--CourseDirectory.root={school}"]  # fmt: skip
    # nbgrader calls alembic by name.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    monkeypatch.setenv("PATH", path)
    done = subprocess.run(command, capture_output=True, text=True, cwd=school)
    assert done.returncode == 0, done.stderr
    config = Config()
    config.CourseDirectory.root = str(school)
    gradebook = api.NbGraderAPI(config=config)
    [listed] = gradebook.get_notebooks("ps03")
    assert listed["name"] == "03_sample" and listed["max_score"] == 6
    assert listed["max_code_score"] == 3 and listed["max_written_score"] == 3
    # The student's edition that nbgrader makes has the same graded cells as ours.
    released = nbformat.read(school / "release/ps03/03_sample.ipynb", as_version=4)
    ours = notebooks.make(sample(course), "exercise")
    assert "secret" not in texts(released)
    assert graded_cells(released) == graded_cells(ours)


def graded_cells(nb: NotebookNode) -> list[tuple]:
    cells = [cell.metadata.nbgrader for cell in nb.cells if "nbgrader" in cell.metadata]
    keys = ("grade_id", "grade", "solution", "locked", "points", "schema_version")
    return [tuple(cell.get(key) for key in keys) for cell in cells]
