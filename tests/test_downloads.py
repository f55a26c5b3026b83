"""Downloads against a loopback server: right files arrive, wrong ones leave nothing behind."""

from __future__ import annotations

import errno
import hashlib
import http.server
import shutil
import threading
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest

from tlcourse import downloads, locations

CONTENT = bytes(range(256)) * 400
SHARED = Path(__file__).resolve().parents[2] / "shared" / "downloads"


class _Handler(http.server.BaseHTTPRequestHandler):
    """Serves the server's ``files``; ``cut`` paths break off half way."""

    def do_GET(self):
        body = self.server.files.get(self.path)
        self.server.requested.append(self.path)
        if body is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if self.path in self.server.cut else body)

    def log_message(self, *args):
        pass


@pytest.fixture()
def server(monkeypatch):
    monkeypatch.delenv(downloads.MIRROR_VARIABLE, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    running.files, running.cut, running.requested = {"/good.bin": CONTENT}, set(), []
    running.url = f"http://127.0.0.1:{running.server_port}"
    thread = threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


def write_registry(folder: Path, files: str, archive: str = "") -> Path:
    path = folder / "registry.toml"
    head = '[thing]\ntitle = "t"\nlicence = "MIT"\nhomepage = "h"\ncitation = "c"\n'
    path.write_text(head + archive + files)
    return path


def one_file(*urls: str, content: bytes = CONTENT, size: int | None = None) -> str:
    listed = ", ".join(f'"{url}"' for url in urls)
    digest = hashlib.sha256(content).hexdigest()
    size = len(content) if size is None else size
    return (
        f'[[thing.files]]\npath = "a/good.bin"\nsha256 = ["{digest}"]\n'
        f"size_bytes = {size}\nurls = [{listed}]\n"
    )


def assert_nothing_left(folder: Path) -> None:
    assert [path for path in folder.rglob("*") if path.is_file()] == []
    assert list(folder.glob(".partial-*")) == []


def test_fetch_puts_the_right_file_in_place_once(server, tmp_path):
    registry = write_registry(tmp_path, one_file(f"{server.url}/good.bin"))
    path = downloads.fetch("thing", tmp_path / "d", registry)
    assert path == tmp_path / "d" / "a" / "good.bin"
    assert path.read_bytes() == CONTENT
    downloads.fetch("thing", tmp_path / "d", registry)
    assert server.requested == ["/good.bin"], "a file that is there must not be fetched again"


def test_a_damaged_copy_is_fetched_again(server, tmp_path):
    registry = write_registry(tmp_path, one_file(f"{server.url}/good.bin"))
    path = downloads.fetch("thing", tmp_path / "d", registry)
    path.write_bytes(b"x" * len(CONTENT))
    assert downloads.fetch("thing", tmp_path / "d", registry).read_bytes() == CONTENT


def test_the_second_address_is_tried_when_the_first_fails(server, tmp_path):
    urls = (f"{server.url}/gone.bin", f"{server.url}/good.bin")
    registry = write_registry(tmp_path, one_file(*urls))
    assert downloads.fetch("thing", tmp_path / "d", registry).read_bytes() == CONTENT
    assert server.requested == ["/gone.bin", "/good.bin"]


@pytest.mark.parametrize(
    ("served", "cut", "message"),
    [
        ({"/good.bin": b"y" * len(CONTENT)}, False, "wrong hash"),
        ({"/good.bin": CONTENT[:-1]}, False, "truncated: 102,399 of 102,400 bytes"),
        ({"/good.bin": CONTENT}, True, "truncated"),
        ({}, False, "answered 404"),
    ],
)
def test_a_wrong_answer_is_one_clear_error_and_leaves_nothing(
    server, tmp_path, served, cut, message
):
    server.files = served
    server.cut = {"/good.bin"} if cut else set()
    registry = write_registry(tmp_path, one_file(f"{server.url}/good.bin"))
    with pytest.raises(downloads.DownloadError, match=message) as caught:
        downloads.fetch("thing", tmp_path / "d", registry)
    assert "\n" not in str(caught.value)
    assert_nothing_left(tmp_path / "d")


def test_no_network_is_one_clear_error_and_leaves_nothing(server, tmp_path):
    url = server.url
    server.shutdown()
    server.server_close()  # nobody listens on this port any more
    registry = write_registry(tmp_path, one_file(f"{url}/good.bin"))
    with pytest.raises(downloads.DownloadError, match="cannot be reached"):
        downloads.fetch("thing", tmp_path / "d", registry)
    assert_nothing_left(tmp_path / "d")


def test_a_full_disk_is_noticed_before_and_during_the_download(server, tmp_path, monkeypatch):
    registry = write_registry(tmp_path, one_file(f"{server.url}/good.bin"))
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(9, 9, len(CONTENT) - 1))
        with pytest.raises(downloads.DownloadError, match="is full"):
            downloads.fetch("thing", tmp_path / "d", registry)
    assert server.requested == []

    def no_space(url, part):
        part.write_bytes(CONTENT[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(downloads, "_retrieve", no_space)
    with pytest.raises(downloads.DownloadError, match="is full"):
        downloads.fetch("thing", tmp_path / "d", registry)
    assert_nothing_left(tmp_path / "d")


def test_an_unknown_name_lists_the_known_ones(tmp_path):
    registry = write_registry(tmp_path, one_file("http://127.0.0.1:9/x"))
    with pytest.raises(KeyError, match=r"'nothing'.*thing"):
        downloads.fetch("nothing", tmp_path, registry)


def zip_of(path: Path, members: dict[str, bytes], **options) -> bytes:
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path.read_bytes()


def test_members_come_out_of_an_inner_zip(server, tmp_path):
    inner = zip_of(tmp_path / "i.zip", {"one.txt": b"1", "two.txt": b"22"})
    outer = zip_of(tmp_path / "o.zip", {"folder/Inner.zip": inner, "folder/": b""})
    server.files["/all.zip"] = outer
    archive = (
        f'[thing.archive]\ninner = "Inner.zip"\nurls = ["{server.url}/all.zip"]\n'
        f'sha256 = ["{hashlib.sha256(outer).hexdigest()}"]\n'
    )
    files = "".join(
        f'[[thing.files]]\npath = "t/{name}"\nmember = "{name}"\n'
        f'sha256 = ["{hashlib.sha256(content).hexdigest()}"]\n'
        for name, content in {"one.txt": b"1", "two.txt": b"22"}.items()
    )
    registry = write_registry(tmp_path, files, archive)
    folder = downloads.fetch("thing", tmp_path / "d", registry)
    assert folder == tmp_path / "d" / "t"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "one.txt": b"1",
        "two.txt": b"22",
    }
    assert server.requested == ["/all.zip"], "one download serves all members"


def test_content_digest_ignores_packing_but_not_content(tmp_path):
    members = {"top-1/recordings/a.wav": b"a" * 999, "top-1/recordings/b.wav": b"b"}
    stored = tmp_path / "stored.zip"
    zip_of(stored, members)
    packed = tmp_path / "packed.zip"
    renamed = {name.replace("top-1", "top-2"): body for name, body in members.items()}
    extra = {"top-2/README": b"r", **dict(reversed(renamed.items()))}
    zip_of(packed, extra, compression=zipfile.ZIP_DEFLATED)
    digest = downloads.content_digest(stored, "recordings/")
    assert downloads.content_digest(packed, "recordings/") == digest
    zip_of(packed, {**extra, "top-2/recordings/b.wav": b"c"})
    assert downloads.content_digest(packed, "recordings/") != digest
    expected = "".join(
        f"{hashlib.sha256(body).hexdigest()}  recordings/{name}\n"
        for name, body in (("a.wav", b"a" * 999), ("b.wav", b"b"))
    )
    assert digest == hashlib.sha256(expected.encode()).hexdigest()


def test_the_registry_is_complete():
    entries = downloads.load_registry()
    assert set(entries) >= {"omniglot_small1", "omniglot_small2", "fsdd", "s-and-p-500", "cmapss"}
    for entry in entries.values():
        assert entry.title and entry.licence and entry.citation and entry.homepage
        for file in entry.files:
            assert file.urls or (file.member and entry.archive), file
            assert all(len(digest) == 64 for digest in file.accepted.sha256)
            assert not Path(file.path).is_absolute() and ".." not in file.path


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no mirror at {SHARED.name}")
@pytest.mark.parametrize(
    "name", ["omniglot_small1", "omniglot_small2", "fsdd", "s-and-p-500", "cmapss"]
)
def test_real_files_from_the_mirror_are_accepted(name, tmp_path, monkeypatch):
    monkeypatch.setenv(downloads.MIRROR_VARIABLE, str(SHARED))
    path = downloads.fetch(name, tmp_path)
    files = downloads.load_registry()[name].files
    for file in files:
        copy = tmp_path / file.path
        assert copy.read_bytes() == (SHARED / file.path).read_bytes()
        assert path in (copy, copy.parent)


def test_the_mirror_is_checked_too(tmp_path, monkeypatch):
    registry = write_registry(tmp_path, one_file("http://127.0.0.1:9/x"))
    mirror = tmp_path / "mirror"
    monkeypatch.setenv(downloads.MIRROR_VARIABLE, str(mirror))
    with pytest.raises(downloads.DownloadError, match=r"missing"):
        downloads.fetch("thing", tmp_path / "d", registry)
    (mirror / "a").mkdir(parents=True)
    (mirror / "a" / "good.bin").write_bytes(b"z" * len(CONTENT))
    with pytest.raises(downloads.DownloadError, match="wrong hash"):
        downloads.fetch("thing", tmp_path / "d", registry)
    assert_nothing_left(tmp_path / "d")


def test_downloads_land_in_the_cache_by_default(tmp_path, monkeypatch):
    monkeypatch.setenv("TLCOURSE_CACHE", str(tmp_path / "cache"))
    assert locations.cache_dir() == tmp_path / "cache"
    registry = write_registry(tmp_path, one_file("http://127.0.0.1:9/x"))
    mirror = tmp_path / "mirror" / "a"
    mirror.mkdir(parents=True)
    (mirror / "good.bin").write_bytes(CONTENT)
    monkeypatch.setenv(downloads.MIRROR_VARIABLE, str(mirror.parent))
    path = downloads.fetch("thing", registry=registry)
    assert path == tmp_path / "cache" / "downloads" / "a" / "good.bin"
