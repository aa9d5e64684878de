PYTHON ?= python3

.PHONY: demo test docs clean

# Train on real data: SGD, SAM and ASAM on digits with noisy labels.
demo: .venv/demo/.installed
	.venv/demo/bin/python examples/train.py --out out/demo

# Everything that must hold: style, types, doctests, tests, notebook.
test: .venv/test/.installed
	.venv/test/bin/ruff check
	.venv/test/bin/ruff format --check
	.venv/test/bin/basedpyright --pythonpath .venv/test/bin/python
	.venv/test/bin/python -m pytest -n 2 --dist loadfile

# The site, in docs/_build; warnings are errors.
docs: .venv/docs/.installed
	.venv/docs/bin/sphinx-build -W --keep-going -q docs docs/_build

.venv/demo/.installed: EXTRA = examples
.venv/test/.installed: EXTRA = test
.venv/docs/.installed: EXTRA = docs
.venv/%/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'Python 3.11 or newer is needed: make PYTHON=python3.12 ...' >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv/$*
	.venv/$*/bin/python -m pip install --quiet --no-compile \
	  --disable-pip-version-check --editable '.[$(EXTRA)]'
	touch $@

clean:
	rm -rf .venv out
