# Building your own containers from scratch.  `make help` lists what can be made.
#
#   make PYTHON=/usr/bin/python3.12 lab    another interpreter (3.11 or newer) for .venv
#   make WHEELS=/some/directory lab        everything from a directory, nothing from the network
#   make PORT=9000 lab                     another port (the next free one is taken if it is in use)
#   make NOTEBOOKS="03 23" run             only notebooks whose names start so (also: outputs)
#   make ARGS="-k memory" test             more arguments for what the target starts

.DEFAULT_GOAL := help
SHELL := /bin/bash
.DELETE_ON_ERROR:
# One target after another, whatever -j says: the tests measure times.
.NOTPARALLEL:

# The first of these that is new enough: .venv's own, or the machine's.
ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))'
PYTHONS := .venv/bin/python python3 python3.14 python3.13 python3.12 python3.11
PYTHON ?= $(shell for p in $(PYTHONS); do "$$p" $(ENOUGH) 2>/dev/null && echo "$$p" && break; done)
PORT ?= 8888
export WHEELS
# What Python has compiled is kept, in .venv and beside our sources: else each start of a kernel takes two seconds more.
unexport PYTHONDONTWRITEBYTECODE

SHELL_SCRIPTS = $(shell git ls-files -co --exclude-standard | xargs awk 'FNR == 1 && /^\#!.*[\/ ](ba)?sh( |$$)/ { print FILENAME } { nextfile }' 2>/dev/null)

help: ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | while IFS=$$'\t' read -r t w; do \
	    printf '  make %-14s %s\n' "$$t" "$$w"; done

setup: ## the environment .venv, from the lock; nothing to do when it is there
	@if [ -z "$(PYTHON)" ] || ! "$(PYTHON)" $(ENOUGH) 2>/dev/null; then \
	    echo "Python 3.11 or newer is needed; here: $$("$(or $(PYTHON),python3)" --version 2>&1)."; \
	    echo "Name another one by: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; exit 1; fi
	@"$(PYTHON)" scripts/set_up.py

lab: setup ## the notebooks in JupyterLab, for this machine only, with a token
	@.venv/bin/labkernel build
	@exec .venv/bin/python scripts/lab.py --port=$(PORT) $(ARGS)

run: setup ## all notebooks without a screen: pages, figures and a report in build/
	@.venv/bin/labkernel build
	@.venv/bin/python scripts/run_notebooks.py $(NOTEBOOKS)

recipes: setup ## every root file system of rootfs-recipes, built and proved; once, then they are cached
	@.venv/bin/python scripts/system_packages.py recipes
	@.venv/bin/labkernel build --all

test: setup ## every test, and every notebook against its stored outputs
	@.venv/bin/python scripts/system_packages.py test
	@mkdir -p build
	@together=0; alone=0; \
	.venv/bin/python -m pytest $(TOGETHER) --nbval --numprocesses 3 --dist loadfile --no-loadscope-reorder \
	    --junitxml build/test-together.xml $(ARGS) || together=$$?; \
	.venv/bin/python -m pytest $(ALONE) --nbval --junitxml build/test.xml $(ARGS) || alone=$$?; \
	scripts/verdict $$together $$alone
# These measure, or look at processors that nobody else uses; some want a short path to their directory, or one that
# another user may enter. All others share the processors.
ALONE = $(wildcard $(patsubst %,tests/test_%.py,bench box cgroups children cleanup container dashboard doctor \
    first_container monitor notebook pack relay spec unpack vagrant) \
    $(patsubst %,notebooks/%-*.ipynb,15 16 17 23))
TOGETHER = $(filter-out $(ALONE),$(LONGEST) $(filter-out $(LONGEST),$(wildcard tests/test_*.py notebooks/*.ipynb)))
# First, so that at the end no processor waits for the other.
LONGEST = $(wildcard $(patsubst %,tests/test_%.py,exercises recipes killed_notebooks rootless cli notebooks \
    run_notebooks) notebooks/20-*.ipynb)

test-vm: setup ## the tests that want cgroup v2 and systemd, in a virtual machine made for it
	@vm/test-vm $(ARGS)

test-browser: setup ## the notebooks and the dashboard in a real JupyterLab and a real browser
	@.venv/bin/python scripts/system_packages.py browser
	@.venv/bin/python -m pytest tests/browser $(ARGS)

bench: setup ## the start of a container measured against crun, runc, bwrap, unshare and plain C
	@.venv/bin/python scripts/system_packages.py bench
	@.venv/bin/python bench/bench.py $(ARGS)

outputs: setup ## the outputs stored in the notebooks, made anew
	@.venv/bin/python scripts/execute_notebooks.py $(NOTEBOOKS)

lint: setup ## the source, in the notebooks too: style, types, shell scripts
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/python scripts/type_check_notebooks.py
	for file in rootfs-recipes/*/build.py; do .venv/bin/mypy --no-error-summary "$$file" || exit 1; done
	@if ! command -v shellcheck >/dev/null; then echo "shellcheck is not here: shell scripts not checked"; \
	    elif [ -n "$(SHELL_SCRIPTS)" ]; then shellcheck $(SHELL_SCRIPTS); fi

lock: setup ## the lock anew from pyproject.toml, with the newest versions
	cd requirements && ../.venv/bin/uv pip compile $(LOCKING) --no-annotate uv.in --output-file uv.txt
	.venv/bin/uv pip compile $(LOCKING) --group dev pyproject.toml --output-file requirements/lock.txt
# One version of each package for every Python: then the stored outputs are everywhere made with the same ones.
LOCKING = --upgrade --universal --python-version 3.11 --fork-strategy fewest --generate-hashes --quiet \
    --system-certs --custom-compile-command 'make lock'

clean: ## remove build/, caches and containers that have ended or lost their launcher (not .venv, nothing that runs)
	@if [ -x .venv/bin/labkernel ]; then .venv/bin/labkernel clean; fi
	rm -rf build .jupyter .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

.PHONY: help setup lab run recipes test test-vm test-browser bench outputs lint lock clean
