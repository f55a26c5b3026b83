"""Collecting: honest times, the newest wins, nothing lost, and a report on every file."""

from __future__ import annotations

import json
import os
import zipfile
from datetime import UTC, datetime, timedelta, timezone
from hashlib import sha256
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from collecting import (
    A3,
    NOW,
    STAMP,
    files_in,
    make_zip,
    only_entry,
    put,
    run,
    stamp,
    statuses,
    stored,
    with_limit,
    zip_bytes,
)

from tlcourse.grading import class_folder, incoming, store
from tlcourse.grading.class_folder import ClassError

# --- times


def test_times_of_the_students_own_are_ignored(folder, source, tmp_path):
    put(source, f"ada/{A3}/timestamp.txt", b"2020-01-01 00:00:00 UTC")
    notebook = put(source, f"ada/{A3}/{A3}.ipynb")
    os.utime(notebook, (0, 0))
    assert run(folder, source).entries[0].submitted_at == NOW.replace(microsecond=0)
    assert stamp(folder, "ada") == STAMP
    entry = zipfile.ZipInfo("bob/03.ipynb", date_time=(1999, 1, 1, 0, 0, 0))
    run(folder, make_zip(tmp_path / "all.zip", [(entry, b"{}")]))
    assert stamp(folder, "bob") == STAMP


@pytest.mark.parametrize(
    ("path", "utc"),
    [
        (f"Homework_ada_attempt_2026-07-20-13-05-11_{A3}.ipynb", "2026-07-20 11:05:11"),
        (f"Homework_ada_attempt_2026-11-20-13-05-11_{A3}.ipynb", "2026-11-20 12:05:11"),
        (f"1-2 - Ada - Nov 20, 2026 105 PM/{A3}.ipynb", "2026-11-20 12:05:00"),
        (f"1-2 - Ada - Nov 20, 2026 1105 AM/{A3}.ipynb", "2026-11-20 10:05:00"),
        (f"1-2 - Ada - Nov 20, 2026 1205 PM/{A3}.ipynb", "2026-11-20 11:05:00"),
        (f"1-2 - Ada - November 20, 2026 1205 AM/{A3}.ipynb", "2026-11-19 23:05:00"),
        # not a time: the time of collecting
        (f"Homework_ada_attempt_2026-13-20-13-05-11_{A3}.ipynb", STAMP[:19]),
        (f"Homework_ada_attempt_0001-01-01-00-00-00_{A3}.ipynb", STAMP[:19]),
        (f"1-2 - Ada - Foo 20, 2026 105 PM/{A3}.ipynb", STAMP[:19]),
        (f"1-2 - Ada - Nov 20, 2026 199 PM/{A3}.ipynb", STAMP[:19]),
    ],
)
def test_a_time_in_a_platforms_name_counts_only_with_its_zone(folder, source, tmp_path, path, utc):
    put(source, path)
    entry = only_entry(run(folder, source, name_times=ZoneInfo("Europe/Berlin")))
    assert stamp(folder, entry.student) == f"{utc} UTC\n"
    other = class_folder.create(tmp_path / "other")
    run(other, source)
    assert stamp(other, entry.student) == STAMP


def test_the_table_has_the_last_word_on_time(folder, source, tmp_path):
    put(source, f"Homework_ada_attempt_2026-11-20-13-05-11_{A3}.ipynb")
    table = tmp_path / "table.csv"
    table.write_text("path,student_id,submitted_at\nHomework_ada_*,ada,2026-11-19T00:00:00-05:00\n")
    run(folder, source, table=table, name_times=UTC)
    assert stamp(folder, "ada") == "2026-11-19 05:00:00 UTC\n"


def test_nbgrader_reads_the_time(folder, source):
    from nbgrader.utils import parse_utc

    put(source, "ada/03.ipynb")
    run(folder, source, now=NOW.astimezone(timezone(timedelta(hours=9))))
    expected = NOW.replace(microsecond=0, tzinfo=None)
    assert parse_utc(stamp(folder, "ada").strip()) == expected


def test_now_must_have_a_zone(folder, source):
    with pytest.raises(ClassError, match="now must have a time zone"):
        run(folder, source, now=datetime(2026, 1, 1))


# --- several notebooks, and another time


