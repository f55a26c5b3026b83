"""Files of students, read without trust: nothing is extracted, followed or run.

A source is a folder, a zip or one notebook. Its files are listed first and read one at a time,
at most as many bytes as allowed, whatever a zip's header says.
"""

from __future__ import annotations

import io
import os
import re
import stat
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Literal
from zipfile import ZipInfo

from tlcourse.grading.class_settings import MEGABYTE, ClassError

MAX_ENTRIES = 20_000  # of one zip
_MAX_NAME = 1000  # characters of a path in a zip
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # others can ask for gigabytes of memory


class Refusal(Exception):
    """A file that is not taken: why, and how many bytes it has at least."""

    def __init__(self, reason: str, size_bytes: int) -> None:
        super().__init__(reason)
        self.reason = reason
        self.size_bytes = size_bytes


@dataclass(frozen=True)
class Found:
    """One file of a source.

    Attributes:
        path: relative to the source, with ``/``; inside a student's zip, below the zip's path.
        read: its content, or raises :class:`Refusal`; None for a file that is not taken.
        status, reason: what to report of a file that is not taken.
    """

    path: str
    read: Callable[[], bytes] | None = None
    status: Literal["skipped", "refused"] = "skipped"
    reason: str = ""


@contextmanager
def open_source(source: Path, limit_bytes: int) -> Iterator[Iterator[Found]]:
    """Open a source and give its files; they can be read while it is open.

    Args:
        source: a folder, a ``.zip`` or an ``.ipynb``.
        limit_bytes: a notebook, or a student's zip, that is larger is refused.

    Raises:
        ClassError: if the source is none of these, or is a zip that cannot be opened.
    """
    if source.is_dir():
        yield _select(_folder_files(source, limit_bytes), limit_bytes)
    elif source.is_file() and source.suffix.lower() == ".ipynb":
        yield iter([Found(source.name, partial(_read_file, source, limit_bytes))])
    elif source.is_file() and source.suffix.lower() == ".zip":
        try:
            archive = zipfile.ZipFile(source)
        except Exception as error:  # hostile bytes make zipfile raise errors of many kinds
            raise ClassError(f"{source}: cannot be opened as a zip: {error}") from error
        with archive:
            if len(archive.infolist()) > MAX_ENTRIES:
                raise ClassError(f"{source}: a zip must have at most {MAX_ENTRIES:,} entries")
            files = _zip_files(archive, partial(_read_entry, archive, limit_bytes))
            yield _select(files, limit_bytes)
    else:
        raise ClassError(f"{source}: expected a folder, a .zip or an .ipynb")


def _select(files: Iterator[Found], limit_bytes: int, inside: bool = False) -> Iterator[Found]:
    """Keep notebooks, open students' zips (one level), and say what is not taken."""
    for file in files:
        suffix = PurePosixPath(file.path).suffix.lower()
        if file.read is None or suffix == ".ipynb":
            yield file
        elif suffix != ".zip":
            yield Found(file.path, reason="not a notebook")
        elif inside:
            yield Found(file.path, reason="a zip in a student's zip is not opened")
        else:
            yield from _unzip(file, file.read, limit_bytes)


def _unzip(file: Found, read: Callable[[], bytes], limit_bytes: int) -> Iterator[Found]:
    """The files of a student's zip, or the zip itself as a file that is refused when read."""
    try:
        content = read()
        archive = zipfile.ZipFile(io.BytesIO(content))
        if len(archive.infolist()) > MAX_ENTRIES:
            raise Refusal(f"more than {MAX_ENTRIES:,} entries", len(content))
    except Refusal as refusal:
        yield Found(file.path, partial(_refuse, refusal.reason, refusal.size_bytes))
    except Exception as error:  # hostile bytes make zipfile raise errors of many kinds
        yield Found(file.path, partial(_refuse, f"not a zip: {error}", len(content)))
    else:
        # Opened again for each file that is read, so that one zip at a time is in memory.
        files = _zip_files(archive, partial(_read_from_zip, read, limit_bytes))
        for inner in _select(files, limit_bytes, inside=True):
            yield replace(inner, path=f"{file.path}/{inner.path}")


