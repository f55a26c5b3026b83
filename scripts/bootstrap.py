"""Make the course's environment `.venv` from requirements.lock; nothing else is needed.

    python3 scripts/bootstrap.py            make or repair .venv; at once when it is ready
    python3 scripts/bootstrap.py --uv ...   run the uv that the course uses

Standard library only. It is written without newer syntax (no f-strings, no annotations), so
that an old Python gets as far as saying what is missing. All that it writes lies in the
repository: `.venv`, and `.tools` with a private uv and its cache where there is no uv.
"""

from __future__ import print_function

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time

OLDEST_PYTHON = (3, 11)
OLDEST_UV = (0, 8)  # the first with `uv venv --clear`
OTHER_PYTHONS = ("python3.13", "python3.12", "python3.11", "python3.14")

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
TOOLS = os.path.join(ROOT, ".tools")
LOCK = os.path.join(ROOT, "requirements.lock")
PROJECT = os.path.join(ROOT, "pyproject.toml")
UV_LOCK = os.path.join(ROOT, "scripts", "uv-requirements.txt")
STAMP = os.path.join(VENV, "tlcourse-ready.json")
UNFINISHED = os.path.join(VENV, "tlcourse-unfinished")

NO_PYTHON = """\
The course needs Python {need} or newer; {found}.
  Debian, Ubuntu   sudo apt install python3.12 python3.12-venv
  macOS            brew install python@3.12
  Windows          winget install Python.Python.3.12
Then name it, if it is not found by itself: make course PYTHON=python3.12"""

NO_VENV = """\
{python} cannot make a virtual environment: its venv or ensurepip part is missing.
  Debian, Ubuntu   sudo apt install python{version}-venv
  or install uv    (any way that puts `uv` on the PATH)
Then run this again."""

NO_INSTALL = """\
Installing stopped (exit code {code}); the lines above say why. The usual reasons are no network
and a full disk (the environment takes up to 7 GB). Run the same command again: what has been
downloaded is kept."""


class Stop(Exception):
    """Ends the set-up with a message for the user."""


