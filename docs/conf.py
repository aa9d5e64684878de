"""Sphinx configuration; `make docs` builds the site."""

import ast
import inspect
import pathlib
import posixpath
import re
import textwrap

import optax_asam

ROOT = pathlib.Path(__file__).resolve().parents[1]
REPOSITORY = 'https://github.com/optax-asam/optax_asam'
# Files of the repository that are pages of the site.
PAGES = {
  **{
    f'experiments/{path.name}': f'/evidence/{path.name}'
    for path in (ROOT / 'experiments').glob('*.md')
  },
  'CHANGELOG.md': '/changelog.md',
  'benchmarks/README.md': '/benchmarks.md',
  'experiments/README.md': '/evidence.md',
  'notebooks': '/notebooks.md',
}
# What private constants stand for, in signatures.
CONSTANTS = {
  '_ball.ELEMENTWISE': 'elementwise()',
  '_FIXED_STEPS': 'fixed_steps()',
}

project = 'optax_asam'
copyright = '2026, the optax_asam developers'
release = version = optax_asam.__version__
extensions = [
  'myst_nb',
  'sphinx.ext.autodoc',
  'sphinx.ext.autosummary',
  'sphinx.ext.intersphinx',
  'sphinx.ext.mathjax',
  'sphinx.ext.napoleon',
  'sphinx.ext.viewcode',
  'sphinx_copybutton',
]
exclude_patterns = ['_build', 'jupyter_execute', 'upstream']
maximum_signature_line_length = 70
nitpicky = True
# Types without a page: aliases in signatures, and those of other libraries.
nitpick_ignore_regex = [
  ('py:class', r'[A-Z]\w+|(chex|np)\.\w+|optax\.MaskedNode')
]

html_theme = 'furo'
html_title = f'optax_asam {release}'
html_baseurl = 'https://optax-asam.github.io/optax_asam/'
html_context = {'repository': REPOSITORY}
html_copy_source = False
html_domain_indices = html_use_index = False
html_css_files = ['site.css']
html_sidebars = {
  '**': [
    'sidebar/brand.html',
    'sidebar/search.html',
    'sidebar/scroll-start.html',
    'sidebar/navigation.html',
    'sidebar/repository.html',
    'sidebar/scroll-end.html',
  ]
}
templates_path = ['_templates']
copybutton_exclude = '.linenos, .gp, .go'

# From npm, by make: nothing on the site is loaded from elsewhere.
mathjax_path = 'tex-svg-full.js'
html_static_path = [
  '_static',
  f'../.venv/mathjax/node_modules/mathjax/es5/{mathjax_path}',
]

autodoc_member_order = 'bysource'
autosummary_generate = True
napoleon_attr_annotations = False  # The signature has the types.
napoleon_numpy_docstring = False

# Lists of the objects that are linked, so that no build needs a network.
intersphinx_mapping = {
  'equinox': ('https://docs.kidger.site/equinox/', 'intersphinx/equinox.inv'),
  'flax': ('https://flax.readthedocs.io/en/latest/', 'intersphinx/flax.inv'),
  'jax': ('https://docs.jax.dev/en/latest/', 'intersphinx/jax.inv'),
  'optax': ('https://optax.readthedocs.io/en/latest/', 'intersphinx/optax.inv'),
}

myst_enable_extensions = ['dollarmath']
myst_heading_anchors = 4  # the same anchors as on a code host
nb_execution_mode = 'cache'
nb_execution_cache_path = 'out/docs/notebooks'  # from where make runs
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_merge_streams = True


def relink(text, path):
  """Makes the links in a file of the repository fit the site.

  They lead to pages of the site, or else to the repository. Badges, which are
  loaded from elsewhere, become plain links.
  """

  def link(match):
    text, target, anchor = match.groups()
    target = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
    if not (ROOT / target).exists():  # a URL, or code
      return match[0]
    if target in PAGES:
      target = PAGES[target]
    elif target.startswith('docs/'):
      target = target.removeprefix('docs')
    elif text.startswith('!'):
      target = f'/../{target}'
    else:
      target = f'{REPOSITORY}/blob/main/{target}'
    return f'{text}({target}{anchor})'

  text = re.sub(r'\[!\[([^\]]*)\]\(https:[^)]*\)\]', r'[\1]', text)
  return re.sub(r'(!?\[[^\]]*\])\(([^)\s#]+)(#[^)\s]*|)\)', link, text)


def read_source(app, docname, source):
  """Changes the links of a page."""
  path = pathlib.Path(app.env.doc2path(docname)).resolve()
  source[0] = relink(source[0], path.relative_to(ROOT).as_posix())


def read_include(app, path, docname, source):
  """Changes the links of an included file."""
  del docname
  path = pathlib.Path(app.srcdir, path).resolve()
  source[0] = relink(source[0], path.relative_to(ROOT).as_posix())


def write_signature(app, what, name, obj, *signature):
  """The signature as it is in the source, where types have their names."""
  del app, name, signature
  if what not in ('class', 'function'):
    return None
  (node,) = ast.parse(textwrap.dedent(inspect.getsource(obj))).body
  if what == 'class':
    fields = [x for x in node.body if isinstance(x, ast.AnnAssign)]
    return f'({", ".join(map(ast.unparse, fields))})', None
  args, returns = ast.unparse(node.args), ast.unparse(node.returns)
  for constant, value in CONSTANTS.items():
    args = args.replace(constant, value)
  private = r'\b(_\w+|transform)\.'
  return f'({re.sub(private, "", args)})', re.sub(private, '', returns)


def setup(app):
  """Registers the hooks."""
  app.connect('autodoc-process-signature', write_signature)
  app.connect('include-read', read_include)
  app.connect('source-read', read_source)
