"""Run a notebook and keep its outputs: clean, small, and the same on every run."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

from tlcourse.notebooks import is_code

MAX_NOTEBOOK_BYTES = 600_000
MAX_WIDGET_STATE_BYTES = 200_000
CELL_TIMEOUT_SECONDS = 600
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
WIDGET_STATE = "application/vnd.jupyter.widget-state+json"
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_PROGRESS = re.compile(r"\d+%\|.*\||\d+it \[\d\d:\d\d|^\s*$")


class BuildError(RuntimeError):
    """A notebook that cannot be published; the message says which cell, and why."""


def execute(nb: NotebookNode, name: str, root: Path) -> float:
    """Run all cells in a fresh kernel and put clean outputs into the notebook.

    The kernel works in a temporary folder, so that nothing is left behind.

    Args:
        nb: changed in place.
        name: of the notebook, for messages and widget ids.
        root: the repository; its ``tlcourse`` is the one that is imported.

    Returns:
        Wall time in seconds, the start of the kernel included.

    Raises:
        BuildError: if a cell fails, a widget shows an error, or an output must not be seen.
    """
    language = nb.metadata.language_info
    with tempfile.TemporaryDirectory(prefix="tlcourse-build-") as folder:
        client = NotebookClient(
            nb,
            timeout=CELL_TIMEOUT_SECONDS,
            kernel_name="python3",
            record_timing=False,
            resources={"metadata": {"path": folder}},
        )
        started = time.perf_counter()
        log = Path(folder, "kernel.log")
        try:
            with log.open("wb") as stderr:
                client.execute(env=_environment(root, folder), stderr=stderr)
        except (CellExecutionError, CellTimeoutError) as error:
            raise BuildError(_failure(nb, name, error)) from error
        except (DeadKernelError, RuntimeError) as error:
            last = log.read_text(encoding="utf-8", errors="replace")[-2000:]
            raise BuildError(f"{_failure(nb, name, error)}\n{last}") from error
        seconds = time.perf_counter() - started
        hidden = {str(Path(folder).resolve()): ".", folder: ".", str(root): "."}
    nb.metadata.language_info = language
    problems = clean(nb, name, hidden)
    if problems:
        raise BuildError("\n".join(problems))
    return seconds


def clean(nb: NotebookNode, name: str, hidden: dict[str, str] | None = None) -> list[str]:
    """Make outputs fit to publish.

    Progress bars go; addresses in memory and the builder's folders are masked. A widget that
    has HTML beside it is kept as that HTML: without a kernel its controls would be dead. Other
    widgets keep their state, with fixed ids, unless it is large.

    Args:
        nb: an executed notebook, changed in place.
        name: makes the widget ids.
        hidden: text -> what stands for it, in text outputs.

    Returns:
        What a learner must not see: warnings, errors in widgets, outputs without text.
    """
    problems = [f"{name}: {problem}" for problem in _widget_errors(nb)]
    for cell in filter(is_code, nb.cells):
        cell.metadata.pop("execution", None)
        cell.outputs = _merged([out for out in cell.outputs if not _is_progress(out)])
        for output in cell.outputs:
            _mask(output, hidden or {})
            problems += [f"{name}: {p} (cell {_first_line(cell)})" for p in _unseemly(cell, output)]
            if "text/html" in output.get("data", {}):
                output.data.pop(WIDGET_VIEW, None)
    _drop_unseen_models(nb)
    _fix_widget_ids(nb, name)
    if len(json.dumps(nb.metadata.get("widgets", {}))) > MAX_WIDGET_STATE_BYTES:
        drop_widgets(nb)
    return problems


def drop_widgets(nb: NotebookNode) -> None:
    """Remove widget state, and the views that need it; their HTML and text stay."""
    nb.metadata.pop("widgets", None)
    for cell in filter(is_code, nb.cells):
        for output in cell.outputs:
            output.get("data", {}).pop(WIDGET_VIEW, None)


def as_bytes(nb: NotebookNode, name: str) -> bytes:
    """The notebook as its file; if it is too large, without widget state.

    Raises:
        BuildError: if it is larger than 600 kB; names the largest output.
    """
    nbformat.validate(nb)
    data = (nbformat.writes(nb, version=nbformat.NO_CONVERT).rstrip("\n") + "\n").encode()
    if len(data) <= MAX_NOTEBOOK_BYTES:
        return data
    if "widgets" in nb.metadata:
        drop_widgets(nb)
        return as_bytes(nb, name)
    sizes = [
        (len(json.dumps(output)), cell)
        for cell in filter(is_code, nb.cells)
        for output in cell.outputs
    ]
    if not sizes:
        raise BuildError(f"{name}: {len(data) // 1000} kB of text; at most 600 kB")
    largest, cell = max(sizes, key=lambda pair: pair[0])
    raise BuildError(
        f"{name}: {len(data) // 1000} kB, at most {MAX_NOTEBOOK_BYTES // 1000} kB; the largest "
        f"output has {largest // 1000} kB, of cell {cell.id} ({_first_line(cell)})"
    )


def _environment(root: Path, folder: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))
    return {
        **os.environ,
        "PYTHONPATH": path,
        "PYTHONHASHSEED": "0",
        "IPYTHONDIR": folder,  # nobody's own start-up files
        "JUPYTER_PLATFORM_DIRS": "1",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "TQDM_DISABLE": "1",
        "TLCOURSE_BUILD": "1",  # explorers try both ends of every control
    }


def _failure(nb: NotebookNode, name: str, error: Exception) -> str:
    failed = [
        cell
        for cell in filter(is_code, nb.cells)
        if any(output.output_type == "error" for output in cell.outputs)
    ]
    # Without an error output the kernel was stopped or died: the first cell without a count.
    failed = failed or [cell for cell in filter(is_code, nb.cells) if not cell.execution_count]
    source = "\n".join(f"    {line}" for line in failed[0].source.split("\n")) if failed else ""
    for output in failed[0].outputs if failed else []:
        if output.output_type == "error":
            return f"{name}: a cell fails\n{source}\n" + _ANSI.sub("", "\n".join(output.traceback))
    return f"{name}: a cell fails\n{source}\n{type(error).__name__}: {error}"


def _widget_errors(nb: NotebookNode) -> list[str]:
    """Errors that a widget caught and shows, which the cell itself does not report."""
    problems = []
    state = nb.metadata.get("widgets", {}).get(WIDGET_STATE, {}).get("state", {})
    for model in state.values():
        fields = model.get("state", {})
        for output in fields.get("outputs", []):
            if output.get("output_type") == "error":
                problems.append(f"a widget shows {output.get('ename')}: {output.get('evalue')}")
            elif output.get("name") == "stderr" and not _is_progress(output):
                problems.append(f"a widget shows on stderr: {output.get('text', '')[-500:]}")
        for value in fields.values():
            if isinstance(value, str) and ('role="alert"' in value or "Traceback (most" in value):
                text = " ".join(re.sub(r"<[^>]*>", " ", value).split())
                problems.append(f"a widget shows an error: {text[-500:]}")
    return problems


def _unseemly(cell: NotebookNode, output: NotebookNode) -> list[str]:
    """What a learner should not meet in an output."""
    tags = cell.metadata.get("tags", [])
    if output.output_type == "stream" and output.name == "stderr" and "allow-warning" not in tags:
        return [f"prints to stderr: {output.text.strip()[-500:]!r}; mend it or tag allow-warning"]
    if "data" in output and not {"text/plain", "text/html"} & set(output.data):
        return [f"an output of {sorted(output.data)} without text/html or text/plain"]
    if output.output_type == "error" and "raises-exception" not in tags:
        return [f"shows {output.ename}: {output.evalue}"]
    return []


def _is_progress(output: NotebookNode) -> bool:
    """A bar of tqdm: as text on stderr, or as a widget with that text beside it."""
    data = output.get("data", {})
    if WIDGET_VIEW in data:
        return _PROGRESS.search(data.get("text/plain", " ")) is not None
    if output.get("name") != "stderr":
        return False
    lines = re.split(r"[\r\n]+", _ANSI.sub("", output.text))
    return all(_PROGRESS.search(line) for line in lines)


def _merged(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Join pieces of one stream: where it is cut is a matter of time."""
    merged: list[NotebookNode] = []
    for output in outputs:
        last = merged[-1] if merged else {}
        if output.output_type == "stream" and last.get("name") == output.name:
            last["text"] += output.text
        else:
            merged.append(output)
    return merged