@pytest.mark.parametrize(
    ("newest", "older"),
    [
        ("a_1_9_03-10.ipynb", "a_1_8_03-9.ipynb"),  # by attempt, as a number
        ("a_1_9_03-1.ipynb", "a_1_9_03.ipynb"),
        # by the time in the name, even without its zone
        (
            "1-2 - Ada - Dec 1, 2026 105 PM/03.ipynb",
            "1-2 - Ada - Nov 20, 2026 105 PM/03.ipynb",
        ),
        ("H_1_attempt_2026-11-20-13-05-11_03.ipynb", "H_1_attempt_2026-11-19-13-05-11_03.ipynb"),
        ("1-2 - Ada - x/b.03/03.ipynb", "1-2 - Ada - x/a.03/03.ipynb"),  # by path
    ],
)
def test_the_newest_of_several_wins(folder, source, newest, older):
    put(source, newest, b"newest")
    put(source, older, b"older")
    assert statuses(run(folder, source)) == {newest: "new", older: "superseded"}
    assert stored(folder, "1") == b"newest"


def test_time_comes_before_the_attempt(folder, source, tmp_path):
    put(source, "a_1_8_03-1.ipynb", b"later")
    put(source, "a_1_9_03-2.ipynb", b"sooner")
    table = tmp_path / "table.csv"
    table.write_text(
        "path,student_id,submitted_at\n"
        "*-1.ipynb,ada,2026-11-20T12:00:00+00:00\n*-2.ipynb,ada,2026-11-20T12:30:00+01:00\n"
    )
    run(folder, source, table=table)
    assert stored(folder, "ada") == b"later"
    assert stamp(folder, "ada") == "2026-11-20 12:00:00 UTC\n"


def test_the_same_bytes_again_are_unchanged_and_keep_their_time(folder, source):
    put(source, "ada/03.ipynb", b"one")
    run(folder, source)
    before = folder.submitted("ada", A3).stat()
    entry = only_entry(run(folder, source, now=NOW + timedelta(days=3)))
    assert entry.status == "unchanged"
    assert entry.submitted_at == NOW.replace(microsecond=0)
    assert stamp(folder, "ada") == STAMP
    assert not (folder.root / "grading").exists()
    assert folder.submitted("ada", A3).stat().st_mtime_ns == before.st_mtime_ns


def test_other_bytes_replace_and_the_old_ones_are_kept(folder, source):
    put(source, "ada/03.ipynb", b"one")
    run(folder, source)
    put(source, "ada/03.ipynb", b"two")
    entry = only_entry(run(folder, source, now=NOW + timedelta(seconds=1)))
    assert entry.status == "resubmitted"
    assert stored(folder, "ada") == b"two"
    assert stamp(folder, "ada") == "2026-11-21 08:00:01 UTC\n"
    name = sha256(b"one").hexdigest()[:16]
    earlier = folder.root / "grading" / "earlier" / "ada" / A3
    assert files_in(earlier) == [f"{name}.ipynb", f"{name}.txt"]
    assert (earlier / f"{name}.ipynb").read_bytes() == b"one"
    assert (earlier / f"{name}.txt").read_text() == STAMP


def test_an_older_download_does_not_replace_what_came_later(folder, source):
    options = {"name_times": UTC}
    new, old = (f"H_ada_attempt_2026-11-{day}-10-00-00_03.ipynb" for day in (20, 19))
    put(source, new, b"new")
    run(folder, source, **options)
    (source / new).unlink()
    put(source, old, b"old")
    entry = only_entry(run(folder, source, **options))
    assert entry.status == "superseded" and "later" in entry.reason
    assert stored(folder, "ada") == b"new"
    assert stamp(folder, "ada") == "2026-11-20 10:00:00 UTC\n"


