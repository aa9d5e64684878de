PYTHON ?= python3
INTERPRETER = $(PYTHON)
PYTEST = -m pytest -n 2 --dist loadfile --junitxml out/tests/$@.xml
LIBRARY = tests/test_*.py optax_asam
MATHJAX = .venv/mathjax/node_modules/mathjax/es5/tex-svg-full.js

.PHONY: demo bench test test-all test-oldest test-newest test-tpu \
  test-trainers test-easydel test-maxtext test-dist test-site dist docs lint \
  clean

# Train on real data: SGD, SAM and ASAM on digits with label noise.
demo: .venv/demo/.installed
	.venv/demo/bin/python -m experiments.compare --out out/demo

# The time of a step with each method, on a machine that does nothing else. Of
# PyTorch, pip installs what it takes to be right for the machine: up to 5 GB.
bench: .venv/demo/.installed .venv/torch/.installed
	.venv/demo/bin/python -m benchmarks.step_time \
	  --torch .venv/torch/bin/python --minutes 40 --out benchmarks/results
	.venv/demo/bin/python -m benchmarks.step_time --report

# What a contributor runs: style, types, doctests, every branch of the library,
# the docs' code, a smoke run of each program, and one notebook.
test: lint
	.venv/test/bin/python $(PYTEST) -m 'not slow' --cov

# Everything that runs on this Python.
test-all: lint
	.venv/test/bin/python $(PYTEST) --hypothesis-profile=thorough --cov

lint: .venv/test/.installed
	.venv/test/bin/ruff check
	.venv/test/bin/ruff format --check
	.venv/test/bin/zizmor --offline --quiet --min-severity medium .github
	.venv/test/bin/basedpyright --pythonpath .venv/test/bin/python

# The library's tests on the declared lower bounds.
test-oldest: .venv/oldest/.installed
	.venv/oldest/bin/python $(PYTEST) $(LIBRARY)

# The library's tests on the newest Python installed, with the JAX that pip
# resolves for it.
test-newest: .venv/newest/.installed
	.venv/newest/bin/python $(PYTEST) $(LIBRARY)

# What ASAM costs on TPU, from its compiler, without a TPU; libtpu is 640 MB.
test-tpu: .venv/tpu/.installed
	.venv/tpu/bin/python $(PYTEST) tests/tpu

# The code of docs/trainers.md in the trainers themselves; 4 GB.
test-trainers: .venv/trainers/.installed
	.venv/trainers/bin/python $(PYTEST) tests/trainers

# Two more trainers, each in an environment of its own; MaxText needs Python 3.12
# or newer.
test-easydel test-maxtext: test-%: .venv/%/.installed
	.venv/$*/bin/python $(PYTEST) tests/trainers/test_$*.py

# The wheel and the source distribution, in dist.
dist: .venv/dist/.installed
	rm -rf dist
	.venv/dist/bin/python -m build --outdir dist
	.venv/dist/bin/python -m twine check --strict dist/*

# Both install into empty environments, and run README's first program, on each
# supported Python installed.
test-dist: dist
	$(PYTHON) .ci/check_dist dist/*

# The site, in docs/_build; warnings are errors. The notebooks are executed, unless
# their code and outputs are in out/docs.
docs: .venv/docs/.installed $(MATHJAX)
	rm -rf docs/_build docs/api/generated
	.venv/docs/bin/sphinx-build -W --keep-going -q -d out/docs/doctrees \
	  docs docs/_build
	@echo 'Open docs/_build/index.html'

# Each page of the site in a browser, after make docs.
test-site: .venv/site/.installed
	CHROMIUM=$$(.ci/chromium) && export CHROMIUM && \
	  .venv/site/bin/python $(PYTEST) --dist load \
	  --confcutdir tests/site tests/site

$(MATHJAX):
	@command -v npm > /dev/null || \
	  { echo 'make docs needs npm, for MathJax: install Node.js.' >&2; exit 1; }
	mkdir -p .venv/mathjax
	npm install --prefix .venv/mathjax --no-save --no-package-lock \
	  --ignore-scripts --no-audit --no-fund --silent mathjax@3.2.2

.venv/demo/.installed: EXTRA = examples
.venv/test/.installed: EXTRA = test
.venv/tpu/.installed: EXTRA = test,tpu
.venv/trainers/.installed: EXTRA = trainers
.venv/easydel/.installed: EXTRA = easydel
.venv/maxtext/.installed: EXTRA = maxtext
.venv/maxtext/.installed: INTERPRETER = \
  $(shell $(PYTHON) .ci/newest_python --all | head -n 1)
.venv/docs/.installed: EXTRA = docs
.venv/site/.installed: EXTRA = site
.venv/oldest/.installed: EXTRA = test
.venv/oldest/.installed: CONSTRAINTS = --constraint .venv/oldest.txt
.venv/oldest/.installed: .venv/oldest.txt
.venv/newest/.installed: EXTRA = test
.venv/newest/.installed: INTERPRETER = $(shell $(PYTHON) .ci/newest_python)

.venv/torch/.installed:
	$(PYTHON) -m venv --clear .venv/torch
	.venv/torch/bin/python -m pip install --quiet --no-compile \
	  --disable-pip-version-check torch==2.13.0 pytorch-optimizer==4.1.0
	touch $@

.venv/dist/.installed:
	$(PYTHON) -m venv --clear .venv/dist
	.venv/dist/bin/python -m pip install --quiet --disable-pip-version-check \
	  build twine
	touch $@

.venv/oldest.txt: pyproject.toml .ci/lower_bounds
	mkdir -p .venv
	$(PYTHON) .ci/lower_bounds > $@

.venv/%/.installed: pyproject.toml
	@test -n '$(INTERPRETER)' || \
	  { echo 'No Python newer than that of make test was found.' >&2; exit 1; }
	@$(INTERPRETER) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'Python 3.11 or newer is needed: make PYTHON=python3.12 ...' >&2; exit 1; }
	$(INTERPRETER) -m venv --clear .venv/$*
	.venv/$*/bin/python -m pip install --quiet --no-compile \
	  --disable-pip-version-check $(CONSTRAINTS) --editable '.[$(EXTRA)]'
	touch $@

clean:
	rm -rf .venv dist docs/_build docs/api/generated docs/jupyter_execute out/docs out/tests