def _mask(output: NotebookNode, hidden: dict[str, str]) -> None:
    def masked(text: str) -> str:
        for found, shown in sorted(hidden.items(), key=lambda pair: -len(pair[0])):
            text = text.replace(found, shown)
        text = re.sub(r"ipykernel_\d+[/\\]\d+", "ipykernel", text)
        return re.sub(r" at 0x[0-9a-fA-F]{6,}", " at 0x...", text)

    if output.output_type == "stream":
        output.text = masked(output.text)
    for kind, content in output.get("data", {}).items():
        if kind.startswith("text/") and isinstance(content, str):
            output.data[kind] = masked(content)
    if output.output_type == "error":
        output.traceback = [masked(_ANSI.sub("", line)) for line in output.traceback]


def _drop_unseen_models(nb: NotebookNode) -> None:
    """Keep the state only of widgets that an output shows, and of what these refer to."""
    state = nb.metadata.get("widgets", {}).get(WIDGET_STATE, {}).get("state", {})
    outputs = [out for cell in filter(is_code, nb.cells) for out in cell.outputs]
    views = [out["data"][WIDGET_VIEW] for out in outputs if WIDGET_VIEW in out.get("data", {})]
    todo = [view.get("model_id") for view in views]
    seen: set[str] = set()
    while todo:
        model = todo.pop()
        if model in state and model not in seen:
            seen.add(model)
            todo += re.findall(r"IPY_MODEL_(\w+)", json.dumps(state[model]))
    for model in set(state) - seen:
        del state[model]
    if "widgets" in nb.metadata and not state:
        del nb.metadata["widgets"]


def _fix_widget_ids(nb: NotebookNode, name: str) -> None:
    """Replace the random ids of widget models by ones that follow from their order."""
    state = nb.metadata.get("widgets", {}).get(WIDGET_STATE, {}).get("state", {})
    fixed = {
        old: hashlib.sha256(f"{name}:{i}".encode()).hexdigest()[:32] for i, old in enumerate(state)
    }
    if not fixed:
        return
    pattern = re.compile("|".join(fixed))

    def renamed(part: NotebookNode | dict | list) -> NotebookNode:
        text = pattern.sub(lambda match: fixed[match.group()], json.dumps(part))
        return nbformat.from_dict(json.loads(text))

    nb.metadata.widgets = renamed(nb.metadata.widgets)
    for cell in filter(is_code, nb.cells):
        cell.outputs = [renamed(output) for output in cell.outputs]


def _first_line(cell: NotebookNode) -> str:
    return repr(cell.source.strip().split("\n")[0][:60])
