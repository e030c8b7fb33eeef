"""A study's pictures, drawn without a display."""

from __future__ import annotations

import csv
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from raysv.search.wording import show_value

DET_TICKS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4)  # error rates written on the axes
DET_LIMITS = (0.0005, 0.55)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe & Ito, for all eyes
CMAP = colormaps["viridis"]  # dark for low error rates


@dataclass(frozen=True)
class Curve:
    """A trial's EER by epoch; with a label where it is one to look at."""

    eers: Mapping[int, float]
    complete: bool
    label: str = ""


@dataclass(frozen=True)
class Point:
    """A trial's values by short name, and its last EER."""

    values: Mapping[str, Any]
    eer: float
    complete: bool


def det_figure(curves: dict[str, tuple[Iterable[float], Iterable[float]]]) -> Figure:
    """Detection error trade-off: misses over false alarms, on axes where normally distributed scores give lines.

    Args:
        curves: by their name in the legend, miss rates and false-alarm rates at the same thresholds, in [0, 1].

    Source: Martin et al. 1997, The DET curve in assessment of detection task performance.
    """
    figure = Figure(figsize=(5.2, 5.2), layout="constrained")
    axes = figure.add_subplot()
    low, high = (_probit(limit) for limit in DET_LIMITS)
    axes.plot([low, high], [low, high], color="0.8", linewidth=1, linestyle="--", zorder=1)
    for number, (name, (misses, false_alarms)) in enumerate(curves.items()):
        points = [(_probit(alarm), _probit(miss)) for miss, alarm in zip(misses, false_alarms, strict=True)]
        axes.plot(*zip(*points, strict=True), color=COLOURS[number % len(COLOURS)], linewidth=1.8, label=name)
    labels = [f"{100 * tick:g}" for tick in DET_TICKS]
    places = [_probit(tick) for tick in DET_TICKS]
    axes.set_xticks(places, labels)
    axes.set_yticks(places, labels)
    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    axes.set(xlabel="false acceptances (%)", ylabel="false rejections (%)")
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if curves:
        axes.legend(frameon=False, loc="upper right")
    return figure


