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
    values: ArrayLike, drawn: ArrayLike | None, speakers: int, level: float = INTERVAL_LEVEL
) -> Estimate:
    """The mean of what was measured with several seeds on one list of pairs, with its interval.

    Two things vary: seeds, of which the measured ones tell how much, and speakers, of which a bootstrap does. Their
    variances are added, and the interval is Student's with the degrees of freedom that such a sum has: few, where most
    of the variance is that of few seeds. It is as wide as it has to be; quantiles of three values would not be.

    Args:
        values: `(seeds,)`, two at least.
        drawn: `(rounds,)` the mean over the seeds as other speakers would have given it; None: of speakers nothing is
            known, and the interval is over seeds alone.
        speakers: how many were drawn in each round.

    Source: Welch 1947, Biometrika 34, and Satterthwaite 1946, Biometrics Bulletin 2, for the degrees of freedom.
    """
    measured = np.asarray(values, dtype=float)
    if len(measured) < 2:
        raise ValueError(f"An interval over seeds needs two of them at least, got {len(measured)}.")
    parts = [(float(measured.var(ddof=1)) / len(measured), len(measured) - 1)]
    if drawn is not None:
        parts.append((float(np.asarray(drawn, dtype=float).var(ddof=1)), speakers - 1))
    variance = sum(part for part, _ in parts)
    mean = float(measured.mean())
    if variance == 0:
        return Estimate(mean, mean, mean)
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    half = float(t.ppf((1 + level) / 2, freedom)) * math.sqrt(variance)
    return Estimate(mean, mean - half, mean + half)
