"""Verified downloads of the public data in ``data/registry.toml``.

A file reaches its place only after its hash was checked, by a rename; whatever goes wrong
before that (no network, wrong hash, truncated file, full disk) leaves nothing behind.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import sys
import tempfile
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tlcourse import locations

MIRROR_VARIABLE = "TLCOURSE_DATA_MIRROR"
TIMEOUT_SECONDS = (10, 60)  # to connect, and between two bytes


class DownloadError(RuntimeError):
    """A download that failed; the message says why and what to do."""


@dataclass(frozen=True)
class Accepted:
    """What a file must be to be accepted.

    Attributes:
        sha256: accepted hashes of the file; empty where ``content_sha256`` decides.
        size_bytes: its size, or None where accepted versions differ.
        content_sha256: hash of an archive's content (`content_digest`), or "".
        content_prefix: the members that count, for ``content_sha256``.
    """

    sha256: tuple[str, ...] = ()
    size_bytes: int | None = None
    content_sha256: str = ""
    content_prefix: str = ""


@dataclass(frozen=True)
class RegistryFile:
    """One file of an entry: its place under the download folder and where it comes from."""

    path: str
    accepted: Accepted
    urls: tuple[str, ...]
    member: str


@dataclass(frozen=True)
class Archive:
    """A zip that holds an entry's files, perhaps in an inner zip."""

    accepted: Accepted
    urls: tuple[str, ...]
    inner: str


@dataclass(frozen=True)
class Entry:
    """One data set of the registry."""

    name: str
    title: str
    licence: str
    homepage: str
    citation: str
    note: str
    files: tuple[RegistryFile, ...]
    archive: Archive | None

    @property
    def size_bytes(self) -> int | None:
        """Size of all files, or None where the registry does not fix it."""
        sizes = [file.accepted.size_bytes for file in self.files]
        return None if None in sizes else sum(size or 0 for size in sizes)


def load_registry(path: Path | None = None) -> dict[str, Entry]:
    """The entries of a registry file by name; by default the course's own."""
    path = path or locations.data_dir() / "registry.toml"
    with path.open("rb") as file:
        raw = tomllib.load(file)
    return {name: _parse_entry(name, table) for name, table in raw.items()}


def fetch(name: str, folder: Path | None = None, registry: Path | None = None) -> Path:
    """Fetch a data set of the registry, verified, unless it is there already.

    The environment variable ``TLCOURSE_DATA_MIRROR`` may name a local folder laid out like the
    registry; files then come from there and no network is used.

    Args:
        name: an entry of the registry.
        folder: download folder; by default ``downloads`` in the course's cache.
        registry: registry file; by default the course's own.

    Returns:
        The file, or for an entry of several files the folder that holds them.

    Raises:
        KeyError: if the registry has no such entry; lists the names.
        DownloadError: if no address gave the right file (no network, wrong hash, truncated),
            or the disk is full.
    """
    entries = load_registry(registry)
    if name not in entries:
        raise KeyError(f"no data set {name!r} in the registry; there are: {', '.join(entries)}")
    entry = entries[name]
    folder = folder or locations.cache_dir() / "downloads"
    missing = [file for file in entry.files if problem(folder / file.path, file.accepted)]
    if missing:
        _refuse_full_disk(folder, sum(file.accepted.size_bytes or 0 for file in missing), name)
        try:
            _bring(entry, missing, folder)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DownloadError(_full_disk(folder, name)) from error
            raise
    paths = [folder / file.path for file in entry.files]
    return paths[0] if len(paths) == 1 else paths[0].parent


def problem(path: Path, accepted: Accepted) -> str:
    """What is wrong with a file, in a few words; "" if it is right."""
    if not path.is_file():
        return "missing"
    size = path.stat().st_size
    if accepted.size_bytes is not None and size < accepted.size_bytes:
        return f"truncated: {size:,} of {accepted.size_bytes:,} bytes"
    if accepted.content_sha256:
        try:
            found = content_digest(path, accepted.content_prefix)
        except (zipfile.BadZipFile, EOFError):
            return "not a whole zip archive"
        return "" if found == accepted.content_sha256 else f"wrong content hash {found[:12]}..."
    found = file_digest(path)
    return "" if found in accepted.sha256 else f"wrong hash {found[:12]}..."