def read_det(path: Path) -> tuple[list[float], list[float]]:
    """Miss rates and false-alarm rates from the `det.csv` of a checkpoint."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [float(row["p_miss"]) for row in rows], [float(row["p_fa"]) for row in rows]


def _probit(rate: float) -> float:
    """Where an error rate lies on an axis; 0 and 1, infinitely far out, lie just beyond its ends."""
    return NormalDist().inv_cdf(min(max(rate, DET_LIMITS[0] / 2), 1 - DET_LIMITS[0] / 2))


def learning_curves(curves: Sequence[Curve]) -> Figure:
    """EER over epochs: curves with a label in colour, in their order; others grey, and lighter if they ended early."""
    figure, axes = _axes(7.2, 4.0)
    named = 0
    for curve in curves:
        epochs, eers = zip(*sorted(curve.eers.items()), strict=True) if curve.eers else ((), ())
        percent = [100 * eer for eer in eers]
        if curve.label:
            axes.plot(epochs, percent, color=COLOURS[named], linewidth=2.2, label=curve.label, zorder=4)
            named += 1
        else:
            colour, width = ("0.55", 1.1) if curve.complete else ("0.8", 0.9)
            marker = "." if len(epochs) == 1 else ""
            axes.plot(epochs, percent, color=colour, linewidth=width, marker=marker, zorder=2 + curve.complete)
    axes.set(xlabel="epoch", ylabel="EER on the dev pairs (%)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if named:
        axes.legend(frameon=False)
    return figure


def parallel_coordinates(points: Sequence[Point], names: Sequence[str]) -> Figure:
    """One line per trial through its values, the darker the lower its EER; a gap where a key was not searched.

    Args:
        names: the searched keys, as they are written below their axes.
    """
    figure, axes = _axes(7.2, 3.6)
    keys = [*names, "EER %"]
    columns = [[point.values.get(name) for point in points] for name in names]
    columns.append([100 * point.eer for point in points])
    scaled = [_unit_range(column) for column in columns]
    colours = _eer_colours(points)
    for row in sorted(range(len(points)), key=lambda row: -points[row].eer):  # the best on top
        heights = [column[row] for column in scaled]
        point = points[row]
        axes.plot(range(len(keys)), heights, color=colours[row], linewidth=1.8 if point.complete else 0.9, alpha=0.9)
    for place, column in enumerate(columns):
        low, high = _ends(column)
        axes.axvline(place, color="0.75", linewidth=0.8, zorder=1)
        axes.text(place, -0.06, low, ha="center", va="top", fontsize=8, color="0.35")
        axes.text(place, 1.04, high, ha="center", va="bottom", fontsize=8, color="0.35")
    axes.set_xticks(range(len(keys)), keys)
    axes.set_yticks([])
    axes.tick_params(axis="x", pad=14, length=0)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.grid(visible=False)
    return figure


def slices(points: Sequence[Point], names: Sequence[str], log: Collection[str] = ()) -> Figure:
    """EER over each searched key alone; trials that ended early as rings.

    Args:
        log: names of keys on a logarithmic axis.
    """
    columns = min(4, max(1, len(names)))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(7.2, 2.5 * rows), layout="constrained")
    for place, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, place + 1)
        for complete in (False, True):
            some = [point for point in points if point.complete == complete and point.values.get(name) is not None]
            face = COLOURS[0] if complete else "none"
            axes.scatter(
                [point.values[name] for point in some],
                [100 * point.eer for point in some],
                s=22,
                facecolors=face,
                edgecolors=COLOURS[0],
                linewidths=0.9,
            )
        if name in log:
            _log_axis(axes, "x")
        axes.set_xlabel(name)
        if place % columns == 0:
            axes.set_ylabel("EER (%)")
        _plain(axes)
    return figure


def interaction(points: Sequence[Point], across: str, up: str, log: Collection[str] = ()) -> Figure:
    """Two keys against each other, each trial a dot, the darker the lower its EER."""
    figure, axes = _axes(4.4, 3.6)
    both = [point for point in points if across in point.values and up in point.values]
    worst_first = sorted(both, key=lambda point: -point.eer)
    dots = axes.scatter(
        [point.values[across] for point in worst_first],
        [point.values[up] for point in worst_first],
        c=[100 * point.eer for point in worst_first],
        cmap=CMAP,
        s=[70 if point.complete else 30 for point in worst_first],
        edgecolors="white",
        linewidths=0.6,
    )
    for name, side in ((across, "x"), (up, "y")):
        if name in log:
            _log_axis(axes, side)
    axes.set(xlabel=across, ylabel=up)
    figure.colorbar(dots, label="EER (%)")
    return figure


def pareto_front(
    points: Sequence[tuple[float, float]], front: Sequence[tuple[float, float]], names: Sequence[str], up: str
) -> Figure:
    """EER against a second objective; those that none is better than in both, joined and named.

    Args:
        points, front: EER and the second objective of each trial.
        names: of the trials on the front.
        up: what the second objective is.
    """
    figure, axes = _axes(4.8, 3.8)
    axes.scatter([100 * eer for eer, _ in points], [value for _, value in points], s=24, color="0.7")
    eers, values = [100 * eer for eer, _ in front], [value for _, value in front]
    axes.plot(eers, values, drawstyle="steps-post", color=COLOURS[1], linewidth=1.4, marker="o")
    for eer, value, name in zip(eers, values, names, strict=True):
        axes.annotate(name, (eer, value), xytext=(5, 5), textcoords="offset points", fontsize=9)
    axes.set(xlabel="EER on the dev pairs (%)", ylabel=up)
    return figure


def importance_bars(importances: Mapping[str, float]) -> Figure:
    """Shares of the EERs' variance, the largest on top."""
    figure, axes = _axes(7.2, 0.6 + 0.36 * len(importances))
    ordered = sorted(importances.items(), key=lambda item: item[1])
    bars = axes.barh([name for name, _ in ordered], [100 * share for _, share in ordered], color=COLOURS[0], height=0.6)
    axes.bar_label(bars, fmt="%.0f %%", padding=4, fontsize=9, color="0.3")
    axes.set(xlabel="share of the variance (%)", xlim=(0, 110))
    axes.grid(axis="y", visible=False)
    return figure


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    _plain(axes)
    return figure, axes


def _plain(axes: Axes) -> None:
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _log_axis(axes: Axes, side: str) -> None:
    """A logarithmic axis whose few ticks are plain numbers."""
    axes.set(**{f"{side}scale": "log"})
    axis = axes.xaxis if side == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def _eer_colours(points: Sequence[Point]) -> list[Any]:
    eers = [point.eer for point in points]
    low, high = min(eers, default=0.0), max(eers, default=1.0)
    return [CMAP((eer - low) / (high - low) if high > low else 0.0) for eer in eers]


def _unit_range(column: Sequence[Any]) -> list[float]:
    """Values between 0 and 1, words by their place in the alphabet; NaN, a gap, where there is none."""
    numbers = _numbers(column)
    there = [number for number in numbers if number is not None]
    low, high = min(there, default=0.0), max(there, default=1.0)
    span = (high - low) or 1.0
    return [math.nan if number is None else (number - low) / span for number in numbers]


def _numbers(column: Sequence[Any]) -> list[float | None]:
    words = sorted({value for value in column if isinstance(value, str)})
    return [
        None if value is None else float(words.index(value)) if value in words else float(value) for value in column
    ]


def _ends(column: Sequence[Any]) -> tuple[str, str]:
    """The lowest and the highest value, as text."""
    words = sorted({value for value in column if isinstance(value, str)})
    there = words or [value for value in column if value is not None]
    if not there:
        return "", ""
    return show_value(min(there)), show_value(max(there))
