# make demo: the pocket world end to end on CPU.   make test: the tests.
# make study: all runs behind RESULTS.md on two cores, three hours or more; interrupted, it goes on.
# Each sets up .venv first. PIP_CONSTRAINT=FILE pins other versions than constraints.txt does.
PYTHON ?= python3
export PIP_CONSTRAINT ?= $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK = 1

demo: .venv/ready
	.venv/bin/python train.py

study: .venv/ready
	.venv/bin/python -m study.reproduce all --jobs 2
	.venv/bin/python -m study.hacking
	.venv/bin/python -m study.results

test: .venv/ready-for-tests
	.venv/bin/python -m pytest -n auto --maxprocesses=4 --dist=loadfile

lint: .venv/ready-for-tests
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

.venv/ready: requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer is needed; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; \
	  echo "Python's venv module is missing. On Debian or Ubuntu: sudo apt install python3-venv"; exit 1; }
	.venv/bin/python -m pip install -q -r requirements.txt
	touch $@

.venv/ready-for-tests: .venv/ready requirements-test.txt
	.venv/bin/python -m pip install -q -r requirements-test.txt
	touch $@

.PHONY: demo study test lint
