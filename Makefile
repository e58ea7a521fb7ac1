# `make help` lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BASE ?= HEAD
SECONDS ?= 3600
# repro, plan, gate and report take GRID=NAME, for grids/NAME; without it they work on the root's, the demo.
GRID ?=
FOLDER = $(if $(GRID),grids/$(GRID),.)
GRIDS := $(patsubst grids/%/params.yaml,%,$(wildcard grids/*/params.yaml))
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Every stage is a process of its own: without byte code each would compile its packages again, for seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup grid repro gate report test fuzz lint format grids smoke plan bench lock clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */  make \1\t/' | expand -t 16

setup: $(READY)  ## create .venv with the pinned packages and this project

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	# Without --no-compile, half of the time goes into byte code that nobody runs.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

grid:
	@test -f '$(FOLDER)/params.yaml' || { echo "$(FOLDER)/params.yaml does not exist; grids: $(GRIDS)" >&2; exit 2; }

repro: grid setup  ## run the pipeline, then say where tables and figures are; GRID=NAME runs another grid than the demo
	@cd '$(FOLDER)' && python '$(CURDIR)/stages' check
	@cd '$(FOLDER)' && dvc repro
	@echo
	@cd '$(FOLDER)' && cat metrics/tables/table1.md
	@echo "tables:  $(FOLDER)/metrics/tables/   (Markdown, CSV, LaTeX)"
	@echo "figures: $(FOLDER)/plots/figures/    (PNG, SVG, PDF, CSV)"
	@echo "page:    $(FOLDER)/plots/report.html (make report$(if $(GRID), GRID=$(GRID)) opens it)"
	@echo "numbers: $(FOLDER)/metrics/summary.json, metrics/results/ (every run, with intervals), metrics/records/ (every injection)"

smoke:  ## run the smallest grid
	@$(MAKE) --no-print-directory repro GRID='$(or $(GRID),smoke)'

plan: grid setup  ## say what a grid takes, before it runs: make plan GRID=table1
	@cd '$(FOLDER)' && python '$(CURDIR)/stages' plan

# The results of revision BASE, in .work/base of the grid's folder.
define get_base
	@cd '$(FOLDER)' && git cat-file -e '$(BASE):./metrics/results' 2>/dev/null || { echo "$(BASE) holds no $(FOLDER)/metrics/results; name a revision that does: make $@ BASE=origin/main" >&2; exit 2; }
	@cd '$(FOLDER)' && rm -rf .work/base && mkdir -p .work/base && git archive '$(BASE)' metrics/results | tar -x -C .work/base
endef

gate: grid setup  ## compare metrics/results with those of BASE (make gate BASE=origin/main; default HEAD), fail where they got worse
	$(get_base)
	@cd '$(FOLDER)' && python -m textguard.report.gate .work/base/metrics/results metrics/results

report: grid setup  ## open plots/report.html; with BASE=origin/main a page that sets both revisions side by side
ifeq ($(origin BASE),command line)
	$(get_base)
	@cd '$(FOLDER)' && python -m textguard.report.page .work/base/metrics/results '$(BASE)' .work/report.html
	@echo '$(FOLDER)/.work/report.html' && { python -m webbrowser -t "file://$(CURDIR)/$(FOLDER)/.work/report.html" > /dev/null || true; }
else
	@test -f '$(FOLDER)/plots/report.html' || { echo "$(FOLDER)/plots/report.html does not exist; run 'make repro$(if $(GRID), GRID=$(GRID))'" >&2; exit 2; }
	@echo '$(FOLDER)/plots/report.html' && { python -m webbrowser -t "file://$(CURDIR)/$(FOLDER)/plots/report.html" > /dev/null || true; }
endif

test: setup  ## run the tests
	python -m pytest

fuzz: setup  ## try hostile inputs on every stage for SECONDS (3600), or one again: make fuzz REPLAY='...'
	python -W ignore tests/fuzz.py --seconds $(SECONDS) $(if $(REPLAY),--replay '$(REPLAY)')

lint: setup  ## check style, format, import rules and the grids' copies of dvc.yaml
	ruff check .
	ruff format --check .
	lint-imports
	@for grid in $(GRIDS); do cmp dvc.yaml grids/$$grid/dvc.yaml || { echo "run 'make grids'"; exit 1; }; done

format: setup  ## format the code
	ruff check --fix .
	ruff format .

# A grid is a DVC repository of its own, so that commands in one do not look for the others' results. All share one cache.
grids:  ## give every grid the root's dvc.yaml and DVC configuration, remotes included
	@for grid in $(GRIDS); do \
	  cp dvc.yaml .dvcignore grids/$$grid/ && mkdir -p grids/$$grid/.dvc && cp .dvc/.gitignore grids/$$grid/.dvc/ && \
	  { cat .dvc/config; printf '[cache]\n    dir = ../../../.dvc/cache\n'; } > grids/$$grid/.dvc/config && \
	  ln -sfn ../../../.dvc/plots grids/$$grid/.dvc/plots || exit 1; \
	done

bench: setup  ## measure the performance claims, some 15 minutes, into benchmarks/results.json
	python -W ignore -m benchmarks

lock:  ## pin what pyproject.toml resolves to today in requirements.lock
	rm -rf .lock-venv && $(PYTHON) -m venv .lock-venv
	.lock-venv/bin/python -m pip install --quiet 'setuptools>=77' torch==2.13.0 torchvision==0.28.0
	.lock-venv/bin/python -m pip install --quiet '.[dev]'
	{ echo "# Written by 'make lock' from pyproject.toml. CUDA packages come with torch where its build needs them."; \
	  .lock-venv/bin/python -m pip freeze --all | sed -E 's/\+cpu$$//' | grep -vP '^(pip|textguard|nvidia-(?!ml-py)|cuda-|triton)'; } > requirements.lock
	rm -rf .lock-venv

clean:  ## delete the environment, caches and partial results; keep every result
	rm -rf $(VENV) .work grids/*/.work .pytest_cache .ruff_cache build dist *.egg-info