def _zip_files(archive: zipfile.ZipFile, read: Callable[[ZipInfo], bytes]) -> Iterator[Found]:
    entries = [(entry, _entry_path(entry)) for entry in archive.infolist()]
    count = Counter(path for _, path in entries)
    for entry, path in entries:
        problem = _entry_problem(entry)
        if problem:
            yield Found(entry.orig_filename, status="refused", reason=problem)
        elif not path or entry.is_dir() or not all(map(_is_visible, path.split("/"))):
            continue
        elif count[path] > 1:
            yield Found(path, partial(_refuse, "appears twice in the zip", entry.file_size))
        else:
            yield Found(path, partial(read, entry))


def _entry_path(entry: ZipInfo) -> str:
    return "/".join(part for part in entry.filename.split("/") if part not in ("", "."))


def _entry_problem(entry: ZipInfo) -> str:
    """Why an entry must not be touched, from the name as it stands in the zip; "" if it may."""
    name = entry.orig_filename
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if not 0 < len(name) <= _MAX_NAME:
        return f"a path of {len(name):,} characters"
    if "\0" in name or "\\" in name:
        return "a NUL or backslash in its name"
    if name.startswith("/") or re.match("[A-Za-z]:", name):
        return "an absolute path"
    if ".." in name.split("/"):
        return "its path leads outside"
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "a symbolic link or device"
    return ""


def _read_from_zip(read: Callable[[], bytes], limit_bytes: int, entry: ZipInfo) -> bytes:
    with zipfile.ZipFile(io.BytesIO(read())) as archive:
        return _read_entry(archive, limit_bytes, entry)


def _read_entry(archive: zipfile.ZipFile, limit_bytes: int, entry: ZipInfo) -> bytes:
    """Read one entry, never more than the limit: its header may lie."""
    size = entry.file_size
    if entry.flag_bits & 0x1:
        raise Refusal("encrypted", size)
    if entry.compress_type not in _METHODS:
        raise Refusal(f"compression method {entry.compress_type} (expected deflate)", size)
    try:
        with archive.open(entry) as file:
            content = file.read(limit_bytes + 1)
    except Exception as error:  # hostile bytes make zipfile raise errors of many kinds
        raise Refusal(f"damaged: {error}", size) from error
    if len(content) > limit_bytes:
        raise Refusal(_too_large(limit_bytes), max(size, len(content)))
    return content


def _folder_files(root: Path, limit_bytes: int) -> Iterator[Found]:
    errors: list[OSError] = []
    for parent, folders, files in os.walk(root, onerror=errors.append):
        folders[:] = sorted(filter(_is_visible, folders))
        for name in [*folders, *sorted(filter(_is_visible, files))]:
            path = Path(parent, name)
            relative = path.relative_to(root).as_posix()
            problem = _file_problem(path)
            if problem:
                yield Found(relative, reason=problem)
            elif name not in folders:
                yield Found(relative, partial(_read_file, path, limit_bytes))
        folders[:] = [name for name in folders if not _file_problem(Path(parent, name))]
    for error in errors:
        relative = Path(error.filename).relative_to(root).as_posix()
        yield Found(relative, reason=f"cannot be read: {error.strerror}")


def _file_problem(path: Path) -> str:
    """Why a file or folder on disk is left alone; "" if it is not."""
    try:
        path.name.encode()
        mode = path.lstat().st_mode
    except UnicodeEncodeError:
        return "its name is not UTF-8"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if stat.S_ISLNK(mode):
        return "a symbolic link"
    return "" if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else "not a regular file"


def _read_file(path: Path, limit_bytes: int) -> bytes:
    try:
        with open(path, "rb", opener=_open_no_follow) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise Refusal("not a regular file", 0)
            content = file.read(limit_bytes + 1)
    except OSError as error:
        raise Refusal(f"cannot be read: {error.strerror}", 0) from error
    if len(content) > limit_bytes:
        raise Refusal(_too_large(limit_bytes), max(status.st_size, len(content)))
    return content


def _open_no_follow(path: str, flags: int) -> int:
    # Not blocking, in case the file has become a FIFO since it was listed.
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))


def _refuse(reason: str, size_bytes: int) -> bytes:
    raise Refusal(reason, size_bytes)


def _too_large(limit_bytes: int) -> str:
    return f"larger than {limit_bytes / MEGABYTE:g} MB (limits.notebook_mb in class.toml)"


def _is_visible(name: str) -> bool:
    """Not a hidden file, such as .ipynb_checkpoints, nor what macOS adds to a zip."""
    return not name.startswith(".") and name != "__MACOSX"
