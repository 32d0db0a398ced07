# Two commands set everything up: `make demo` builds a small assistant, `make test` runs what CI runs.
# Both make .venv on first use (Python 3.11 or newer; choose one with PYTHON=/path/to/python3).

PYTHON ?=
RUN := .venv/bin/python -m
# Without bytecode every process of the tests would compile the package, and every worker all tests, once more.
unexport PYTHONDONTWRITEBYTECODE

# What `make test-long` holds to COVERAGE_FLOOR percent: all rooms but the command line, which end-to-end tests cover.
CORE_ROOMS := groundup/*.py,groundup/recipe/*,groundup/corpus/*,groundup/tokenizer/*,groundup/shards/*,groundup/model/*,groundup/training/*,groundup/alignment/*,groundup/generation/*,groundup/evaluation/*,groundup/interop/*,groundup/serving/*,groundup/report/*
COVERAGE_FLOOR := 95

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test test-long lint types imports tests fast slow chromium test-interop clean always

help:
	@echo 'make demo    build the demo: raw text in, a small assistant out (minutes on two cores)'
	@echo 'make test    everything CI runs, which is, in this order: lint types imports tests'
	@echo 'make fast    those of the tests that take no tens of seconds; make slow: the others'
	@echo 'make test-long  the same and what takes longer: more kills, every file operation, Ray, the benchmarks; with coverage'
	@echo 'make test-interop  llama.cpp reads our GGUF files (built from source the first time: about eight minutes)'
	@echo 'make chromium  installs the browser that the tests of the page use (apt; make test does it by itself where it may)'
	@echo 'make clean   remove .venv and caches; runs stay'
	@echo 'Add PYTHON=/path/to/python3 to choose the Python of a new .venv.'

demo: .venv/installed
	@.venv/bin/groundup build demo

test: lint types imports tests
	@echo 'make test: everything passed.'

lint: .venv/installed-test
	$(RUN) ruff check
	$(RUN) ruff format --check

types: .venv/installed-test
	$(RUN) mypy

imports: .venv/installed-test
	.venv/bin/lint-imports

# One process a core, so one thread a process; neighbours stay together, with what their file makes once for all.
PYTEST := OMP_NUM_THREADS=1 $(RUN) pytest -q --dist worksteal

tests: .venv/installed-test chromium
	$(PYTEST) -n auto -m 'not long'

fast: .venv/installed-test
	$(PYTEST) -n auto -m 'not slow and not long'

slow: .venv/installed-test chromium
	$(PYTEST) -n 2 -m 'slow and not long'

# Where it is neither there nor can be installed, the page's tests skip and say so; continuous integration must have it.
chromium:
	@if { command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  { apt-get update -q && apt-get install -q -y --no-install-recommends chromium; } >/dev/null || [ -z "$$CI" ]; \
	elif [ -n "$$CI" ]; then echo 'groundup: Chromium is missing, and only root can install it.' >&2; exit 1; \
	else echo 'groundup: without Chromium the tests of the page skip. Install it: sudo apt-get install chromium' >&2; fi

test-long: lint types imports chromium
	GROUNDUP_LONG=1 $(PYTEST) -n 2 --cov=groundup --cov-report=
	$(RUN) coverage report --include='$(CORE_ROOMS)' --fail-under=$(COVERAGE_FLOOR)
	@echo 'make test-long: everything passed.'

# llama.cpp has wheels for few machines: it is built from source, once, in an environment of its own.
LLAMA_CPP := benchmarks/.cache/llama_cpp
LLAMA_CPP_VERSION := 0.3.36

test-interop: .venv/installed-test $(LLAMA_CPP)/installed-$(LLAMA_CPP_VERSION)
	OMP_NUM_THREADS=1 .venv/bin/python benchmarks/llama_cpp.py --python $(LLAMA_CPP)/bin/python

$(LLAMA_CPP)/installed-$(LLAMA_CPP_VERSION): | .venv/installed-test
	rm -rf $(LLAMA_CPP) && .venv/bin/python -m venv $(LLAMA_CPP)
	CMAKE_ARGS='-DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_TOOLS=OFF' \
	  $(LLAMA_CPP)/bin/python -m pip --disable-pip-version-check install -q --no-binary llama-cpp-python \
	  llama-cpp-python==$(LLAMA_CPP_VERSION)
	@touch $@

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage .coverage.* htmlcov
	find groundup tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# --- The environment -------------------------------------------------------------------------------------------
# .venv/place holds the folder that .venv was made in, .venv/installed* are touched when an installation is complete,
# .venv/installing exists while pip works. So a killed, moved or outdated environment mends itself.

ifneq ($(shell test ! -e .venv/installing && .venv/bin/python -c 'import pip' 2>/dev/null && cat .venv/place 2>/dev/null),$(CURDIR))
.venv/place: always
endif

.venv/place:
	@recent='import sys; sys.exit(sys.version_info < (3, 11))'; \
	if [ -e .venv/installing ] || ! .venv/bin/python -c "$$recent" 2>/dev/null || ! $(RUN) pip --version >/dev/null 2>&1; then \
	  chosen=''; old='none'; lacking=''; \
	  for python in $(if $(PYTHON),'$(PYTHON)',python3.13 python3.12 python3.11 python3 python3.14); do \
	    version=$$("$$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue; \
	    "$$python" -c "$$recent" || { old="$$version"; continue; }; \
	    "$$python" -c 'import venv, ensurepip' 2>/dev/null || { lacking="$$version"; continue; }; \
	    chosen="$$python"; break; \
	  done; \
	  if [ -z "$$chosen" ] && [ -n "$$lacking" ]; then \
	    echo "groundup: Python $$lacking cannot make environments here. Install the missing part (Debian, Ubuntu: apt install python$$lacking-venv), then give the same command again." >&2; exit 1; \
	  elif [ -z "$$chosen" ]; then \
	    echo "groundup: needs Python 3.11 or newer$(if $(PYTHON), at $(PYTHON)) (found: $$old). Install it (Debian, Ubuntu: apt install python3 python3-venv), or name one: make demo PYTHON=/path/to/python3" >&2; exit 1; \
	  fi; \
	  echo "Making .venv with Python $$version"; \
	  rm -rf .venv && "$$chosen" -m venv .venv || { echo "groundup: $$chosen could not make .venv here. Is the disk full, or the folder read-only?" >&2; exit 1; }; \
	fi; \
	printf '%s\n' '$(CURDIR)' > $@

.venv/installed: WHAT := .[serve]
.venv/installed-test: WHAT := .[test]

.venv/installed .venv/installed-test: pyproject.toml constraints.txt .venv/place
	@echo 'Installing groundup and its libraries into .venv (the first time a few hundred MB are fetched)'
	@touch .venv/installing; quiet=-q; [ -t 1 ] && quiet=; \
	if $(RUN) pip --disable-pip-version-check install $$quiet -c constraints.txt -e '$(WHAT)' 2>.venv/install.log; then \
	  rm -f .venv/installing; \
	else \
	  rm -f .venv/installing; \
	  if grep -q -i -E 'name resolution|getaddrinfo|connection (refused|reset|aborted)|failed to establish|network is unreachable|timed out|SSLError|ProxyError|from versions: none' .venv/install.log; then \
	    echo 'groundup: pip could not reach the package index. Check the network and the proxy, then give the same command again (pip says: .venv/install.log).' >&2; \
	  elif grep -q -i 'no space left' .venv/install.log; then \
	    echo 'groundup: the disk is full; .venv needs about 2 GB. Free some space, then give the same command again.' >&2; \
	  else \
	    echo "groundup: pip could not install: $$(grep -i error .venv/install.log | tail -n 1) (all of it: .venv/install.log)" >&2; \
	  fi; exit 1; \
	fi
	@touch .venv/installed $@
