import math
from pathlib import Path
from statistics import NormalDist

from raysv.search.figures import det_figure, read_det


def test_a_det_curve_of_perfect_scores_can_be_drawn() -> None:
    figure = det_figure({"perfect": ([0.0, 0.0, 1.0], [1.0, 0.0, 0.0])})
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["perfect"]
    assert all(math.isfinite(value) for line in axes.lines for value in (*line.get_xdata(), *line.get_ydata()))


def test_equal_error_rates_lie_on_the_diagonal_and_scores_of_two_normals_on_a_line() -> None:
    thresholds = [step / 4 for step in range(-8, 9)]
    misses = [NormalDist(1).cdf(threshold) for threshold in thresholds]
    alarms = [1 - NormalDist(-1).cdf(threshold) for threshold in thresholds]
    diagonal, curve = det_figure({"normal": (misses, alarms)}).axes[0].lines
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata())
    inside = [(x, y) for x, y in curve.get_xydata() if abs(x) < 3 and abs(y) < 3]
    assert len(inside) > 10 and all(abs(x + y + 2) < 1e-9 for x, y in inside)


def test_rates_are_read_back_from_the_file_of_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "det.csv").write_text("p_miss,p_fa\n0.0,1.0\n0.5,0.25\n")
    assert read_det(tmp_path / "det.csv") == ([0.0, 0.5], [1.0, 0.25])
