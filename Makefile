# `make demo` and `make test` build what they need from a fresh clone; everything else is for development.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
RUNNABLE := $(VENV)/.runnable
INSTALLED := $(VENV)/.installed
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check

# Tests run in one process more than there are cores, each with one thread: some wait for servers, and kernels of small
# matrices gain little from more threads. A file's tests stay together, with their fixtures. Bytecode is kept even where the
# environment says otherwise: hundreds of processes import the package, and every worker rewrites all tests' assertions.
WORKERS := $(shell cores=$$(getconf _NPROCESSORS_ONLN); echo $$((cores < 8 ? cores + 1 : 8)))
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-fast lint docs format install lock clean

demo: $(RUNNABLE)
	$(VENV)/bin/sordino demo $(ARGS)

test: $(INSTALLED)
	$(PYTEST)

test-fast: $(INSTALLED)
	$(PYTEST) -m "not slow"

lint: $(INSTALLED)
	$(VENV)/bin/ruff check --no-cache .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The site of docs/, in docs/_build: a warning, or anything from another origin, is an error.
docs: $(INSTALLED)
	$(VENV)/bin/python -m sphinx --fresh-env --fail-on-warning --keep-going --nitpicky --quiet docs docs/_build

format: $(INSTALLED)
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

install: $(INSTALLED)

# What the package needs, with the extra `serve`: the demo, and its prompt in a browser.
$(RUNNABLE): requirements-demo.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "Sordino needs Python 3.11 or newer; install it, or name it: make PYTHON=/path/to/python3 $(MAKECMDGOALS)"; exit 2; }
	@echo "Setting up $(VENV) with $(PYTHON); this takes a few minutes the first time."
	$(PYTHON) -m venv $(VENV)
	$(PIP) --require-hashes -r requirements-demo.lock
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

# And the rest: every extra, and the tools of development.
$(INSTALLED): requirements.lock $(RUNNABLE)
	$(PIP) --require-hashes -r requirements.lock
	@touch $@

# Needs uv. The lock files name no package index, so pip and uv install them from whichever one they are set up with.
# The smaller ones take their versions from the larger.
LOCK := uv pip compile pyproject.toml --group build --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-annotate --custom-compile-command "make lock" --quiet
lock:
	$(LOCK) --extra dev -o requirements.lock
	$(LOCK) --extra serve --constraint requirements.lock -o requirements-demo.lock
	$(LOCK) $(foreach extra,flare flower heif hub medical tracking,--extra $(extra)) --constraint requirements.lock -o requirements-deploy.lock

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache docs/_build
