# `make demo` shows zeta at work, `make test` checks it. Both need Python 3.11 or newer, make and git;
# everything else goes into .venv. pip's own settings (pip.conf, PIP_INDEX_URL, ...) are honoured.

PYTHON ?= $(shell for name in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$name && break; done)
VENV = .venv
CONSTRAINTS = constraints.txt
VENV_PYTHON = $(VENV)/bin/python
INSTALL_INPUTS = pyproject.toml $(CONSTRAINTS)
TORCH_GB ?= 6
MINUTES ?= 4
# What `make test-oldest` and `make test-pythons` run on.
OLDEST_PYTHON = python3.11
NEWER_PYTHONS = python3.12 python3.13
# Files of tests go to as many processes as there are cores, up to 8; those of Slurm share a cluster.
PARALLEL = -n auto --maxprocesses 8 --dist loadfile

.PHONY: help demo lint docs test test-fast test-gpu test-oldest test-pythons bench-gpu \
	check-python check-disk debian-tools
.DELETE_ON_ERROR:

help:
	@echo 'make demo       install into .venv, then shards -> training -> export -> report, on this CPU'
	@echo 'make lint       style, types and directions of imports'
	@echo 'make docs       docs/config.md, from the dataclasses of the config'
	@echo 'make test       lint, then all tests; installs what they need'
	@echo 'make test-fast  those of a few seconds at most: two minutes on two idle cores'
	@echo 'make test-gpu   the tests that need a GPU'
	@echo 'make test-oldest   test-fast with the oldest torch and libraries, on $(OLDEST_PYTHON) or PYTHON'
	@echo 'make test-pythons  test-fast on $(NEWER_PYTHONS), those that are here'
	@echo 'make bench-gpu  speed and memory on one GPU against the goals, in four minutes or MINUTES'
	@echo 'PYTHON=...      the Python (3.11 or newer) that .venv is made from'

demo: $(VENV)/.installed
	$(VENV)/bin/zeta demo

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

docs: $(VENV)/.installed-test
	$(VENV)/bin/zeta config --markdown >docs/config.md.new
	mv docs/config.md.new docs/config.md

test: lint debian-tools
	$(VENV_PYTHON) -m pytest -m 'not slurm' $(PARALLEL)
	$(VENV_PYTHON) -m pytest -m slurm

test-fast: $(VENV)/.installed-test
	@$(VENV_PYTHON) -c 'import sys; from importlib.metadata import version; \
	print("Python", sys.version.split()[0] + ", torch", version("torch") + ", DeepSpeed", version("deepspeed"))'
	$(VENV_PYTHON) -m pytest -m 'not slow and not slurm and not gpu' $(PARALLEL)

test-gpu: $(VENV)/.installed-test
	@$(VENV_PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { \
	echo 'NOT RUN: this machine has no CUDA device. Kernel parity in bf16, ZeRO-3 over NCCL,'; \
	echo 'torch.compile and memory on a GPU have not been checked here by any other target.'; exit 1; }
	$(VENV_PYTHON) -m pytest -m gpu

# The versions that pyproject.toml declares as the oldest, on the oldest Python or on PYTHON.
test-oldest: PYTHON = $(OLDEST_PYTHON)
test-oldest: check-python
	+$(call fast_on,$(PYTHON),.venv-oldest,tests/constraints-oldest.txt)

test-pythons:
	@ran=; for python in $(NEWER_PYTHONS); do \
		if ! $$python -c '' 2>/dev/null; then echo "NOT RUN: no $$python on this machine."; continue; fi; \
		ran=1; $(call fast_on,$$python,.venv-$$python,$(CONSTRAINTS)) || exit; \
	done; [ -n "$$ran" ]

# $(call fast_on,PYTHON,VENV,CONSTRAINTS): the fast set there. A venv of another Python is made anew.
fast_on = { [ ! -e $(2) ] || [ "$$($(2)/bin/python -V 2>&1)" = "$$($(1) -V 2>&1)" ] || rm -r $(2); } && \
	$(MAKE) --no-print-directory test-fast PYTHON=$(1) VENV=$(2) CONSTRAINTS=$(3)
# Peers (pip install '.[bench]') are measured where they are installed.
bench-gpu: $(VENV)/.installed-test
	$(VENV_PYTHON) -m tests.benchmarks.gpu --minutes $(MINUTES) --out bench-gpu

# The stamps say which installation .venv holds; they are remade when a dependency changes.
$(VENV)/.installed: $(INSTALL_INPUTS)
	@$(MAKE) --no-print-directory $(VENV_PYTHON) check-disk
	$(VENV_PYTHON) -m pip install -c $(CONSTRAINTS) -e .
	@touch $@

$(VENV)/.installed-test: $(INSTALL_INPUTS)
	@$(MAKE) --no-print-directory $(VENV_PYTHON) check-disk
	$(VENV_PYTHON) -m pip install -c $(CONSTRAINTS) -e '.[test]'
	@touch $(VENV)/.installed $@

$(VENV_PYTHON): check-python
	@$@ -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || { \
	echo 'Could not create $(VENV) with $(PYTHON). On Debian and Ubuntu: apt-get install python3-venv'; exit 1; }

check-python:
	@command -v '$(PYTHON)' >/dev/null 2>&1 || { \
	echo 'No Python 3.11 or newer found. Name one: make demo PYTHON=/path/to/python3.11'; exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	echo 'zeta needs Python 3.11 or newer; $(PYTHON) is' "$$('$(PYTHON)' -V 2>&1)."; \
	echo 'Name another: make demo PYTHON=/path/to/python3.11'; exit 1; }

check-disk:
	@$(VENV_PYTHON) -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' || { \
	echo 'PyTorch for Linux comes with CUDA and takes about $(TORCH_GB) GB of disk in $(VENV). A CPU build is much'; \
	echo 'smaller: point PIP_INDEX_URL at an index of CPU wheels, and set TORCH_GB=2.'; \
	'$(PYTHON)' -c 'import shutil, sys; free = shutil.disk_usage(".").free / 2**30; \
	print("Free here: %.0f GB." % free); sys.exit(free < $(TORCH_GB))' || { \
	echo 'Not enough disk: free some, or clone to a larger one. Nothing was installed.'; exit 1; }; }

# Slurm tests run against a real cluster on loopback, report tests in a real browser. Where their
# packages cannot be installed, they are skipped and say why.
DEBIAN_TOOLS = slurmctld slurmd munged sbatch shellcheck chromium
debian-tools:
	@PATH="$$PATH:/usr/sbin:/sbin"; missing=; \
	for tool in $(DEBIAN_TOOLS); do command -v $$tool >/dev/null || missing="$$missing $$tool"; done; \
	[ -z "$$missing" ] && exit 0; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo 'Installing slurm-wlm, munge, shellcheck and chromium for the tests ...'; \
		export DEBIAN_FRONTEND=noninteractive; \
		{ apt-get update && apt-get install -y --no-install-recommends slurm-wlm munge shellcheck chromium; } \
		>$(VENV)/apt.log 2>&1 || { tail -n 5 $(VENV)/apt.log; \
		echo 'apt-get failed ($(VENV)/apt.log); the tests that need it will be skipped.'; }; \
	else echo "Not installed:$$missing (that takes Debian and root); the tests that need them will be skipped."; fi
