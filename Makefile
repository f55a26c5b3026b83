# The commands of the course. `make` alone lists them.
# Works with GNU make 3.81 or newer on Linux, macOS and Windows (there with Git's shell).
#
#   PYTHON=python3.13   the Python that .venv is made from (default: python3, or a newer one)
#   PY=python           use this ready environment instead of .venv (conda, a GPU machine)
#   LAB=0               `make course` stops before it starts JupyterLab
#   JOBS=2              test processes

ifeq ($(OS),Windows_NT)
  PYTHON ?= python
  VENV_PY := .venv/Scripts/python.exe
else
  PYTHON ?= python3
  VENV_PY := .venv/bin/python
endif

LAB ?= 1
JOBS ?= 2

ifdef PY
  SETUP :=
  export PYTHONPATH := $(CURDIR)
else
  PY := $(VENV_PY)
  SETUP := setup
endif

TLCOURSE := $(PY) -m tlcourse.cli
UV := $(PYTHON) scripts/bootstrap.py --uv
COMPILE := pip compile --quiet --universal --generate-hashes --no-emit-index-url \
  --no-emit-find-links --custom-compile-command "make lock" --python-version 3.11
NBVAL := --nbval-lax --nbval-current-env --nbval-sanitize-with tests/sanitize.cfg \
  --nbval-cell-timeout 300 --nbval-kernel-startup-timeout 120
NOTEBOOKS := $(wildcard notebooks solutions)
# Shown once; who comes back goes straight to JupyterLab.
FIRST_RESULT := $(wildcard artifacts/first_transfer.png)

.DEFAULT_GOAL := help
.PHONY: help setup course first lab test check lint types imports products build bench gpu gpu-bench \
  lock colab site clean

help:
	@echo "make course   set up, check the machine, first result, then JupyterLab (LAB=0: stop before)"
	@echo "make first    the first result again: pre-trained against scratch, in half a minute"
	@echo "make lab      JupyterLab on the first lesson"
	@echo "make test     all tests: the library, every notebook, every solution"
	@echo "make check    style, types, import direction, notebooks against their sources"
	@echo "make build    lessons -> notebooks and solutions"
	@echo "make bench    the measurements in benchmarks"
	@echo "make gpu      the tests that need a CUDA GPU"
	@echo "make gpu-bench  the measurements on a CUDA GPU"
	@echo "make lock     compile requirements.lock again (UPGRADE=1: newest versions)"
	@echo "make colab    show that Colab's own packages stay as they are"
	@echo "make site     the lessons as web pages in site"
	@echo "make clean    remove what tools and tests left behind"

setup:
	@$(PYTHON) scripts/bootstrap.py

course: $(SETUP)
	@$(TLCOURSE) doctor
ifeq ($(FIRST_RESULT),)
	@$(TLCOURSE) first
else
	@echo "First transfer result: see $(FIRST_RESULT); make first measures it again."
endif
ifneq ($(LAB),0)
	@$(TLCOURSE) lab
endif

first: $(SETUP)
	@$(TLCOURSE) first

lab: $(SETUP)
	@$(TLCOURSE) lab

test: $(SETUP)
	@$(PY) -m pytest -n $(JOBS) --dist loadfile $(NBVAL) tests $(NOTEBOOKS)

check: lint types imports products

lint: $(SETUP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(SETUP)
	$(PY) -m mypy

imports: $(SETUP)
	@$(PY) -c "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_logo=True, no_cache=True))"

products: $(SETUP)
	$(TLCOURSE) build --check

build: $(SETUP)
	@$(TLCOURSE) build

bench: $(SETUP)
	@$(TLCOURSE) bench

gpu: $(SETUP)
	@$(PY) -m pytest -m gpu tests

gpu-bench: $(SETUP)
	@$(TLCOURSE) bench gpu_vision gpu_input gpu_text lora_step auto_compile preflight_memory

lock:
	$(UV) $(COMPILE) $(if $(UPGRADE),--upgrade) --extra dev pyproject.toml -o requirements.lock
	$(UV) $(COMPILE) $(if $(UPGRADE),--upgrade) --no-annotate scripts/uv-requirements.in -o scripts/uv-requirements.txt

colab: $(SETUP)
	@$(PY) scripts/colab_check.py

site: $(SETUP)
	@$(PY) scripts/web_pages.py

clean:
	@$(PYTHON) scripts/clean.py
