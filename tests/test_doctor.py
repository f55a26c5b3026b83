"""The doctor: sees what is wrong, gives a remedy, and stops only for what stops the course."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from tlcourse import doctor, locations, machine
from tlcourse.doctor import Row


def write_checkpoint(folder: Path, name: str = "net", content: bytes = b"weights") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.safetensors").write_bytes(content)
    card = {"sha256": hashlib.sha256(content).hexdigest()}
    (folder / f"{name}.json").write_text(json.dumps(card))


@pytest.fixture()
def data(tmp_path, monkeypatch):
    monkeypatch.setattr(locations, "data_dir", lambda: tmp_path)
    return tmp_path / "checkpoints"


def statuses(rows: list[Row]) -> list[str]:
    return [row.status for row in rows]


def test_a_row_has_a_remedy_exactly_when_something_is_wrong():
    Row("a", "b")
    Row("a", "b", "note", "do this")
    for wrong in (("ok", "do this"), ("note", ""), ("problem", ""), ("bad", "do this")):
        with pytest.raises(ValueError):
            Row("a", "b", *wrong)


def test_whole_checkpoints_are_fine(data):
    write_checkpoint(data, "one")
    write_checkpoint(data, "two", b"others")
    (row,) = doctor.data_rows()
    assert row.status == "ok" and "one, two" in row.value


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: (d / "net.safetensors").write_bytes(b"weightz"), "sha256 is"),
        (lambda d: (d / "net.safetensors").unlink(), "net.safetensors is missing"),
        (lambda d: (d / "net.json").unlink(), "net.json is missing"),
        (lambda d: (d / "net.json").write_text("{}"), "no sha256"),
        (lambda d: (d / "net.json").write_text("not json"), "no sha256"),
    ],
)
def test_a_damaged_checkpoint_is_a_problem_with_its_remedy(data, damage, words):
    write_checkpoint(data, "good")
    write_checkpoint(data, "net")
    damage(data)
    fine, wrong = doctor.data_rows()
    assert fine.status == "ok" and "good" in fine.value and "net" not in fine.value
    assert wrong.status == "problem" and words in wrong.value
    assert "git checkout -- data/checkpoints/net" in wrong.remedy


def test_no_checkpoint_at_all_is_a_problem(data):
    data.mkdir()
    assert statuses(doctor.data_rows()) == ["problem"]


def test_the_shipped_checkpoints_match_their_cards():
    assert statuses(doctor.data_rows()) == ["ok"]


def test_an_old_python_is_a_problem(monkeypatch):
    assert statuses(doctor.python_rows()) == ["ok"]
    monkeypatch.setattr(sys, "version_info", (3, 10, 0))
    (row,) = doctor.python_rows()
    assert row.status == "problem" and "3.11" in row.remedy


def test_missing_old_and_mismatched_packages_are_problems(monkeypatch):
    versions = dict.fromkeys(doctor.NEEDED, "99.0")
    monkeypatch.setattr(doctor, "IMPORTED", ())
    monkeypatch.setattr(doctor, "_torch_mismatch", lambda: "")
    monkeypatch.setattr(doctor, "_version", versions.get)
    monkeypatch.setattr(doctor, "_lower_bounds", lambda: {"numpy": "2.0"})
    assert set(statuses(doctor.package_rows())) == {"ok"}
    versions["numpy"] = "1.26.4"
    del versions["peft"]
    monkeypatch.setattr(doctor, "_torch_mismatch", lambda: "built for torch==1.0")
    wrong = {row.name: row for row in doctor.package_rows() if row.status == "problem"}
    assert set(wrong) == {"numpy", "peft", "torchvision"}
    assert "older than 2.0" in wrong["numpy"].value
    assert wrong["peft"].value == "not installed"


def test_a_library_that_cannot_load_is_a_problem(monkeypatch):
    def broken(name):
        raise OSError("libcudart.so: cannot open shared object file\nmore")

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    rows = {row.name: row for row in doctor.package_rows()}
    assert rows["torch"].status == "problem" and "libcudart.so" in rows["torch"].value
    assert "more" not in rows["torch"].value


def test_lower_bounds_come_from_the_project(monkeypatch):
    lines = ["torch>=2.6", "ipywidgets<9,>=7.7.1", 'pytest>=8; extra == "dev"', "tqdm"]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: lines)
    assert doctor._lower_bounds() == {"torch": "2.6", "ipywidgets": "7.7.1"}


def test_little_disk_and_memory_are_notes_not_stops(monkeypatch, tmp_path):
    monkeypatch.setenv("TLCOURSE_CACHE", str(tmp_path))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, doctor.GIB // 10))
    monkeypatch.setattr(machine, "memory_bytes", lambda: (2 * doctor.GIB, doctor.GIB))
    rows = {row.name: row for row in doctor.machine_rows()}
    assert rows["disk"].status == "note" and "TLCOURSE_CACHE" in rows["disk"].remedy
    assert rows["memory"].status == "note"


def test_memory_and_cores_are_plausible():
    total, available = machine.memory_bytes()
    assert 0 < available <= total < 2**50
    psutil = pytest.importorskip("psutil")
    assert total <= psutil.virtual_memory().total * 1.01
    assert 1 <= machine.core_count() <= psutil.cpu_count()


def test_a_folder_that_cannot_be_written_is_a_problem(tmp_path):
    assert doctor._write_row("cache", tmp_path, "mend").status == "ok"
    row = doctor._write_row("cache", tmp_path / "missing", "mend")
    assert row.status == "problem" and row.remedy == "mend"


def test_a_kernel_of_another_environment_is_noticed(monkeypatch):
    kernelspec = pytest.importorskip("jupyter_client.kernelspec")
    spec = namedtuple("spec", "argv")
    for program, status in (
        ("python", "ok"),
        (sys.executable, "ok"),
        ("/nowhere/bin/python", "note"),
    ):
        found = spec([program, "-m", "ipykernel_launcher"])
        monkeypatch.setattr(
            kernelspec.KernelSpecManager, "get_kernel_spec", lambda self, name, found=found: found
        )
        assert doctor._kernel_row().status == status, program


def test_no_sandbox_is_only_a_note(monkeypatch):
    sandbox = pytest.importorskip("tlcourse.grading.sandbox")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    sandbox._tried.cache_clear()
    assert statuses(doctor.sandbox_rows()) == ["note"]
    sandbox._tried.cache_clear()


def test_a_check_that_crashes_does_not_end_the_report(monkeypatch, capsys):
    def broken_rows():
        raise RuntimeError("boom")

    monkeypatch.setattr(doctor, "CHECKS", (broken_rows, doctor.python_rows))
    assert doctor.main() == 1
    printed = capsys.readouterr().out
    assert "boom" in printed and "python" in printed and "cannot run yet: broken" in printed


def test_only_problems_decide_the_exit_code(monkeypatch, capsys):
    rows = [Row("a", "fine"), Row("b", "so-so", "note", "mend b")]
    monkeypatch.setattr(doctor, "CHECKS", (lambda: rows,))
    assert doctor.main() == 0
    assert "-> mend b" in capsys.readouterr().out


def test_this_environment_can_run_the_course():
    assert [row for row in doctor.examine() if row.status == "problem"] == []
