"""The command `tlcourse`: doctor, first, lab, build, pretrain, data, grade, bench."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tlcourse import downloads, locations

FIRST_NOTEBOOK = "notebooks/part1_foundations/00_start_here.ipynb"
# Command -> module whose main(argv) has it, with its own options, and the line of help.
DELEGATED = {
    "first": ("first", "a first transfer result on real data, in under half a minute"),
    "build": ("authoring", "make notebooks and solutions from the lessons"),
    "pretrain": ("pretrain", "rebuild an embedded checkpoint"),
    "grade": ("grading.cli", "hand out, collect, grade and return exercises"),
}


class UserError(Exception):
    """Ends a command with one line for the user."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit code. What a user can mend ends in one line, not a traceback.

    The environment variable ``TLCOURSE_DEBUG=1`` shows the traceback all the same.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (UserError, downloads.DownloadError) as error:
        print(f"tlcourse: {_one_line(error)}", file=sys.stderr)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        if os.environ.get("TLCOURSE_DEBUG"):
            raise
        print(f"tlcourse: {_one_line(error)} (TLCOURSE_DEBUG=1 shows where)", file=sys.stderr)
    return 1


def lab_command(root: Path, port: int | None = None, browser: bool | None = None) -> list[str]:
    """The command that opens JupyterLab on the first notebook.

    Args:
        root: the checkout; JupyterLab shows its files.
        port: None lets JupyterLab choose (8888 or the next free one).
        browser: whether to open one; None opens one where there is a display.
    """
    command = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={root}"]
    if (root / FIRST_NOTEBOOK).is_file():
        command.append(f"--LabApp.default_url=/lab/tree/{FIRST_NOTEBOOK}")
    if not (has_display() if browser is None else browser):
        command.append("--no-browser")
    if port is not None:
        command += [f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")  # the usual case in a container
    return command


def has_display() -> bool:
    """Whether a browser window can open: always on macOS and Windows, else with X or Wayland."""
    if sys.platform in ("darwin", "win32"):
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _run(arguments: list[str]) -> int:
    if arguments and arguments[0] in DELEGATED:
        return _delegate(arguments[0], arguments[1:])
    options = _parser().parse_args(arguments)
    action: Callable[[argparse.Namespace], int] = options.action
    return action(options)


def _delegate(command: str, rest: list[str]) -> int:
    module, _ = DELEGATED[command]
    if importlib.util.find_spec(f"tlcourse.{module}") is None:
        raise UserError(f"`tlcourse {command}` is not part of this version")
    return importlib.import_module(f"tlcourse.{module}").main(rest)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tlcourse", description="The transfer learning course.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    doctor = commands.add_parser("doctor", help="can the course run here, and what mends it")
    doctor.set_defaults(action=_doctor)
    for name, (_, text) in DELEGATED.items():
        commands.add_parser(name, help=text, add_help=False)

    lab = commands.add_parser("lab", help="JupyterLab on the first lesson")
    lab.add_argument("--port", type=int, help="use just this port")
    lab.add_argument("--no-browser", action="store_true", help="print the address only")
    lab.set_defaults(action=_lab)

    data = commands.add_parser("data", help="public data of the full profile").add_subparsers(
        metavar="ACTION", required=True
    )
    data.add_parser("list", help="what the registry has").set_defaults(action=_data_list)
    fetch = data.add_parser("fetch", help="fetch data sets, verified")
    fetch.add_argument("name", nargs="+", help="as listed, or `all`")
    fetch.set_defaults(action=_data_fetch)
    verify = data.add_parser("verify", help="check what is here against its sha256")
    verify.set_defaults(action=_data_verify)

    bench = commands.add_parser("bench", help="run the measurements in benchmarks")
    bench.add_argument("name", nargs="*", help="only these; all by default")
    bench.add_argument("--list", action="store_true", help="only list them")
    bench.set_defaults(action=_bench)
    return parser


def _doctor(options: argparse.Namespace) -> int:
    from tlcourse import doctor

    return doctor.main()


def _lab(options: argparse.Namespace) -> int:
    root = _checkout("lab")
    if importlib.util.find_spec("jupyterlab") is None:
        raise UserError("no JupyterLab here: make course, or pip install 'tlcourse[lab]'")
    _quiet_first_start()
    command = lab_command(root, options.port, browser=False if options.no_browser else None)
    if "--no-browser" in command:
        print("No browser is opened: copy the address with its token from the lines below.")
    sys.stdout.flush()
    if os.name == "posix":
        os.execv(command[0], command)  # so that Ctrl-C and signals reach the server itself
    return subprocess.call(command)


def _quiet_first_start() -> None:
    """Tell this environment's JupyterLab not to ask about news or look for updates."""
    path = Path(sys.prefix, "share", "jupyter", "lab", "settings", "overrides.json")
    if path.exists():
        return
    settings = {"fetchNews": "false", "checkForUpdates": False}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"@jupyterlab/apputils-extension:notification": settings}))
    except OSError:
        pass  # an environment that is not ours to write; JupyterLab then asks once


def _data_list(options: argparse.Namespace) -> int:
    for entry in downloads.load_registry().values():
        size = f"{entry.size_bytes / 2**20:.1f} MiB" if entry.size_bytes else "size varies"
        print(f"{entry.name}\n    {entry.title}\n    {entry.licence}; {size}; {entry.homepage}")
        if entry.note:
            print(f"    {entry.note}")
    return 0


def _data_fetch(options: argparse.Namespace) -> int:
    known = list(downloads.load_registry())
    names = known if options.name == ["all"] else options.name
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"no data set {unknown[0]!r}; there are: {', '.join(known)}")
    for name in names:
        print(f"{name}: {downloads.fetch(name)}")
    return 0


def _data_verify(options: argparse.Namespace) -> int:
    from tlcourse import doctor

    rows = doctor.data_rows()
    for row in rows:
        print(f"{row.name}: {row.value}")
    wrong = sum(row.status == "problem" for row in rows)
    folder = locations.cache_dir() / "downloads"
    for entry in downloads.load_registry().values():
        found = {downloads.problem(folder / file.path, file.accepted) for file in entry.files}
        state = "; ".join(sorted(found - {""})) or "ok"
        print(f"{entry.name}: {'not fetched' if found == {'missing'} else state}")
        wrong += state not in ("ok", "missing")
    return 1 if wrong else 0


def _bench(options: argparse.Namespace) -> int:
    root = _checkout("bench")
    scripts = {path.stem: path for path in sorted(root.glob("benchmarks/*.py"))}
    unknown = [name for name in options.name if name not in scripts]
    if unknown:
        raise UserError(f"no benchmark {unknown[0]!r}; there are: {', '.join(scripts) or 'none'}")
    chosen = {name: scripts[name] for name in options.name or scripts}
    print(f"benchmarks: {', '.join(chosen) or 'none'}", flush=True)
    if options.list:
        return 0
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    failed = []
    for name, path in chosen.items():
        print(f"\n== {name}", flush=True)
        if subprocess.call([sys.executable, str(path)], cwd=root, env=environment) != 0:
            failed.append(name)
    if failed:
        raise UserError(f"failed: {', '.join(failed)}")
    return 0


def _checkout(command: str) -> Path:
    root = locations.repo_root()
    if root is None:
        raise UserError(f"`tlcourse {command}` needs a checkout of the course, not only the wheel")
    return root


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
