"""Play a class of 30 made-up students from handing out to returning, and film it as text.

    python scripts/demo_class.py [FOLDER] [--film FILE]

FOLDER (default: artifacts/demo_class) must not exist; it holds the class afterwards, so that a
teacher can look around in it and open formgrader. The film shows every command and what it said.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.grading.synthetic import Made, answer_index, make_class  # noqa: E402
from tlcourse.grading.class_folder import ClassFolder  # noqa: E402
from tlcourse.grading.gradebook import open_gradebook  # noqa: E402

NAME = "03_gradients_by_hand"
DUE = "2026-11-20T23:59:00+01:00"
IN_TIME, LATE = "2026-11-20T18:00:00+01:00", "2026-11-22T09:00:00+01:00"
ENDLESS = """\
while True:
    try:
        while True:
            pass
    except BaseException:
        pass"""
MOODLE = "{name}_{number}_assignsubmission_file_"


class Film:
    """Runs commands in a folder, and keeps what a teacher would see."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self._add(f"\n# {text}")

    def run(self, *words: str, folder: Path | None = None) -> None:
        """Run `tlcourse grade ...`; paths are shown relative to the class."""
        self._add(f"$ tlcourse grade {' '.join(words)}")
        command = [sys.executable, "-m", "tlcourse.cli", "grade", *words]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=folder or self.folder, env=environment,
                              capture_output=True, text=True, check=False)  # fmt: skip
        text = (done.stdout + done.stderr).replace(f"{self.folder}/", "")
        text = text.replace(str(self.folder), self.folder.name)
        self._add(text.rstrip())
        if done.returncode != 0:
            raise SystemExit(f"failed: {command}")

    def _add(self, text: str) -> None:
        print(text, flush=True)
        self.lines.append(text)


def students(made: list[Made]) -> list[dict[str, str]]:
    return [
        {
            "id": one.student,
            "first_name": re.sub(r"\d", "", one.student).capitalize(),
            "last_name": f"Sample{number}",
            "email": f"{one.student}@school.example",
            "platform_id": str(1001 + number),
        }
        for number, one in enumerate(made)
    ]


def write_download(path: Path, made: list[Made], roster: list[dict[str, str]]) -> None:
    """The zip file that Moodle gives for "download all submissions"."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for one, row in zip(made, roster, strict=True):
            name = f"{row['first_name']} {row['last_name']}"
            folder = MOODLE.format(name=name, number=row["platform_id"])
            data = nbformat.writes(one.notebook).encode()
            if one.student == "olga":
                data = data[: len(data) // 2]  # an upload that was cut off
            archive.writestr(f"{folder}/{NAME}.ipynb", data)


def make_trouble(made: list[Made]) -> None:
    """One student's first cell never ends, one has text that would run in a browser."""
    by_name = {one.student: one for one in made}
    by_name["kofi"].notebook.cells.insert(0, nbformat.v4.new_code_cell(ENDLESS))
    emil = by_name["emil"].notebook
    emil.cells[answer_index(emil, "03.q6")].source += "\n\n<script>document.title = 'mine'</script>"


def mark_by_hand(folder: ClassFolder, left: tuple[str, ...]) -> int:
    """What a teacher does in formgrader: marks for the free text of all but a few."""
    count = 0
    with open_gradebook(folder) as book:
        for submission in book.assignment_submissions(NAME):
            for grade in submission.notebooks[0].grades:
                if grade.needs_manual_grade and submission.student.id not in left:
                    grade.manual_score = 2.0 + len(submission.student.id) % 3
                    grade.needs_manual_grade = False
                    count += 1
        book.db.commit()
    return count


def play(film: Film) -> None:
    root = film.folder
    film.say("a class folder, with a secret of its own")
    film.run("init", root.name, folder=root.parent)
    made = make_class(NAME, 30)
    make_trouble(made)
    roster = students(made)
    with (root / "students.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(roster[0]))
        writer.writeheader()
        writer.writerows(roster)
    settings = root / "class.toml"
    text = settings.read_text().replace("[deadlines]", f'[deadlines]\n"03" = {DUE}')
    text = re.sub(r"percent_per_day = 0 ", "percent_per_day = 10 ", text)
    settings.write_text(re.sub(r"cell_seconds = 60 ", "cell_seconds = 10 ", text))
    film.say("students.csv and the deadline are filled in; then the exercise is handed out")
    film.run("release", "03")
    film.say("what the platform gives back: a zip file, and a table of times")
    write_download(root / "moodle.zip", made, roster)
    late = ("bela", "uma")
    rows = [f"{r['first_name']} {r['last_name']}_*,{r['id']},{LATE if r['id'] in late else IN_TIME}"
            for r in roster]  # fmt: skip
    (root / "times.csv").write_text("path,student_id,submitted_at\n" + "\n".join(rows) + "\n")
    film.run("collect", "moodle.zip", "--table", "times.csv")
    film.say("graded: one first cell that never ends, one file that was cut off")
    film.run("run")
    count = mark_by_hand(ClassFolder(root), left=("zoe", "ada2"))
    film.say(f"formgrader: {count} answers in free text get a mark, two are left")
    film.say("a student hands in again; the mark given by hand is kept and flagged")
    again = next(one for one in made if one.student == "wang")
    again.notebook.cells[answer_index(again.notebook, "03.q6")].source += "\n\nAnd time them first."
    nbformat.write(again.notebook, root / "again.ipynb")
    (root / "again.csv").write_text(f"path,student_id,submitted_at\nagain.ipynb,wang,{IN_TIME}\n")
    film.run("collect", "again.ipynb", "--table", "again.csv", "--assignment", "03")
    film.run("run")
    film.say("the report")
    film.run("report")
    film.say("a page for each student")
    film.run("feedback", "03")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = ROOT / "artifacts" / "demo_class"
    parser.add_argument("folder", nargs="?", type=Path, default=default)
    parser.add_argument("--film", type=Path, help="write the film to this file, too")
    options = parser.parse_args()
    if options.folder.exists():
        raise SystemExit(f"{options.folder} exists already; name another folder, or remove it")
    options.folder.parent.mkdir(parents=True, exist_ok=True)
    film = Film(options.folder.resolve())
    play(film)
    if options.film:
        options.film.write_text("\n".join(film.lines).strip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
