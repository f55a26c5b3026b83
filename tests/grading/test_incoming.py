"""Hostile zips and folders: nothing outside is read or written, and nobody else is stopped."""

from __future__ import annotations

import json
import os
import stat
import struct
import tracemalloc
import zipfile
from pathlib import Path

import pytest
from collecting import (
    A3,
    A4,
    files_in,
    make_zip,
    only_entry,
    put,
    run,
    statuses,
    stored,
    with_limit,
    zip_bytes,
)

from tlcourse.grading import incoming
from tlcourse.grading.class_folder import ClassError

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX files")


# --- hostile zips


def entry_named(name: str, kind: int = 0) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (kind | 0o644) << 16
    info.compress_type = zipfile.ZIP_DEFLATED
    return info


def rename_in_place(path: Path, old: bytes, new: bytes) -> Path:
    """Change a name as Python itself would not write it."""
    assert len(old) == len(new) and path.read_bytes().count(old) == 2
    path.write_bytes(path.read_bytes().replace(old, new))
    return path


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../../evil/03.ipynb", "leads outside"),
        ("ada/../../evil/03.ipynb", "leads outside"),
        ("..", "leads outside"),
        ("/etc/03.ipynb", "absolute"),
        ("//host/share/03.ipynb", "absolute"),
        ("C:/evil/03.ipynb", "absolute"),
        ("c:03.ipynb", "absolute"),
        ("ada\\03.ipynb", "backslash"),
        ("..\\..\\evil\\03.ipynb", "backslash"),
        ("ada/03.ipynbQx.txt", "NUL"),
        ("a/" * 30_000 + "03.ipynb", "60,008 characters"),
        ("", "0 characters"),
    ],
)
def test_a_zip_path_that_leads_elsewhere_is_refused(folder, tmp_path, name, reason):
    path = make_zip(tmp_path / "all.zip", [(entry_named(name), b"evil"), ("ada/04.ipynb", b"{}")])
    if reason == "NUL":
        rename_in_place(path, b"03.ipynbQx", b"03.ipynb\0x")
    before = files_in(tmp_path)
    collected = run(folder, path)
    (refused,) = (entry for entry in collected.entries if entry.status == "refused")
    assert reason in refused.reason and refused.student is None
    assert stored(folder, "ada", A4) == b"{}"
    assert stored(folder, "ada") is None
    new = set(files_in(tmp_path)) - set(before)
    assert all(each.startswith("class/submitted/ada/") for each in new)


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_a_link_or_device_in_a_zip_is_refused(folder, tmp_path, kind):
    link = entry_named("ada/03.ipynb", kind)
    path = make_zip(tmp_path / "all.zip", [(link, b"/etc/passwd"), ("bob/03.ipynb", b"{}")])
    collected = run(folder, path)
    assert statuses(collected) == {"ada/03.ipynb": "refused", "bob/03.ipynb": "new"}
    assert not (folder.root / "submitted" / "ada").exists()


def test_an_entry_without_a_name_of_its_own_stops_nobody(folder, tmp_path):
    names = [".", "./.", "./bob/./03.ipynb", "bob/"]
    path = make_zip(tmp_path / "all.zip", [(entry_named(name), b"{}") for name in names])
    assert statuses(run(folder, path)) == {"bob/03.ipynb": "new"}


