# Every target does its own set-up: a virtualenv in .venv, dependencies within constraints.txt.
# A second call finds the stamps up to date and starts at once.
PYTHON ?= python3
SEED ?= 0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
CORE := $(VENV)/.core
DEV := $(VENV)/.dev
DOCS := $(VENV)/.docs
LONG := $(VENV)/.long

.PHONY: demo test check bench attack matrix rehearsal docs figures notebooks clean help

help:
	@echo "make demo   noisy digits, steered digits: runs/demo/digits/report.html"
	@echo "make test   the test suite"
	@echo "make check  lint, format, types, import contract, public docstrings, tables of the docs"
	@echo "make rehearsal  from pictures to a steered pipeline at ImageNet's layout, all of it tiny (minutes)"
	@echo "make attack what the suite leaves out because it is long: kills, signals, many ranks, long trainings"
	@echo "make matrix the part of the suite that touches torch most, on the oldest and newest versions, each in a virtualenv"
	@echo "make bench  the benchmarks (long); results under benchmarks/results"
	@echo "make docs   the site, in site/: links checked, nothing fetched; make figures, make notebooks: what its pages show"
	@echo "make clean  remove the virtualenv and caches"

$(CORE): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing metaflowmaps into $(VENV) ..."
	@$(PIP) -e .
	@touch $@

$(DEV): $(CORE)
	@echo "installing development tools into $(VENV) ..."
	@$(PIP) -e '.[dev]'
	@touch $@

$(DOCS): $(CORE)
	@echo "installing what builds the site into $(VENV) ..."
	@$(PIP) -e '.[docs]'
	@touch $@

demo: $(CORE)
	$(BIN)/mfm demo

# whoever wants no bytecode would have the assertions of all tests rewritten by each worker, each time
test: $(DEV)
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tests/docstrings.py
	$(BIN)/python -m benchmarks tables --check

bench: $(DEV)
	$(BIN)/python -m benchmarks

# the reader of texts is too large for dev
$(LONG): $(DEV)
	@$(PIP) -e '.[ocr]'
	@touch $@

attack: $(LONG)
	MFM_ATTACK=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m attack --seed $(SEED)

matrix: $(CORE)
	$(BIN)/python tests/matrix.py

rehearsal: $(DEV)
	$(BIN)/python -m benchmarks.rehearsal

# NO_MKDOCS_2_WARNING: an advertisement of each build
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "to look: $(BIN)/python -m http.server --directory site"

figures: $(CORE)
	$(BIN)/python docs/figures.py

notebooks: $(DOCS)
	$(BIN)/python notebooks/run.py

clean:
	rm -rf site $(VENV) .matrix .pytest_cache .mypy_cache .ruff_cache .hypothesis
