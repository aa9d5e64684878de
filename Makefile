PYTHON ?= python3
INTERPRETER = $(PYTHON)
PYTEST = -m pytest -n 2 --dist loadfile --junitxml out/tests/$@.xml

.PHONY: demo test test-oldest test-newest test-tpu docs clean

# Train on real data: SGD, SAM and ASAM on digits with noisy labels.
demo: .venv/demo/.installed
	.venv/demo/bin/python examples/train.py --out out/demo

# Everything that must hold: style, types, doctests, tests, notebook, and each
# branch of the package taken.
test: .venv/test/.installed
	.venv/test/bin/ruff check
	.venv/test/bin/ruff format --check
	.venv/test/bin/basedpyright --pythonpath .venv/test/bin/python
	.venv/test/bin/python $(PYTEST) --cov

# The tests on the declared lower bounds.
test-oldest: .venv/oldest/.installed
	.venv/oldest/bin/python $(PYTEST)

# The tests on the newest Python that runs here, and the JAX that it brings.
test-newest: .venv/newest/.installed
	.venv/newest/bin/python $(PYTEST)

# What ASAM costs on TPU, by its compiler, without a TPU: brings libtpu, 640 MB.
test-tpu: .venv/tpu/.installed
	.venv/tpu/bin/python $(PYTEST) tests/tpu

# The site, in docs/_build; warnings are errors.
docs: .venv/docs/.installed
	.venv/docs/bin/sphinx-build -W --keep-going -q docs docs/_build

.venv/demo/.installed: EXTRA = examples
.venv/test/.installed: EXTRA = test
.venv/tpu/.installed: EXTRA = test,tpu
.venv/docs/.installed: EXTRA = docs
.venv/oldest/.installed: EXTRA = test
.venv/oldest/.installed: CONSTRAINTS = --constraint .venv/oldest.txt
.venv/oldest/.installed: .venv/oldest.txt
.venv/newest/.installed: EXTRA = test
.venv/newest/.installed: INTERPRETER = $(shell $(PYTHON) .ci/newest_python)

.venv/oldest.txt: pyproject.toml .ci/lower_bounds
	mkdir -p .venv
	$(PYTHON) .ci/lower_bounds > $@

.venv/%/.installed: pyproject.toml
	@test -n '$(INTERPRETER)' || \
	  { echo 'No Python newer than that of make test runs here.' >&2; exit 1; }
	@$(INTERPRETER) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'Python 3.11 or newer is needed: make PYTHON=python3.12 ...' >&2; exit 1; }
	$(INTERPRETER) -m venv --clear .venv/$*
	.venv/$*/bin/python -m pip install --quiet --no-compile \
	  --disable-pip-version-check $(CONSTRAINTS) --editable '.[$(EXTRA)]'
	touch $@

clean:
	rm -rf .venv out
