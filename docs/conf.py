"""Sphinx configuration."""

import re

import optax_asam

SOURCE = 'https://github.com/optax-asam/optax_asam/blob/main/'

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
exclude_patterns = ['_build', 'upstream']
autodoc_typehints = 'none'  # The docstrings say more.
autodoc_member_order = 'bysource'
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
myst_enable_extensions = ['dollarmath']
myst_heading_anchors = 4  # the same anchors as on a code host


def link_to_source(app, docname, source):
  """Turns links to files outside of ``docs/`` into links to the repository."""
  del app, docname
  source[0] = re.sub(r'(?<!!)(\[[^\]]*\])\(\.\./', rf'\1({SOURCE}', source[0])


def setup(app):
  """Registers the hook."""
  app.connect('source-read', link_to_source)
