"""How sure a mean over training seeds is, when speakers are few as well."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import t

from raysv.verification.metrics import INTERVAL_LEVEL


class Estimate(NamedTuple):
    """A mean, and between what it would lie with other seeds and other speakers."""

    mean: float
    low: float
    high: float


def mean_over_seeds(
    values: ArrayLike,
    drawn: ArrayLike | None,
    speakers: int,
    level: float = INTERVAL_LEVEL,
    *,
    chosen_by_seeds: int = 1,
    chosen_by_speakers: int = 1,
) -> Estimate:
    """The mean of what was measured with several seeds on one list of pairs, with its interval.

    Two things vary: seeds, of which the measured ones tell how much, and speakers, of which a bootstrap does. Their
    variances are added, and the interval is Student's with the degrees of freedom that such a sum has: few, where most
    of the variance is that of few seeds. It is as wide as it has to be; quantiles of three values would not be.

    What was chosen because it did well is flattered by what it was chosen on. Each part is widened for that, as far as
    Bonferroni's quantile lies beyond the plain one: exact where there is one part alone, a bound otherwise.

    Args:
        values: `(seeds,)`, two at least.
        drawn: `(rounds,)` the mean over the seeds as other speakers would have given it; None: of speakers nothing is
            known, and the interval is over seeds alone.
        speakers: how many were drawn in each round.
        chosen_by_seeds: among how many it was chosen for doing well with these seeds; 1: it was not.
        chosen_by_speakers: among how many for doing well with these speakers.

    Source: Welch 1947, Biometrika 34, and Satterthwaite 1946, Biometrics Bulletin 2, for the degrees of freedom.
    """
    measured = np.asarray(values, dtype=float)
    if len(measured) < 2:
        raise ValueError(f"An interval over seeds needs two of them at least, got {len(measured)}.")

    def part(variance: float, degrees: int, among: int) -> tuple[float, int]:
        wider = _quantile(1 - (1 - level) / among, degrees) / _quantile(level, degrees)
        return variance * wider**2, degrees

    parts = [part(float(measured.var(ddof=1)) / len(measured), len(measured) - 1, chosen_by_seeds)]
    if drawn is not None:
        parts.append(part(float(np.asarray(drawn, dtype=float).var(ddof=1)), speakers - 1, chosen_by_speakers))
    variance = sum(part for part, _ in parts)
    mean = float(measured.mean())
    if variance == 0:
        return Estimate(mean, mean, mean)
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    half = _quantile(level, freedom) * math.sqrt(variance)
    return Estimate(mean, mean - half, mean + half)


def _quantile(level: float, degrees: float) -> float:
    """Half the width of Student's two-sided interval of this level, in deviations."""
    return float(t.ppf((1 + level) / 2, degrees))
