"""A JupyterLab server and a headless Chromium on it, for browser tests and screenshots."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, Request, sync_playwright

from tlcourse.cli import lab_command

REPO = Path(__file__).resolve().parents[1]
# Chromium itself must not call out either.
_CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-color-profile=srgb",
]
# User settings: the whole notebook is in the page, and nothing asks for news or updates.
_SETTINGS: dict[str, dict[str, Any]] = {
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
# The page's own mark says "idle" before the kernel is connected, so the session is asked.
_IDLE = """() => {
  const session = window.jupyterapp?.shell.currentWidget?.context?.sessionContext;
  const kernel = session?.session?.kernel;
  return session?.isReady && kernel?.connectionStatus === 'connected' && kernel.status === 'idle';
}"""
# Every code cell that is not empty has its number, or one of them failed. The notebook's model
# is asked, as the page does not hold cells that were never in view.
_CELLS = "window.jupyterapp.shell.currentWidget.content.widgets.map(cell => cell.model)"
_ALL_RAN = f"""() => {{
  const cells = {_CELLS}.filter(cell => cell.type === 'code' && cell.sharedModel.source.trim());
  const failed = cell => cell.sharedModel.outputs.some(output => output.output_type === 'error');
  return cells.every(cell => cell.executionCount !== null) || cells.some(failed);
}}"""
_ERRORS = f"""() => {_CELLS}.filter(cell => cell.type === 'code').flatMap(
  cell => cell.sharedModel.outputs.filter(output => output.output_type === 'error').map(
    output => `${{output.ename}}: ${{output.evalue}}`))"""


def chromium() -> str | None:
    """Path of a Chromium or Chrome, or None; ``TLCOURSE_CHROMIUM`` names another."""
    named = os.environ.get("TLCOURSE_CHROMIUM")
    names = [named] if named else ["chromium", "chromium-browser", "google-chrome", "chrome"]
    return next((path for name in names if (path := shutil.which(name))), None)


@contextmanager
def server(root: Path, theme: str = "light") -> Iterator[tuple[str, str]]:
    """JupyterLab as ``make course`` starts it, on a free port, with settings of its own.

    Args:
        root: the folder that it shows.
        theme: "light" or "dark".

    Yields:
        Its address and its token.
    """
    with tempfile.TemporaryDirectory(prefix="tlcourse-lab-") as name:
        home = Path(name)
        _write_settings(home / "settings" / "@jupyterlab", theme)
        port, token = _free_port(), secrets.token_hex(16)
        command = [
            *lab_command(root, port, browser=False),
            f"--IdentityProvider.token={token}",
            "--LabApp.expose_app_in_browser=True",
        ]
        log_path = home / "server.log"
        with log_path.open("w") as log:
            process = subprocess.Popen(
                command, cwd=root, env=_environment(home), stdout=log, stderr=subprocess.STDOUT
            )
            try:
                address = f"http://127.0.0.1:{port}"
                _wait_until_up(address, token, process, log_path)
                yield address, token
            finally:
                process.terminate()
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()


class Notebook:
    """A notebook that is open in JupyterLab.

    Attributes:
        page: Playwright's page, for everything not offered here.
        problems: errors of the page and its console, and requests that failed or left the
            server, in the order of their coming.
    """

    def __init__(self, page: Page, address: str, token: str) -> None:
        self.page = page
        self.problems: list[str] = []
        self._address = address
        self._token = token
        page.on("pageerror", lambda error: self.problems.append(f"page error: {error}"))
        page.on("console", self._on_console)
        page.on("request", self._on_request)

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            where = message.location.get("url", "").removeprefix(self._address)
            self.problems.append(f"console: {message.text} ({where})")

    def _on_request(self, request: Request) -> None:
        local = (self._address, self._address.replace("http", "ws", 1), "data:", "blob:")
        if not request.url.startswith(local):
            self.problems.append(f"request to another host: {request.url}")

    def open(self, path: str, simple: bool = False) -> None:
        """Open a notebook and wait until it is drawn and its kernel is idle.

        Args:
            path: below the server's root.
            simple: only the notebook, without file browser and side bars.
        """
        mode = "doc" if simple else "lab"
        self.page.goto(f"{self._address}/{mode}/tree/{path}?reset&token={self._token}")
        self.page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=180_000)
        self.wait_idle(180)

    def wait_idle(self, timeout_seconds: float = 60) -> None:
        """Wait until the kernel is there and has nothing to do."""
        self.page.wait_for_function(_IDLE, timeout=timeout_seconds * 1000)

    def run_all(self, timeout_seconds: float = 120) -> None:
        """Run all cells and wait for the last; stops where a cell fails, as Jupyter does."""
        self.page.evaluate("window.jupyterapp.commands.execute('notebook:clear-all-cell-outputs')")
        self.page.evaluate(
            "() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); }"
        )
        self.page.wait_for_function(_ALL_RAN, timeout=timeout_seconds * 1000)
        self.wait_idle(timeout_seconds)
        self.page.wait_for_timeout(500)  # typesetting

    def cell(self, number: int) -> Locator:
        """A cell by its place in the notebook, from 0."""
        return self.page.locator(".jp-Notebook .jp-Cell").nth(number)

    def write(self, number: int, source: str) -> None:
        """Replace the text of a cell, as by select all and paste."""
        editor = self.cell(number).locator(".cm-content")
        editor.click()
        self.page.keyboard.press("ControlOrMeta+a")
        self.page.keyboard.insert_text(source)
        self.page.keyboard.press("Escape")

    def errors(self) -> list[str]:
        """Errors of cells, and of widgets that show one in place of their picture."""
        shown = self.page.locator('.jp-OutputArea [role="alert"]').all_inner_texts()
        return self.page.evaluate(_ERRORS) + shown

    def height(self) -> int:
        """Height of the notebook's content in pixels, down to the end of the last cell."""
        return self.page.evaluate(
            "() => { const o = document.querySelector('.jp-WindowedPanel-outer');"
            " const cells = document.querySelectorAll('.jp-Notebook .jp-Cell');"
            " const last = cells[cells.length - 1].getBoundingClientRect();"
            " return Math.ceil(last.bottom - o.getBoundingClientRect().top + o.scrollTop) + 8; }"
        )

    def scroll_to(self, top: int) -> int:
        """Scroll the notebook; returns where it came to stand."""
        return self.page.evaluate(
            "top => { const o = document.querySelector('.jp-WindowedPanel-outer');"
            " o.scrollTop = top; return Math.round(o.scrollTop); }",
            top,
        )


@contextmanager
def browser(executable: str) -> Iterator[Browser]:
    """Headless Chromium, or a browser of its family."""
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=executable, args=_CHROMIUM_FLAGS, headless=True
        )
        try:
            yield launched
        finally:
            launched.close()


def _write_settings(folder: Path, theme: str) -> None:
    themes = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}
    settings = {**_SETTINGS, "apputils-extension/themes": {"theme": themes[theme]}}
    for name, values in settings.items():
        path = folder / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))


def _environment(home: Path) -> dict[str, str]:
    python_path = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH", "")]))
    return {
        **os.environ,
        "PYTHONPATH": python_path,
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_DATA_DIR": str(home / "data"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
        "IPYTHONDIR": str(home / "ipython"),
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_until_up(
    address: str, token: str, process: subprocess.Popen[bytes], log: Path, max_seconds: float = 120
) -> None:
    request = urllib.request.Request(
        f"{address}/api/status", headers={"Authorization": f"token {token}"}
    )
    deadline = time.monotonic() + max_seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"JupyterLab ended with {process.returncode}:\n{log.read_text()}")
        try:
            urllib.request.urlopen(request, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not answer in {max_seconds} s:\n{log.read_text()}")
