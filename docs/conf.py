"""Sphinx configuration."""

import optax_asam

project = 'optax_asam'
copyright = '2026, the optax_asam developers'
release = version = optax_asam.__version__
extensions = [
  'myst_parser',
  'sphinx.ext.autodoc',
  'sphinx.ext.mathjax',
  'sphinx.ext.napoleon',
]
html_theme = 'furo'
html_title = f'optax_asam {release}'
exclude_patterns = ['_build']
autodoc_typehints = 'none'  # The docstrings say more.
autodoc_member_order = 'bysource'
napoleon_google_docstring = True
napoleon_numpy_docstring = False
myst_enable_extensions = ['dollarmath']