def main(argv):
    try:
        if argv[:1] == ["--uv"]:
            reexec = under_good_python(argv)
            return run_uv(argv[1:]) if reexec is None else reexec
        if argv:
            raise Stop("unknown argument {0!r}; the only option is --uv".format(argv[0]))
        if is_ready():
            return 0
        reexec = under_good_python(argv)
        if reexec is not None:
            return reexec
        install()
        return 0
    except Stop as stop:
        print("\n" + str(stop), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. Run the same command again to go on.", file=sys.stderr)
        return 130


def is_ready():
    """Whether `.venv` was finished from just these lock and project files."""
    stamp = read_stamp()
    if stamp is None or os.path.exists(UNFINISHED) or not os.path.exists(venv_program("python")):
        return False
    if os.environ.get("PYTHON") and version_text(sys.version_info) != stamp.get("python"):
        return False  # another Python was asked for by name
    return stamp.get("digest") == digest(stamp.get("python"))


def read_stamp():
    try:
        with open(STAMP) as file:
            return json.load(file)
    except (OSError, IOError, ValueError):
        return None


def digest(python_version):
    """sha256 over lock, project file, Python version and place (entry points hold paths)."""
    sha = hashlib.sha256()
    for path in (LOCK, PROJECT):
        with open(path, "rb") as file:
            sha.update(file.read())
    sha.update("{0} {1}".format(python_version, ROOT).encode("utf-8"))
    return sha.hexdigest()


def under_good_python(argv):
    """Run this script again under a Python that is new enough, if this one is not.

    Gives the exit code of that run, or None where this Python is good.
    """
    if sys.version_info >= OLDEST_PYTHON:
        return None
    found = "this is {0} ({1})".format(version_text(sys.version_info, 3), sys.executable)
    if not os.environ.get("PYTHON"):
        for name in OTHER_PYTHONS:
            if is_good_python(name):
                say("{0}, so {1} is used".format(found, name))
                return subprocess.call([name, os.path.abspath(__file__)] + argv)
    raise Stop(NO_PYTHON.format(need=".".join(map(str, OLDEST_PYTHON)), found=found))


def is_good_python(name):
    """Whether `name` starts (a shim may not) and is new enough."""
    code = "import sys; sys.exit(sys.version_info < {0!r})".format(OLDEST_PYTHON)
    return quiet_call([name, "-c", code]) == 0


def install():
    started = time.time()
    uv = find_uv(make=True)
    version = version_text(sys.version_info)
    if must_start_anew(version):
        say("[1/3] environment .venv with Python {0}".format(version_text(sys.version_info, 3)))
        base = getattr(sys, "_base_executable", None) or sys.executable
        options = ["venv", "--quiet", "--clear", "--no-project", "--prompt", "tlcourse"]
        call_uv(uv, options, ["--python", base])
    open(UNFINISHED, "w").close()
    say("[2/3] the packages of requirements.lock (the first time up to 3 GB of downloads)")
    # Sync also takes away what the lock does not name, so the course comes after it each time.
    # Compiled once, now: the sandbox that grades sees the environment read-only, and every
    # notebook starts a Python of its own.
    options = ["pip", "sync", "--require-hashes", "--compile-bytecode"]
    call_uv(uv, options, ["--python", venv_program("python"), LOCK])
    say("[3/3] the course itself")
    options = ["pip", "install", "--no-deps", "--no-build-isolation"]
    call_uv(uv, options, ["--python", venv_program("python"), "--editable", ROOT])
    with open(STAMP, "w") as file:
        json.dump({"digest": digest(version), "python": version}, file)
    os.remove(UNFINISHED)
    say("ready after {0:.0f} s".format(time.time() - started))


def must_start_anew(version):
    """True unless `.venv` is whole, works, and has the wanted Python.

    An installation that was cut off may have left half a package behind, which `uv pip sync`
    takes for a whole one. Starting anew costs seconds: the downloads are cached.
    """
    python = venv_program("python")
    if os.path.exists(UNFINISHED) or not os.path.exists(python):
        return True
    code = "import sys; sys.exit('%d.%d' % sys.version_info[:2] != {0!r})".format(version)
    return quiet_call([python, "-c", code]) != 0


def find_uv(make=False):
    """Path of a uv that is new enough: from PATH, else from `.tools` (made on demand)."""
    for uv in (shutil.which("uv"), program(TOOLS, "uv")):
        if uv and uv_version(uv) >= OLDEST_UV:
            return uv
    if not make:
        return None
    say("[0/3] uv, the installer, into .tools")
    if quiet_call([sys.executable, "-m", "venv", "--clear", TOOLS]) != 0:
        version = version_text(sys.version_info)
        raise Stop(NO_VENV.format(python=sys.executable, version=version))
    options = ["--require-hashes", "--only-binary", ":all:", "--no-cache-dir", "--quiet"]
    pip = [program(TOOLS, "python"), "-m", "pip", "--disable-pip-version-check", "install"]
    code = subprocess.call(pip + options + ["-r", UV_LOCK], cwd=ROOT, env=clean_environment())
    if code != 0:
        raise Stop(NO_INSTALL.format(code=code))
    return program(TOOLS, "uv")


def uv_version(uv):
    try:
        text = subprocess.check_output([uv, "--version"], stderr=subprocess.STDOUT)
    except (OSError, subprocess.CalledProcessError):
        return (0,)
    match = re.match(r"uv (\d+)\.(\d+)", text.decode("utf-8", "replace"))
    return tuple(int(part) for part in match.groups()) if match else (0,)


def run_uv(arguments):
    """uv with the user's arguments; gives its exit code."""
    uv = find_uv(make=True)
    return subprocess.call([uv] + arguments, cwd=ROOT, env=uv_environment(uv))


def call_uv(uv, options, arguments):
    target = [VENV] if options[0] == "venv" else []
    command = [uv] + options + arguments + target
    code = subprocess.call(command, cwd=ROOT, env=uv_environment(uv))
    if code != 0:
        raise Stop(NO_INSTALL.format(code=code))


def uv_environment(uv):
    """The user's environment, less what would lead uv elsewhere."""
    environment = clean_environment()
    environment["UV_PYTHON_DOWNLOADS"] = "never"  # it would be put outside the repository
    environment.setdefault("UV_HTTP_TIMEOUT", "300")
    environment.setdefault("UV_HTTP_RETRIES", "5")
    if system_certificates():  # a company's or school's own root is only there
        environment.setdefault("UV_SYSTEM_CERTS", "true")
        environment.setdefault("UV_NATIVE_TLS", "true")  # its name in older versions
    if os.path.dirname(os.path.dirname(uv)) == TOOLS:
        environment.setdefault("UV_CACHE_DIR", os.path.join(TOOLS, "cache"))
    return environment


def system_certificates():
    """Whether the system has certificates; a bare container may have none, uv brings its own."""
    if os.name == "nt" or sys.platform == "darwin":
        return True
    import ssl

    paths = ssl.get_default_verify_paths()
    return bool(paths.cafile or (paths.capath and os.listdir(paths.capath)))


def clean_environment():
    dropped = ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH", "PYTHONHOME", "__PYVENV_LAUNCHER__")
    return {name: value for name, value in os.environ.items() if name not in dropped}


def venv_program(name):
    return program(VENV, name)


def program(environment, name):
    if os.name == "nt":
        return os.path.join(environment, "Scripts", name + ".exe")
    return os.path.join(environment, "bin", name)


def version_text(version_info, parts=2):
    return ".".join(str(part) for part in version_info[:parts])


def quiet_call(command):
    """Exit code of a command without its output; 127 where it cannot start."""
    try:
        with open(os.devnull, "w") as nothing:
            return subprocess.call(command, stdout=nothing, stderr=nothing, env=clean_environment())
    except OSError:
        return 127


def say(text):
    print("tlcourse set-up: " + text)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
