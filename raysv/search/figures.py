"""A study's pictures, drawn without a display."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from statistics import NormalDist

from matplotlib.figure import Figure

DET_TICKS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4)  # error rates written on the axes
DET_LIMITS = (0.0005, 0.55)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe & Ito, for all eyes


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
