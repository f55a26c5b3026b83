"""``tlcourse grade``: a class from handing out to returning."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from zoneinfo import ZoneInfo

from tlcourse.grading import class_folder, collect, release, run
from tlcourse.grading.class_folder import ClassFolder
from tlcourse.grading.sandbox import SandboxError
from tlcourse.machine import core_count

_NEXT = """\
{root}: a class folder
  class.toml     settings: deadlines, what lateness costs, limits
  students.csv   one line for each student
  class_secret   seeds the hidden inputs; keep it, and show it to nobody
Next: cd {root}, then: tlcourse grade release 03"""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``tlcourse grade``; returns the exit status."""
    options = _parser().parse_args(argv)
    action: Callable[[argparse.Namespace], int] = options.action
    try:
        return action(options)
    except SandboxError as error:
        print(f"tlcourse: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tlcourse grade", description="Hand out, collect, grade and return exercises."
    )
    where = "the class folder (default: the current folder or one above it)"
    parser.add_argument("--class", dest="folder", type=Path, metavar="FOLDER", help=where)
    steps = parser.add_subparsers(metavar="STEP", required=True)

    init = steps.add_parser("init", help="make a class folder")
    init.add_argument("name", type=Path, help="the folder")
    init.set_defaults(action=_init)

    out = steps.add_parser("release", help="make the notebook to hand out")
    out.add_argument("number", nargs="+", help="of the lesson, such as 03")
    out.set_defaults(action=_release)

    into = steps.add_parser("collect", help="take in what students handed in")
    into.add_argument("source", type=Path, help="a folder, a .zip of a platform, or a notebook")
    into.add_argument("--assignment", help="take every notebook as an answer to this, such as 03")
    into.add_argument("--table", type=Path, help="CSV file path,student_id,submitted_at")
    zone = "take times from the platform's file names; their time zone, such as Europe/Berlin"
    into.add_argument("--name-times", type=ZoneInfo, metavar="ZONE", help=zone)
    into.set_defaults(action=_collect)

    grade = steps.add_parser("run", help="grade what is new or changed")
    grade.add_argument("number", nargs="*", help="of the lesson; all that were collected if none")
    many = "submissions at the same time (default: one for each core)"
    grade.add_argument("--workers", type=int, default=core_count(), help=many)
    grade.add_argument("--scheduler", metavar="ADDRESS", help="a Dask scheduler: tcp://host:8786")
    grade.add_argument("--again", action="store_true", help="grade what is graded already, too")
    grade.add_argument("--resume", action="store_true", help="go on with an interrupted --again")
    trust = "run without a sandbox; only for notebooks that you wrote yourself"
    grade.add_argument("--trust-submissions", action="store_true", help=trust)
    grade.set_defaults(action=_run)

    report = steps.add_parser("report", help="gradebook.csv, statistics, what needs a mark by hand")
    report.set_defaults(action=_report)

    feedback = steps.add_parser("feedback", help="a page for each student")
    feedback.add_argument("number", nargs="*", help="of the lesson; all that were graded if none")
    feedback.set_defaults(action=_feedback)
    return parser


def _init(options: argparse.Namespace) -> int:
    folder = class_folder.create(options.name)
    print(_NEXT.format(root=folder.root))
    return 0


def _release(options: argparse.Namespace) -> int:
    folder = class_folder.find(options.folder)
    for number in options.number:
        path = release.release(folder, number)
        due = folder.settings().deadlines.get(path.stem[:2])
        print(f"{path}\n  due: {due or 'no deadline in class.toml'}")
    return 0


def _collect(options: argparse.Namespace) -> int:
    folder = class_folder.find(options.folder)
    only = _name(folder, options.assignment) if options.assignment else None
    collected = collect.collect(
        folder,
        options.source,
        release.released(folder),
        only=only,
        table=options.table,
        now=datetime.now().astimezone(),
        name_times=options.name_times,
    )
    print(collected.summary())
    return 0


def _run(options: argparse.Namespace) -> int:
    folder = class_folder.find(options.folder)
    if options.trust_submissions:
        warning = "WITHOUT A SANDBOX: submissions can read and change all that you can."
        print(warning, file=sys.stderr)
    settings = run.Options(
        workers=options.workers,
        scheduler=options.scheduler,
        walled=not options.trust_submissions,
        again=options.again,
        resume=options.resume,
        quiet=not sys.stderr.isatty(),
    )
    names = [_name(folder, number) for number in options.number]
    names = names or [name for name in release.released(folder) if run.submitters(folder, name)]
    if not names:
        raise class_folder.ClassError("nothing was collected yet; run: tlcourse grade collect ...")
    failed = False
    for name in names:
        summary = run.grade(folder, name, settings)
        print(_told(summary))
        failed = failed or bool(summary.failed)
        if summary.interrupted:
            how = "run the same command again" + (" with --resume" if options.again else "")
            print(f"interrupted; nothing that was graded is lost: {how}")
            return 130
    return 1 if failed else 0


def _report(options: argparse.Namespace) -> int:
    from tlcourse.grading import report

    print(report.report(class_folder.find(options.folder)))
    return 0


def _feedback(options: argparse.Namespace) -> int:
    from tlcourse.grading import feedback

    folder = class_folder.find(options.folder)
    names = [_name(folder, number) for number in options.number] or release.released(folder)
    for name in names:
        pages = feedback.write_feedback(folder, name)
        print(f"{name}: {len(pages)} pages in {folder.root / 'feedback'}")
    return 0


def _name(folder: ClassFolder, number: str) -> str:
    """The full name of an exercise that was handed out.

    Raises:
        ClassError: if there is none with this number.
    """
    names = release.released(folder)
    for name in names:
        if number in (name, name[:2]):
            return name
    known = ", ".join(name[:2] for name in names) or "none"
    raise class_folder.ClassError(f"no exercise {number!r} was handed out; there are: {known}")


def _told(summary: run.Summary) -> str:
    lines = [
        f"{summary.name}: {summary.graded} graded in {summary.seconds:.1f} s, "
        f"{summary.unchanged} unchanged"
    ]
    lines += [f"  {count} {status}" for status, count in sorted(summary.statuses.items())]
    lines += [f"  NOT GRADED {student}: {why}" for student, why in sorted(summary.failed.items())]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
