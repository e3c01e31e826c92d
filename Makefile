# `make demo` and `make test` do everything on a machine that has Python 3, git and make.

BIN := .venv/bin
SOURCES := raylaunch mcp_server tests examples benchmarks tools docs
# Three workers, as most tests wait for processes; whole files each, and all that share a cluster are one's. tests/conftest.py says which come first.
PYTEST := $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder
ARGS :=
# The type checker works next to the tests, and both must pass. What it has found is printed at once, and again at the end.
define WITH_TYPES
	@mkdir -p build
	@($(BIN)/mypy >build/types.txt 2>&1 || { cat build/types.txt; exit 1; }) & types=$$!; \
	$(1); tests=$$?; \
	wait $$types || { cat build/types.txt; exit 1; }; \
	exit $$tests
endef
# Tests start thousands of Pythons; without its bytecode each would compile raylaunch again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo test test-machines test-clients gpu-check check lint style format bench docs docs-reference clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1#\2/p' $(MAKEFILE_LIST) | awk -F'#' '{printf "%-21s %s\n", $$1, $$2}'
	@echo
	@echo "  PYTHON=/path/to/python3 chooses the interpreter, TORCH= leaves PyTorch out, ARGS='-k name' goes to pytest."

demo: .venv/.demo ## start a cluster here, train on real data, fetch the model
	$(BIN)/raylaunch demo

test: style ## all checks and tests, but for those marked long, which it counts
	$(call WITH_TYPES,$(PYTEST) -m "not long" $(ARGS))

test-machines: .venv/.test ## hosts made of namespaces: clusters over SSH, alone, and the long tests (needs root)
	@tools/setup.sh machines
	$(PYTEST) -m "machines or long" $(ARGS)

gpu-check: .venv/.test ## on a machine with an NVIDIA GPU: jobs on the real card (TORCH=torch for PyTorch with CUDA)
	@nvidia-smi -L || { echo "raylaunch: gpu-check needs a machine with an NVIDIA GPU; nvidia-smi lists none here" >&2; exit 1; }
	$(BIN)/python -m pytest -m gpu $(ARGS)

test-clients: .venv/.test ## Claude Code's own command line connects to the MCP server (from npm, 360 MB)
	tools/node.sh claude @anthropic-ai/claude-code@2.1.330 1800
	$(BIN)/python -m pytest tests/clients_claude_code.py $(ARGS)

check: style ## lint, format, types and the pure tests; about two minutes
	$(call WITH_TYPES,$(PYTEST) -m "not machines and not ray and not wandb and not slow and not long" $(ARGS))

lint: style ## lint, format and types
	$(BIN)/mypy

style: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo --no-cache

format: .venv/.test ## let ruff format and fix what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.test ## compare raylaunch with its peers; writes benchmarks/results.json
	$(BIN)/python -m benchmarks.run $(ARGS)

docs: .venv/.docs ## build the documentation into site/; a broken link fails it
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet --fresh-env -c docs -d build/docs -b html . site
	@echo "site/index.html"

docs-reference: .venv/.test ## write the blocking SDK, docs/reference and the tools in docs/mcp.md again, from the code
	$(BIN)/python -m tools.blocking_sdk
	$(BIN)/python -m tools.reference

clean: ## remove what the targets above have made in this folder
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache dist build site raylaunch-demo
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps: made again when what is installed changes.
.venv/.demo: pyproject.toml constraints.txt tools/setup.sh
	@tools/setup.sh demo
	@touch $@

.venv/.docs: pyproject.toml constraints.txt tools/setup.sh
	@tools/setup.sh docs
	@touch $@

.venv/.test: pyproject.toml constraints.txt tools/setup.sh tools/node.sh
	@tools/setup.sh test
	@touch $@ .venv/.demo .venv/.docs
