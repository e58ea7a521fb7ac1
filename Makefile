# `make help` lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BASE ?= HEAD
GRID ?= smoke
GRIDS := $(wildcard grids/*/params.yaml)
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Every stage is a process of its own: without byte code each would compile its packages again, for seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup repro gate report test lint format grids smoke plan bench lock clean

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

repro: setup  ## run the pipeline of the default grid, then say where tables and figures are
	@python stages check
	dvc repro
	@echo
	@cat metrics/tables/table1.md
	@echo "tables:  metrics/tables/   (Markdown, CSV, LaTeX)"
	@echo "figures: plots/figures/    (PNG, SVG, PDF, CSV)"
	@echo "page:    plots/report.html (make report opens it)"
	@echo "numbers: metrics/summary.json, metrics/results/ (every run, with intervals), metrics/records/ (every injection)"

gate: setup  ## compare metrics/results with those of BASE (make gate BASE=origin/main; default HEAD), fail where they got worse
	@git cat-file -e '$(BASE):metrics/results' 2>/dev/null || { echo "$(BASE) holds no metrics/results; name a revision that does: make gate BASE=origin/main" >&2; exit 2; }
	@rm -rf .work/gate && mkdir -p .work/gate
	@git archive '$(BASE)' metrics/results | tar -x -C .work/gate
	@python -m textguard.report.gate .work/gate/metrics/results metrics/results

report: setup  ## open plots/report.html; with BASE=origin/main a page that sets both revisions side by side
ifeq ($(origin BASE),command line)
	@git cat-file -e '$(BASE):metrics/results' 2>/dev/null || { echo "$(BASE) holds no metrics/results; name a revision that does: make report BASE=origin/main" >&2; exit 2; }
	@rm -rf .work/report && mkdir -p .work/report
	@git archive '$(BASE)' metrics/results | tar -x -C .work/report
	@python -m textguard.report.page .work/report/metrics/results '$(BASE)' .work/report/report.html
	@echo .work/report/report.html && { python -m webbrowser -t "file://$(CURDIR)/.work/report/report.html" > /dev/null || true; }
else
	@test -f plots/report.html || { echo "plots/report.html does not exist; run 'make repro'" >&2; exit 2; }
	@echo plots/report.html && { python -m webbrowser -t "file://$(CURDIR)/plots/report.html" > /dev/null || true; }
endif

test: setup  ## run the tests
	python -m pytest

lint: setup  ## check style, format, import rules and the grids' copies of dvc.yaml
	ruff check .
	ruff format --check .
	lint-imports
	@for grid in $(dir $(GRIDS)); do cmp dvc.yaml $$grid/dvc.yaml || { echo "run 'make grids'"; exit 1; }; done

format: setup  ## format the code
	ruff check --fix .
	ruff format .

grids:  ## copy the root's dvc.yaml to every grid
	@for grid in $(dir $(GRIDS)); do cp dvc.yaml $$grid/dvc.yaml; done

smoke: setup  ## run the smallest grid
	cd grids/smoke && dvc repro dvc.yaml

plan: setup  ## what a grid takes, before it runs: make plan GRID=table1
	@test -f 'grids/$(GRID)/params.yaml' || { echo "grids/$(GRID)/params.yaml does not exist; grids: $(notdir $(patsubst %/params.yaml,%,$(GRIDS)))" >&2; exit 2; }
	@cd 'grids/$(GRID)' && python ../../stages plan

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