def file_digest(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_digest(path: Path, prefix: str) -> str:
    """sha256 of what a zip holds, whatever its packing.

    Over the lines ``"sha256  name"``, sorted by name, of the members whose name, less the
    outermost folder, starts with ``prefix``.
    """
    lines = []
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            name = member.partition("/")[2]
            if name.startswith(prefix) and not name.endswith("/"):
                lines.append((name, hashlib.sha256(archive.read(member)).hexdigest()))
    text = "".join(f"{digest}  {name}\n" for name, digest in sorted(lines))
    return hashlib.sha256(text.encode()).hexdigest()


def _bring(entry: Entry, files: list[RegistryFile], folder: Path) -> None:
    """Put files into ``folder``, from the mirror if one is set, else from the network."""
    folder.mkdir(parents=True, exist_ok=True)
    mirror = os.environ.get(MIRROR_VARIABLE)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as scratch:
        archive: Path | None = None
        for file in files:
            part = Path(scratch) / "part"
            if mirror:
                _copy_from_mirror(Path(mirror), file, part)
            elif file.member and entry.archive:
                archive = archive or _download_archive(entry, entry.archive, Path(scratch))
                _extract(archive, file, part)
            else:
                _download(file.urls, file.accepted, part, Path(file.path).name)
            target = folder / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(part, target)


def _copy_from_mirror(mirror: Path, file: RegistryFile, part: Path) -> None:
    source = mirror / file.path
    wrong = problem(source, file.accepted)
    if wrong:
        raise DownloadError(f"{source} ({MIRROR_VARIABLE} names its folder): {wrong}")
    shutil.copyfile(source, part)


def _download_archive(entry: Entry, archive: Archive, scratch: Path) -> Path:
    outer = scratch / "archive.zip"
    _download(archive.urls, archive.accepted, outer, f"{entry.name}.zip")
    if not archive.inner:
        return outer
    inner = scratch / "inner.zip"
    with zipfile.ZipFile(outer) as opened:
        _copy_member(opened, archive.inner, inner)
    return inner


def _extract(archive: Path, file: RegistryFile, part: Path) -> None:
    with zipfile.ZipFile(archive) as opened:
        _copy_member(opened, file.member, part)
    wrong = problem(part, file.accepted)
    if wrong:
        raise DownloadError(f"{file.member} in the downloaded archive: {wrong}")


def _copy_member(opened: zipfile.ZipFile, name: str, target: Path) -> None:
    """Copy the member with this last name part out of a zip."""
    matches = [member for member in opened.namelist() if Path(member).name == name]
    if len(matches) != 1:
        raise DownloadError(f"expected one {name} in the archive, found {len(matches)}")
    with opened.open(matches[0]) as source, target.open("wb") as copy:
        shutil.copyfileobj(source, copy)


def _download(urls: tuple[str, ...], accepted: Accepted, part: Path, label: str) -> None:
    """The first address that gives an accepted file wins."""
    failures = []
    for url in urls:
        wrong = _retrieval_failure(url, part) or problem(part, accepted)
        if not wrong:
            return
        part.unlink(missing_ok=True)
        failures.append(f"{urlsplit(url).hostname}: {wrong}")
    raise DownloadError(
        f"could not fetch {label} ({'; '.join(failures)}); check the network, or set "
        f"{MIRROR_VARIABLE} to a folder that has the files"
    )


def _retrieve(url: str, part: Path) -> None:
    import pooch

    pooch.get_logger().setLevel("WARNING")  # it would print the hash as advice to pin it
    downloader = pooch.HTTPDownloader(timeout=TIMEOUT_SECONDS, progressbar=sys.stderr.isatty())
    pooch.retrieve(url, known_hash=None, fname=part.name, path=part.parent, downloader=downloader)


def _retrieval_failure(url: str, part: Path) -> str:
    """Retrieve one address; what failed in a few words, or ""."""
    import requests

    try:
        _retrieve(url, part)
    except requests.exceptions.HTTPError as error:
        status = error.response.status_code if error.response is not None else "an error"
        return f"answered {status}"
    except requests.exceptions.ChunkedEncodingError:
        return "truncated: the connection broke off"
    except requests.exceptions.Timeout:
        return "no answer in time"
    except requests.exceptions.RequestException:
        return "no network, or the server cannot be reached"
    return ""


def _refuse_full_disk(folder: Path, needed_bytes: int, name: str) -> None:
    """Raise before anything is fetched if the disk has no room."""
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder).free < needed_bytes:
        raise DownloadError(_full_disk(folder, name))


def _full_disk(folder: Path, name: str) -> str:
    return f"the disk of {folder} is full: make room for {name}, or let TLCOURSE_CACHE name another"


def _parse_entry(name: str, table: dict[str, Any]) -> Entry:
    archive = table.get("archive")
    return Entry(
        name=name,
        title=table["title"],
        licence=table["licence"],
        homepage=table["homepage"],
        citation=table["citation"],
        note=table.get("note", ""),
        files=tuple(
            RegistryFile(
                path=file["path"],
                accepted=_parse_accepted(file),
                urls=tuple(file.get("urls", ())),
                member=file.get("member", ""),
            )
            for file in table["files"]
        ),
        archive=archive
        and Archive(_parse_accepted(archive), tuple(archive["urls"]), archive.get("inner", "")),
    )


def _parse_accepted(table: dict[str, Any]) -> Accepted:
    if not table.get("sha256") and not table.get("content_sha256"):
        raise ValueError(f"registry: no hash for {table}")
    return Accepted(
        sha256=tuple(table.get("sha256", ())),
        size_bytes=table.get("size_bytes"),
        content_sha256=table.get("content_sha256", ""),
        content_prefix=table.get("content_prefix", ""),
    )
