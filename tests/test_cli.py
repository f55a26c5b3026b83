"""The command line: right wiring, one line for a user's mistake."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import types
import urllib.request
from pathlib import Path

import pytest

from tlcourse import cli, downloads, locations

START_SECONDS = 180  # a server on a busy machine


def test_an_unknown_command_is_an_argparse_error(capsys):
    for arguments in ([], ["nope"], ["data"], ["lab", "--nope"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 2
        assert "usage: tlcourse" in capsys.readouterr().err


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    for command in ("doctor", "first", "lab", "build", "pretrain", "data", "grade", "bench"):
        assert re.search(rf"^ +{command} ", printed, flags=re.MULTILINE)


@pytest.mark.parametrize("command", sorted(cli.DELEGATED))
def test_a_command_hands_its_options_to_its_module(command, monkeypatch):
    name = f"tlcourse.{cli.DELEGATED[command][0]}"
    module = types.ModuleType(name)
    module.main = lambda rest: calls.append(rest) or 7
    module.__spec__ = types.SimpleNamespace(name=name)
    calls = []
    monkeypatch.setitem(sys.modules, name, module)
    assert cli.main([command, "--check", "03", "--steps", "50"]) == 7
    assert calls == [["--check", "03", "--steps", "50"]]


def test_a_part_that_is_not_there_is_named_plainly(monkeypatch, capsys):
    monkeypatch.setitem(cli.DELEGATED, "grade", ("no_such_module", ""))
    assert cli.main(["grade", "folder"]) == 1
    assert capsys.readouterr().err == "tlcourse: `tlcourse grade` is not part of this version\n"


def test_a_users_mistake_is_one_line_and_debug_shows_more(monkeypatch, capsys):
    def full(name):
        raise downloads.DownloadError("the disk\nis full")

    monkeypatch.delenv("TLCOURSE_DEBUG", raising=False)
    monkeypatch.setattr(downloads, "fetch", full)
    assert cli.main(["data", "fetch", "fsdd"]) == 1
    assert capsys.readouterr().err == "tlcourse: the disk is full\n"
    assert cli.main(["data", "fetch", "nothing"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("tlcourse: no data set 'nothing'; there are: ") and "fsdd" in error

    def bug(name):
        raise ValueError("deep inside")

    monkeypatch.setattr(downloads, "fetch", bug)
    assert cli.main(["data", "fetch", "fsdd"]) == 1
    assert "TLCOURSE_DEBUG=1" in capsys.readouterr().err
    monkeypatch.setenv("TLCOURSE_DEBUG", "1")
    with pytest.raises(ValueError, match="deep inside"):
        cli.main(["data", "fetch", "fsdd"])


def test_data_list_names_licence_and_origin(capsys):
    assert cli.main(["data", "list"]) == 0
    printed = capsys.readouterr().out
    for entry in downloads.load_registry().values():
        assert entry.name in printed and entry.licence in printed and entry.homepage in printed


def test_data_verify_notices_a_damaged_download(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TLCOURSE_CACHE", str(tmp_path))
    assert cli.main(["data", "verify"]) == 0
    assert "fsdd: not fetched" in capsys.readouterr().out
    path = tmp_path / "downloads" / "s-and-p-500" / "data.csv"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"0" * 123_698)
    assert cli.main(["data", "verify"]) == 1
    assert "s-and-p-500: wrong hash" in capsys.readouterr().out


@pytest.fixture()
def checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(locations, "repo_root", lambda: tmp_path)
    return tmp_path


def test_bench_runs_each_file_and_reports_the_failed(checkout, capfd):
    (checkout / "benchmarks").mkdir()
    (checkout / "benchmarks" / "good.py").write_text("print('good ran')")
    (checkout / "benchmarks" / "bad.py").write_text("raise SystemExit(3)")
    assert cli.main(["bench", "--list"]) == 0
    assert capfd.readouterr().out == "benchmarks: bad, good\n"
    assert cli.main(["bench", "good"]) == 0
    assert "good ran" in capfd.readouterr().out
    assert cli.main(["bench"]) == 1
    captured = capfd.readouterr()
    assert "good ran" in captured.out and "failed: bad" in captured.err
    assert cli.main(["bench", "other"]) == 1
    assert "no benchmark 'other'; there are: bad, good" in capfd.readouterr().err


def test_commands_that_need_a_checkout_say_so(monkeypatch, capsys):
    monkeypatch.setattr(locations, "repo_root", lambda: None)
    for command in ("lab", "bench"):
        assert cli.main([command]) == 1
        assert "needs a checkout" in capsys.readouterr().err


def test_lab_opens_the_first_notebook_and_no_browser_without_a_display(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "has_display", lambda: False)
    assert not any("default_url" in part for part in cli.lab_command(tmp_path))
    notebook = tmp_path / cli.FIRST_NOTEBOOK
    notebook.parent.mkdir(parents=True)
    notebook.write_text("{}")
    command = cli.lab_command(tmp_path, port=9999)
    assert command[:3] == [sys.executable, "-m", "jupyterlab"]
    assert f"--LabApp.default_url=/lab/tree/{cli.FIRST_NOTEBOOK}" in command
    assert "--no-browser" in command and "--ServerApp.port=9999" in command
    monkeypatch.setattr(cli, "has_display", lambda: True)
    assert "--no-browser" not in cli.lab_command(tmp_path)
    assert "--no-browser" in cli.lab_command(tmp_path, browser=False)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no root on Windows")
def test_lab_runs_as_root_only_by_saying_so(tmp_path, monkeypatch):
    for user, present in ((0, True), (1000, False)):
        monkeypatch.setattr(os, "geteuid", lambda user=user: user)
        assert ("--allow-root" in cli.lab_command(tmp_path)) is present


@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="always a display")
def test_a_display_is_seen_by_its_variables(monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert not cli.has_display()
    monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-0")
    assert cli.has_display()


def test_jupyterlab_does_not_ask_about_news(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    cli._quiet_first_start()
    (path,) = Path(tmp_path).rglob("overrides.json")
    settings = json.loads(path.read_text())["@jupyterlab/apputils-extension:notification"]
    assert settings == {"fetchNews": "false", "checkForUpdates": False}
    path.write_text("{}")
    cli._quiet_first_start()
    assert path.read_text() == "{}", "settings of the user's own stay"


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="stops the server by a signal")
def test_lab_really_starts_and_prints_the_address_of_the_first_notebook(tmp_path):
    """A real server: its printed address, with the token, leads to the first notebook."""
    pytest.importorskip("jupyterlab")
    root = locations.repo_root()
    if root is None or not (root / cli.FIRST_NOTEBOOK).is_file():
        pytest.skip("the first notebook is not built")
    environment = {**os.environ, "JUPYTER_CONFIG_DIR": str(tmp_path), "HOME": str(tmp_path)}
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        environment.pop(name, None)
    log = tmp_path / "log"
    with log.open("w") as file:
        command = [sys.executable, "-m", "tlcourse.cli", "lab"]
        server = subprocess.Popen(command, cwd=root, env=environment, stdout=file, stderr=file)
    try:
        address = wait_for_address(log, server)
        assert cli.FIRST_NOTEBOOK in address and "token=" in address
        with urllib.request.urlopen(address, timeout=START_SECONDS) as page:
            assert page.status == 200 and b"jupyter" in page.read().lower()
        contents = address.replace("/lab/tree/", "/api/contents/")
        with urllib.request.urlopen(contents, timeout=START_SECONDS) as page:
            assert json.load(page)["type"] == "notebook"
    finally:
        server.terminate()
        server.wait(30)


def wait_for_address(log: Path, server: subprocess.Popen) -> str:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        match = re.search(r"(http://127\.0\.0\.1:\d+/\S+token=\w+)\n", log.read_text())
        if match:
            return match[1]
        time.sleep(0.2)
    raise AssertionError(f"no address after {START_SECONDS} s:\n{log.read_text()}")