@pytest.mark.parametrize("again", ["ada/03.ipynb", "./ada//03.ipynb"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_entry_that_stands_twice_is_refused(folder, tmp_path, again):
    files = [("ada/03.ipynb", b"1"), ("bob/03.ipynb", b"{}"), (again, b"2")]
    path = make_zip(tmp_path / "all.zip", files)
    collected = run(folder, path)
    assert sorted(entry.status for entry in collected.entries) == ["new", "refused", "refused"]
    assert stored(folder, "ada") is None
    refused = json.loads((folder.submitted("ada", A3) / "refused.json").read_text())
    assert "twice" in refused["reason"]


def patch_headers(path: Path, name: bytes, local: int, central: int, value: bytes) -> Path:
    """Overwrite a field in both headers of one entry, by its offset in each."""
    content = bytearray(path.read_bytes())
    for signature, size, offset in ((b"PK\3\4", 30, local), (b"PK\1\2", 46, central)):
        start = -1
        while True:
            start = content.index(signature, start + 1)
            if content[start + size :].startswith(name):
                break
        content[start + offset : start + offset + len(value)] = value
    path.write_bytes(content)
    return path


def test_an_encrypted_entry_is_refused(folder, tmp_path):
    path = make_zip(tmp_path / "all.zip", {"ada/03.ipynb": b"{}", "bob/03.ipynb": b"{}"})
    patch_headers(path, b"ada/", 6, 8, struct.pack("<H", 1))
    collected = run(folder, path)
    assert statuses(collected) == {"ada/03.ipynb": "refused", "bob/03.ipynb": "new"}
    assert collected.entries[0].reason == "encrypted"


@pytest.mark.parametrize("method", [12, 14, 99])  # bzip2, lzma, none
def test_another_compression_is_refused(folder, tmp_path, method):
    path = make_zip(tmp_path / "all.zip", {"ada/03.ipynb": b"{}", "bob/03.ipynb": b"{}"})
    patch_headers(path, b"ada/", 8, 10, struct.pack("<H", method))
    collected = run(folder, path)
    assert statuses(collected) == {"ada/03.ipynb": "refused", "bob/03.ipynb": "new"}
    assert f"method {method}" in collected.entries[0].reason


def test_damaged_bytes_are_refused(folder, tmp_path):
    content = os.urandom(2000)
    path = make_zip(tmp_path / "all.zip", {"ada/03.ipynb": content, "bob/03.ipynb": b"{}"})
    damaged = bytearray(path.read_bytes())
    damaged[500:510] = bytes(10)
    path.write_bytes(damaged)
    collected = run(folder, path)
    assert statuses(collected) == {"ada/03.ipynb": "refused", "bob/03.ipynb": "new"}
    assert "damaged" in collected.entries[0].reason


@pytest.mark.parametrize("lie", [None, 10])
def test_a_bomb_stops_at_the_limit(folder, tmp_path, monkeypatch, lie):
    """Once with its true size in the header, once with a small one."""
    with_limit(folder, 1)
    path = make_zip(tmp_path / "all.zip", {"ada/03.ipynb": bytes(50_000_000)})
    if lie:
        patch_headers(path, b"ada/", 22, 24, struct.pack("<I", lie))
    most = []
    real = zipfile.ZipExtFile.read

    def read(self, n=-1):
        content = real(self, n)
        most.append(len(content))
        return content

    monkeypatch.setattr(zipfile.ZipExtFile, "read", read)
    assert path.stat().st_size < 100_000
    assert only_entry(run(folder, path)).status == "refused"
    assert max(most, default=0) <= 1_000_001
    assert files_in(folder.submitted("ada", A3)) == ["refused.json", "timestamp.txt"]


def test_of_a_large_file_only_the_limit_is_read(folder, source):
    with_limit(folder, 1)
    os.truncate(put(source, "ada/03.ipynb"), 100_000_000)
    tracemalloc.start()
    try:
        assert only_entry(run(folder, source)).status == "refused"
        assert tracemalloc.get_traced_memory()[1] < 10_000_000  # bytes, the peak
    finally:
        tracemalloc.stop()
    refused = json.loads((folder.submitted("ada", A3) / "refused.json").read_text())
    assert refused["bytes"] == 100_000_000


def test_a_reader_that_trusts_no_header_stops_at_the_limit(tmp_path, monkeypatch):
    """zipfile itself stops at the header's size; the limit must hold without that."""
    path = make_zip(tmp_path / "a.zip", {"x.ipynb": bytes(5_000_000)})
    with zipfile.ZipFile(path) as archive:
        entry = archive.infolist()[0]
        with archive.open(entry) as opened:
            entry.file_size = 10
            monkeypatch.setattr(archive, "open", lambda info: opened)
            with pytest.raises(incoming.Refusal, match="larger than 1 MB") as caught:
                incoming._read_entry(archive, 1_000_000, entry)
    assert caught.value.size_bytes == 1_000_001


def test_a_zip_of_too_many_entries_is_refused(folder, source, tmp_path, monkeypatch):
    monkeypatch.setattr(incoming, "MAX_ENTRIES", 3)
    many = {f"{i}.txt": b"" for i in range(3)} | {"03.ipynb": b"{}"}
    put(source, f"ada/{A3}.zip", zip_bytes(tmp_path, many))
    put(source, "bob/03.ipynb")
    collected = run(folder, source)
    assert statuses(collected) == {f"ada/{A3}.zip": "refused", "bob/03.ipynb": "new"}
    assert "more than 3 entries" in collected.entries[0].reason
    assert (folder.submitted("ada", A3) / "refused.json").is_file()
    with pytest.raises(ClassError, match="at most 3 entries"):
        run(folder, make_zip(tmp_path / "all.zip", many))


def test_the_limit_of_entries_is_twenty_thousand():
    assert incoming.MAX_ENTRIES == 20_000


# --- zips of students


@pytest.mark.parametrize("zipped", [False, True])
def test_a_students_zip_is_opened_one_level(folder, source, tmp_path, zipped):
    deeper = zip_bytes(tmp_path, {f"{A4}.ipynb": b"{}"})
    inner = zip_bytes(tmp_path, {"work/03.ipynb": b"inner", "data.csv": b"", "more.zip": deeper})
    files = {"ada/work.zip": inner, f"bob_12_34_{A3}.zip": inner, "lone.zip": inner}
    for path, content in files.items():
        put(source, path, content)
    if zipped:
        source = make_zip(tmp_path / "all.zip", files)
    assert statuses(run(folder, source)) == {
        "ada/work.zip/work/03.ipynb": "new",
        "ada/work.zip/data.csv": "skipped",
        "ada/work.zip/more.zip": "skipped",
        f"bob_12_34_{A3}.zip/work/03.ipynb": "new",
        f"bob_12_34_{A3}.zip/data.csv": "skipped",
        f"bob_12_34_{A3}.zip/more.zip": "skipped",
        "lone.zip/work/03.ipynb": "refused",  # no student in the path
        "lone.zip/data.csv": "skipped",
        "lone.zip/more.zip": "skipped",
    }
    assert stored(folder, "ada") == stored(folder, "12") == b"inner"
    assert sorted(os.listdir(folder.root / "submitted")) == ["12", "ada"]


def test_the_same_rules_hold_in_a_students_zip(folder, source, tmp_path):
    with_limit(folder, 0.1)
    hostile = [
        (entry_named("../../bob/03.ipynb"), b"evil"),
        (entry_named("link/03.ipynb", stat.S_IFLNK), b"/etc/passwd"),
        (entry_named("04.ipynb"), bytes(5_000_000)),
        (entry_named("03.ipynb"), b"{}"),
    ]
    put(source, "ada/work.zip", zip_bytes(tmp_path, hostile))
    assert statuses(run(folder, source)) == {
        "ada/work.zip/../../bob/03.ipynb": "refused",
        "ada/work.zip/link/03.ipynb": "refused",
        "ada/work.zip/04.ipynb": "refused",
        "ada/work.zip/03.ipynb": "new",
    }
    assert os.listdir(folder.root / "submitted") == ["ada"]


@pytest.mark.parametrize("content", [b"PK\3\4 not a zip", b"", b"x" * 2000])
def test_a_students_zip_that_cannot_be_opened_stops_nobody(folder, source, content):
    with_limit(folder, 0.001)
    put(source, f"ada/{A3}.zip", content)
    put(source, "ada/other.zip", content)
    put(source, "bob/03.ipynb")
    assert statuses(run(folder, source)) == {
        f"ada/{A3}.zip": "refused",
        "ada/other.zip": "refused",
        "bob/03.ipynb": "new",
    }
    assert (folder.submitted("ada", A3) / "refused.json").is_file()


# --- hostile folders


@posix
def test_links_and_special_files_in_a_folder_are_skipped(folder, source, tmp_path):
    outside = put(tmp_path / "outside", "03.ipynb", b"outside")
    (source / "ada").mkdir()
    (source / "ada" / "03.ipynb").symlink_to(outside)
    (source / "bob").symlink_to(outside.parent, target_is_directory=True)
    (source / "cy").mkdir()
    os.mkfifo(source / "cy" / "03.ipynb")
    put(source, "dan/03.ipynb")
    collected = run(folder, source)
    assert statuses(collected) == {
        "ada/03.ipynb": "skipped",
        "bob": "skipped",
        "cy/03.ipynb": "skipped",
        "dan/03.ipynb": "new",
    }
    assert "symbolic link" in collected.entries[0].reason
    assert os.listdir(folder.root / "submitted") == ["dan"]


@posix
def test_a_file_that_becomes_a_link_after_the_listing_is_not_followed(
    folder, source, tmp_path, monkeypatch
):
    outside = put(tmp_path / "outside", "secret.ipynb", b"secret")
    notebook = put(source, "ada/03.ipynb")
    fifo = put(source, "bob/03.ipynb")
    real = incoming._read_file

    def swap(path, limit):
        for each in (notebook, fifo):
            each.unlink(missing_ok=True)
        notebook.symlink_to(outside)
        os.mkfifo(fifo)
        return real(path, limit)

    monkeypatch.setattr(incoming, "_read_file", swap)
    assert set(statuses(run(folder, source)).values()) == {"refused"}
    assert stored(folder, "ada") is None


@posix
def test_a_name_that_is_not_utf8_is_skipped(folder, source):
    put(source, "ada/03.ipynb")
    try:
        os.mkdir(os.fsencode(source) + b"/\xff")
        Path(os.fsdecode(os.fsencode(source) + b"/\xff/03.ipynb")).write_bytes(b"{}")
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    collected = run(folder, source)
    assert sorted(entry.status for entry in collected.entries) == ["new", "skipped"]
    collected.summary().encode()  # can be printed


@pytest.mark.parametrize("zipped", [False, True])
def test_hidden_files_are_silent_and_other_files_are_listed(folder, source, tmp_path, zipped):
    paths = [
        "ada/03.ipynb",
        "ada/.ipynb_checkpoints/03-checkpoint.ipynb",
        "ada/.03.ipynb",
        "__MACOSX/ada/._03.ipynb",
        "__MACOSX/ada/03.ipynb",
        ".git/03.ipynb",
        "ada/.DS_Store",
        "ada/report.pdf",
    ]
    for path in paths:
        put(source, path)
    if zipped:
        source = make_zip(tmp_path / "all.zip", dict.fromkeys(paths, b"{}"))
    collected = run(folder, source)
    assert statuses(collected) == {"ada/03.ipynb": "new", "ada/report.pdf": "skipped"}
