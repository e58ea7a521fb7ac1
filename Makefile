# `make help` lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BASE ?= HEAD
SECONDS ?= 3600
# repro, plan, gate and report take GRID=NAME, for grids/NAME; without it they work on the root's, the demo.
GRID ?=
# Runs of a grid at a time: of the demo, whose networks are small, one per processor; of others one, unless told otherwise.
JOBS ?= $(if $(GRID),1)
FOLDER = $(if $(GRID),grids/$(GRID),.)
# Both come from the command line, and neither make nor the shell may read them as code: looked at here, before anything is run.
LETTERS := a b c d e f g h i j k l m n o p q r s t u v w x y z A B C D E F G H I J K L M N O P Q R S T U V W X Y Z \
  0 1 2 3 4 5 6 7 8 9 . _ - / @ ^ ~ { }
without = $(if $2,$(call without,$(subst $(firstword $2),,$1),$(wordlist 2,99,$2)),$1)
ifneq ($(call without,$(value BASE),$(LETTERS)),)
$(error BASE must be a revision of letters, digits and ._-/@^~{}, as in BASE=origin/main)
endif
ifneq ($(call without,$(value GRID),$(filter-out / @ ^ ~ { },$(LETTERS))),)
$(error GRID must be the name of a folder in grids/, as in GRID=smoke)
endif
GRIDS := $(patsubst grids/%/params.yaml,%,$(wildcard grids/*/params.yaml))
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Every stage is a process of its own: without byte code each would compile its packages again, for seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: findings help setup grid repro gate report test numbers fuzz lint format grids smoke plan bench lock docs site dist clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */  make \1\t/' | expand -t 16

# A lock names every package, so pip looks for no others. Byte code of all would take half of the time, and nobody runs most of it.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps --no-build-isolation
# https://download.pytorch.org/whl/cpu has torch's build for CPUs. Only torch and torchvision are taken from there.
TORCH_INDEX ?=

setup: $(READY)  ## create .venv with the pinned packages and this project; TORCH_INDEX=URL takes torch's build for CPUs from there

$(READY): $(wildcard requirements*.lock) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --require-hashes --requirement requirements-build.lock
	# The build for CPUs, a tenth of the size, where TORCH_INDEX or pip's own configuration has it; else PyPI's.
	$(INSTALL) --require-hashes --requirement requirements-torch-cpu.lock $(if $(TORCH_INDEX),--index-url '$(TORCH_INDEX)',2> /dev/null || $(INSTALL) --require-hashes --requirement requirements-torch.lock)
	$(INSTALL) --require-hashes --requirement requirements.lock
	$(INSTALL) --editable .
	@touch $@

grid:
	@test -f '$(FOLDER)/params.yaml' || { echo "$(FOLDER)/params.yaml does not exist; grids: $(GRIDS)" >&2; exit 2; }

repro: grid setup  ## run the pipeline, then say where tables and figures are; GRID=NAME runs another grid than the demo
	@cd '$(FOLDER)' && python '$(CURDIR)/stages' check
	@cd '$(FOLDER)' && python -m textguard.jobs $(JOBS)
	@echo
	@cd '$(FOLDER)' && cat metrics/tables/table1.md
	@echo "tables:  $(FOLDER)/metrics/tables/   (Markdown, CSV, LaTeX)"
	@echo "figures: $(FOLDER)/plots/figures/    (PNG, SVG, PDF, CSV)"
	@echo "page:    $(FOLDER)/plots/report.html (make report$(if $(GRID), GRID=$(GRID)) opens it)"
	@echo "numbers: $(FOLDER)/metrics/summary.json, metrics/results/ (every run, with intervals), metrics/records/ (every injection)"
	@echo "times:   $(FOLDER)/metrics/run.json   (python -m textguard.timing sums up)"

smoke:  ## run the smallest grid
	@$(MAKE) --no-print-directory repro GRID='$(or $(GRID),smoke)'

plan: grid setup  ## say what a grid takes, before it runs: make plan GRID=table1
	@cd '$(FOLDER)' && python '$(CURDIR)/stages' plan

# The results of revision BASE, in .work/base of the grid's folder.
define get_base
	@cd '$(FOLDER)' && reason=$$(git cat-file -e '$(BASE)^{commit}' 2>&1) || { \
	  test "$$(git rev-parse --is-shallow-repository 2>/dev/null)" = true && shallow='; this clone is shallow: git fetch --unshallow'; \
	  echo "$(BASE) cannot be read:" $$(printf '%s' "$$reason" | tr '\n\t' '  ')"$$shallow" >&2; exit 2; }
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

numbers: setup  ## list the numbers on README.md and docs/ that no committed file holds, and where such numbers are
	python tests/readme_numbers.py

fuzz: setup  ## try hostile inputs on every stage for SECONDS (3600), or one again: make fuzz REPLAY='...'
	python -m pytest -m slow
	python -W ignore tests/fuzz.py --seconds $(SECONDS) $(if $(REPLAY),--replay '$(REPLAY)')

DOCS_READY := $(VENV)/.docs-ready

$(DOCS_READY): $(READY) requirements-docs.lock
	$(INSTALL) --require-hashes --requirement requirements-docs.lock
	@touch $@

docs: $(DOCS_READY)  ## serve the documentation's site on this machine
	NO_MKDOCS_2_WARNING=1 mkdocs serve

site: $(DOCS_READY)  ## build the documentation's site into build/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict

dist: setup  ## build what a release publishes into dist/: the source distribution and, from it, the wheel
	rm -rf dist
	python -c 'from setuptools.build_meta import build_sdist; build_sdist("dist")'
	python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist dist/*.tar.gz

lint: setup  ## check style, format, import rules, the CI's workflow and the grids' copies of dvc.yaml
	ruff check .
	ruff format --check .
	lint-imports
	zizmor --offline --quiet .github
	@for grid in $(GRIDS); do python -m textguard.dag grids/$$grid | cmp - grids/$$grid/dvc.yaml || { echo "run 'make grids'"; exit 1; }; done

findings: setup  ## render docs/findings.md anew, from the results of all grids that are there
	@cd docs && dvc repro --quiet

format: setup  ## format the code
	ruff check --fix .
	ruff format .

# A grid is a DVC repository of its own, so that commands in one do not look for the others' results. All share one cache.
grids: setup  ## give every grid the root's dvc.yaml, with the files of its own code, and DVC configuration, remotes included
	@for grid in $(GRIDS); do \
	  python -m textguard.dag grids/$$grid > grids/$$grid/dvc.yaml.tmp && mv grids/$$grid/dvc.yaml.tmp grids/$$grid/dvc.yaml && \
	  cp .dvcignore grids/$$grid/ && mkdir -p grids/$$grid/.dvc && cp .dvc/.gitignore grids/$$grid/.dvc/ && \
	  { cat .dvc/config; printf '[cache]\n    dir = ../../../.dvc/cache\n'; } > grids/$$grid/.dvc/config && \
	  ln -sfn ../../../.dvc/plots grids/$$grid/.dvc/plots || exit 1; \
	done

bench: setup  ## measure the performance claims, some 15 minutes, into benchmarks/results.json
	python -W ignore -m benchmarks

lock:  ## pin what pyproject.toml resolves to today in requirements*.lock, with hashes, and list the licences in THIRD_PARTY.md
	rm -rf .lock-venv && $(PYTHON) -m venv .lock-venv
	.lock-venv/bin/python -m pip install --quiet pip==26.3 uv==0.13.9
	PATH="$(CURDIR)/.lock-venv/bin:$$PATH" .lock-venv/bin/python tests/lock.py
	rm -rf .lock-venv

clean:  ## delete the environment, caches and partial results; keep every result
	rm -rf $(VENV) .work grids/*/.work .pytest_cache .ruff_cache build dist *.egg-info