@pytest.mark.parametrize("crashing", [f"{A3}.ipynb", "timestamp.txt"])
def test_a_crash_while_replacing_loses_nothing(folder, source, monkeypatch, crashing):
    put(source, "ada/03.ipynb", b"one")
    run(folder, source)
    put(source, "ada/03.ipynb", b"two")

    def crash(partial, target):
        if Path(target).name == crashing:
            raise KeyboardInterrupt
        os.rename(partial, target)

    monkeypatch.setattr(store.os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        run(folder, source, now=NOW + timedelta(days=1))
    monkeypatch.undo()
    assert stored(folder, "ada") == b"one"
    assert files_in(folder.submitted("ada", A3)) == [f"{A3}.ipynb", "timestamp.txt"]
    # The next collect finishes it: the new time for the new notebook, the old time for the old.
    assert only_entry(run(folder, source, now=NOW + timedelta(days=2))).status == "resubmitted"
    assert stored(folder, "ada") == b"two"
    assert stamp(folder, "ada") == "2026-11-23 08:00:00 UTC\n"
    (kept,) = folder.earlier("ada", A3).glob("*.txt")
    assert kept.read_text() == STAMP


def test_bytes_that_come_back_keep_the_time_when_they_first_came(folder, source):
    for day, content in enumerate([b"one", b"two", b"one", b"two"]):
        put(source, "ada/03.ipynb", content)
        run(folder, source, now=NOW + timedelta(days=day))
    kept = folder.earlier("ada", A3) / f"{sha256(b'one').hexdigest()[:16]}.txt"
    assert kept.read_text() == STAMP


# --- refusals


@pytest.mark.parametrize("zipped", [False, True])
def test_a_notebook_that_is_too_large_leaves_a_refusal_in_its_place(
    folder, source, tmp_path, zipped
):
    with_limit(folder, 0.001)
    content = b"x" * 1001
    put(source, "ada/03.ipynb", content)
    put(source, "bob/03.ipynb", content[:1000])  # just small enough
    if zipped:
        files = {"ada/03.ipynb": content, "bob/03.ipynb": content[:1000]}
        source = make_zip(tmp_path / "all.zip", files)
    collected = run(folder, source)
    assert statuses(collected) == {"ada/03.ipynb": "refused", "bob/03.ipynb": "new"}
    place = folder.submitted("ada", A3)
    assert files_in(place) == ["refused.json", "timestamp.txt"]
    refused = json.loads((place / "refused.json").read_text())
    assert refused["bytes"] == 1001 and "larger than 0.001 MB" in refused["reason"]
    assert stamp(folder, "ada") == STAMP


def test_a_refusal_goes_when_a_notebook_comes_and_keeps_its_time_until_then(folder, source):
    with_limit(folder, 0.001)
    put(source, "ada/03.ipynb", b"x" * 2000)
    run(folder, source)
    run(folder, source, now=NOW + timedelta(days=1))
    assert stamp(folder, "ada") == STAMP
    put(source, "ada/03.ipynb", b"x")
    entry = only_entry(run(folder, source, now=NOW + timedelta(days=2)))
    assert entry.status == "new"
    assert files_in(folder.submitted("ada", A3)) == [f"{A3}.ipynb", "timestamp.txt"]
    assert stamp(folder, "ada") == "2026-11-23 08:00:00 UTC\n"


def test_a_refused_notebook_never_displaces_a_good_one(folder, source):
    with_limit(folder, 0.001)
    put(source, "a_1_2_03-1.ipynb", b"good")
    put(source, "a_1_3_03-2.ipynb", b"x" * 2000)
    put(source, "ada/03.ipynb", b"good")
    run(folder, source)
    assert stored(folder, "1") == b"good"
    put(source, "ada/03.ipynb", b"x" * 2000)
    collected = run(folder, source, now=NOW + timedelta(days=1))
    assert stored(folder, "ada") == b"good" and stamp(folder, "ada") == STAMP
    refused = [entry for entry in collected.entries if entry.status == "refused"]
    assert len(refused) == 2
    assert all("an older notebook stays" in entry.reason for entry in refused)
    assert not list(folder.root.rglob("refused.json"))


def test_only_a_few_notebooks_of_one_student_are_read(folder, source, monkeypatch):
    with_limit(folder, 0.001)
    for attempt in range(20):
        put(source, f"a_1_2_03-{attempt}.ipynb", b"x" * 2000)
    reads = []
    real = incoming._read_file
    monkeypatch.setattr(incoming, "_read_file", lambda *args: reads.append(args) or real(*args))
    counts = list(statuses(run(folder, source)).values())
    assert counts.count("refused") == len(reads) == 5
    assert counts.count("superseded") == 15
    assert files_in(folder.submitted("1", A3)) == ["refused.json", "timestamp.txt"]


@pytest.mark.parametrize("name", ["absent", "notes.txt", "broken.zip"])
def test_a_source_that_is_none_is_an_error(folder, source, name):
    put(source, "notes.txt")
    put(source, "broken.zip", b"PK not a zip")
    with pytest.raises(ClassError, match=name):
        run(folder, source / name)


# --- the report


def test_the_summary_counts_and_is_safe_to_print(folder, source):
    put(source, "ada/03.ipynb")
    put(source, "bob/\x1b[2J\u202egnp.exe")
    for number in range(30):
        put(source, f"bob/{number}.txt")
    summary = run(folder, source).summary()
    lines = summary.splitlines()
    assert lines[0] == ("1 new, 0 resubmitted, 0 unchanged, 0 superseded, 0 refused, 31 skipped")
    assert len(lines) == 1 + 20 + 1 and lines[-1] == "skipped: 11 more"
    assert all(c.isprintable() or c == "\n" for c in summary)


def test_the_source_stays_as_it_is(folder, source, tmp_path):
    put(source, "ada/03.ipynb", b"{}")
    put(source, "bob/work.zip", zip_bytes(tmp_path, {"03.ipynb": b"{}"}))
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    run(folder, source)
    run(folder, source)
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before
