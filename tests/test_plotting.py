"""Promise: plots of the loss show the numbers that they are given."""

from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
import numpy as np
import pytest

from optax_asam import plotting

T = np.linspace(-1.0, 2.0, 7)


@pytest.fixture
def ax():
  """Axes without pyplot."""
  return Figure().subplots()


def test_curve(ax):
  """One line, through the losses."""
  line = plotting.loss_curve(ax, T, T**2, color='red', label='SGD', linewidth=3)
  assert [*ax.lines] == [line]
  np.testing.assert_array_equal(line.get_xydata(), np.stack([T, T**2], axis=1))
  assert line.get_label() == 'SGD'
  assert (line.get_color(), line.get_linewidth()) == ('red', 3)


def test_curves_of_several_directions(ax):
  """A thin line for each in the color of their mean, which has the label."""
  losses = np.stack([T**2, 3 * T**2, T + 1])
  line = plotting.loss_curve(ax, T, losses, label='SGD')
  mean, *each = ax.lines
  assert mean is line
  np.testing.assert_allclose(mean.get_ydata(), losses.mean(axis=0))
  np.testing.assert_array_equal([one.get_ydata() for one in each], losses)
  for one in each:
    np.testing.assert_array_equal(one.get_xdata(), T)
    assert one.get_color() == mean.get_color()
    assert one.get_linewidth() < mean.get_linewidth()
  assert [text.get_text() for text in ax.legend().texts] == ['SGD']


def test_curve_of_two_directions_is_an_error(ax):
  """The message names what draws it."""
  with pytest.raises(ValueError, match='loss_contours'):
    plotting.loss_curve(ax, T, np.ones((2, 3, 4)))


def test_contours(ax):
  """The first direction is x, the second y, and levels are where they are.

  Contours of a linear loss are exact. The shape is square, so a transposed
  array would be drawn without an error.
  """
  t1, t2 = T, 10 * T
  loss = lambda x, y: 3 * x + y
  losses = loss(t1[:, None], t2[None, :])
  levels = np.array([0.5, 4.5, 9.5])
  contours = plotting.loss_contours(
    ax, t1, t2, losses, levels=levels, cmap='Greys'
  )
  np.testing.assert_array_equal(contours.levels, levels)
  assert contours.cmap.name == 'Greys'
  for path in contours.get_paths():
    x, y = path.vertices.T
    assert x.size
    on_level = abs(loss(x[:, None], y[:, None]) - levels).min(axis=1) < 1e-6
    on_edge = np.isin(x, t1[[0, -1]]) | np.isin(y, t2[[0, -1]])
    assert (on_level | on_edge).all()
    assert on_level.any()


def test_number_of_levels(ax):
  """By default, Matplotlib chooses about 16 round levels."""
  contours = plotting.loss_contours(ax, T, T, T[:, None] + T[None, :])
  assert 12 <= len(contours.levels) <= 20


def test_contours_above_the_last_level(ax):
  """They have the last color, rather than none."""
  losses = T[:, None] + T[None, :]
  contours = plotting.loss_contours(ax, T, T, losses, levels=np.array([-2, 0]))
  assert contours.extend == 'max'
  assert len(contours.get_paths()) == 2


def test_tidy():
  """A grid and two spines, on all of the given axes."""
  tidied, other = Figure().subplots(1, 2)
  plotting.tidy(tidied)
  for ax, frame in (tidied, False), (other, True):
    assert ax.spines['top'].get_visible() is frame
    assert ax.spines['right'].get_visible() is frame
    assert ax.spines['left'].get_visible()
    assert ax.get_xgridlines()[0].get_visible() is not frame


def test_colors():
  """Each is a color, and no two are equal."""
  colors = [to_rgba(color) for color in plotting.COLORS.values()]
  assert len(set(colors)) == len(colors)
