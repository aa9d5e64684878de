"""Promise: each page of the site is complete in a browser, wide and narrow."""

import functools
import http.server
import os
import pathlib
import re
import threading
import urllib.parse

from playwright import sync_api
import pytest

SITE = pathlib.Path(__file__).parents[2] / 'docs' / '_build'
PAGES = sorted(str(path.relative_to(SITE)) for path in SITE.rglob('*.html'))
assert PAGES, 'There is no site: run `make docs` first.'
WIDE = {'width': 1280, 'height': 900}
NARROW = {'width': 390, 'height': 844}
FLAGS = (
  '--no-sandbox',
  '--disable-gpu',
  '--disable-quic',
  '--no-first-run',
  '--disable-background-networking',
  '--disable-component-update',
  '--disable-sync',
)
# What is wrong with a page once its maths is typeset.
PROBLEMS = r"""async () => {
  await window.MathJax?.startup?.promise;
  const problems = [];
  for (const element of document.querySelectorAll('.math')) {
    if (!element.querySelector('mjx-container svg')) {
      problems.push(`maths is not rendered: ${element.textContent}`);
    }
  }
  for (const error of document.querySelectorAll('[data-mml-node="merror"]')) {
    problems.push(`maths is wrong: ${error.closest('.math').textContent}`);
  }
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const {data, parentElement} = texts.currentNode;
    const isCode = parentElement.closest('code, pre, script, style');
    if (!isCode && /\$|\\[(\[]/.test(data)) {
      problems.push(`maths is text: ${data}`);
    }
  }
  for (const signature of document.querySelectorAll('dt.sig')) {
    if (/<|0x|\b_\w/.test(signature.textContent)) {
      problems.push(`signature: ${signature.textContent}`);
    }
  }
  for (const image of document.images) {
    image.loading = 'eager';
    await image.decode().catch(() => {});
    if (!image.naturalWidth) problems.push(`no image: ${image.src}`);
  }
  return problems;
}"""
# On a phone, the theme lets the whole content scroll: that is overflow, too.
OVERFLOW = """[...document.querySelectorAll('html, .content')]
  .filter(element => element.scrollWidth > element.clientWidth)
  .map(element => element.localName)"""
# A page that has one problem, and what is said of it.
BROKEN = {
  r'<p class="math">\(x\)</p>': 'maths is not rendered',
  r'<p>at $w$</p>': 'maths is text',
  '<dl><dt class="sig">f(x=&lt;object at 0x7f&gt;)</dt></dl>': 'signature',
  '<img src="missing.png">': 'no image',
  '<p style="width: 2000px">wide</p>': 'overflow',
  '<script src="https://example.com/a.js"></script>': 'request',
  '<script>console.error("oh")</script>': 'console',
  '<script>undefined()</script>': 'error',
  '<a href="missing.html">link</a>': 'link',
  '<a href="api.html#missing">link</a>': 'link',
}


@pytest.fixture(scope='session')
def server():
  """The address of the site on this machine."""

  class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
      pass

  handler = functools.partial(Handler, directory=SITE)
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as httpd:
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{httpd.server_port}/'
    httpd.shutdown()


@pytest.fixture(scope='session')
def browser():
  """The browser in $CHROMIUM."""
  with sync_api.sync_playwright() as playwright:
    browser = playwright.chromium.launch(
      executable_path=os.environ['CHROMIUM'], args=FLAGS
    )
    yield browser.new_context(viewport=WIDE)
    browser.close()


@pytest.fixture
def page(browser):
  """An empty page."""
  page = browser.new_page()
  yield page
  page.close()


@functools.cache
def anchors(path):
  """The anchors of a page, or None if there is no such file."""
  file = SITE / path
  if path.endswith('/') or not path:
    file /= 'index.html'
  if not file.is_file():
    return None
  text = file.read_text() if file.suffix == '.html' else ''
  return {'', *re.findall(r'\s(?:id|name)="([^"]*)"', text)}


def inspect(page, server, path):
  """What is wrong with a page: a list of sentences."""
  problems = []

  def refuse(route):
    problems.append(f'request: {route.request.url}')
    route.abort()

  page.route(lambda url: not url.startswith((server, 'data:')), refuse)
  page.on(
    'console',
    lambda message: (
      message.type == 'error' and problems.append(f'console: {message.text}')
    ),
  )
  page.on('pageerror', lambda error: problems.append(f'error: {error}'))
  page.goto(server + path)
  problems += page.evaluate(PROBLEMS)
  for size in NARROW, WIDE:
    page.set_viewport_size(size)
    wide = page.evaluate(OVERFLOW)
    problems += [f'overflow: {name} at {size["width"]} pixels' for name in wide]
  for url in page.evaluate('[...document.links].map(link => link.href)'):
    if url.startswith(server):
      target, anchor = urllib.parse.urldefrag(url.removeprefix(server))
      target = urllib.parse.unquote(target.partition('?')[0])
      if urllib.parse.unquote(anchor) not in (anchors(target) or ()):
        problems.append(f'link: {target}#{anchor}')
  return problems


@pytest.mark.parametrize('path', PAGES)
def test_page(page, server, path):
  """Maths, signatures, images, widths, requests, errors and links."""
  assert inspect(page, server, path) == []


@pytest.mark.parametrize('html', BROKEN)
def test_problems_are_found(page, server, html):
  """Each of the checks fails."""
  page.route(
    f'{server}broken.html',
    lambda route: route.fulfill(body=html, content_type='text/html'),
  )
  problems = inspect(page, server, 'broken.html')
  assert any(problem.startswith(BROKEN[html]) for problem in problems)


def test_search(page, server):
  """The search finds a function by its name."""
  page.goto(f'{server}search.html?q=momentum_asam')
  result = page.locator('#search-results li a').first
  result.wait_for()
  assert 'momentum_asam' in result.get_attribute('href')


def test_copy_button_and_dark_mode(page, server):
  """Code can be copied, and the theme changes to a dark one."""
  page.goto(server)
  assert page.locator('button.copybtn').count() > 0
  colors = set()
  for scheme in 'light', 'dark':
    page.emulate_media(color_scheme=scheme)
    style = page.evaluate_handle('getComputedStyle(document.body)')
    colors.add(style.evaluate('style => style.backgroundColor'))
  assert len(colors) == 2
