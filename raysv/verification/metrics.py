"""EER, minDCF, DET curve: pure functions of scores and labels.

A pair is accepted when its score is at least the threshold. Pairs of equal score are accepted or rejected together,
so there is one operating point below every distinct score and one above them all, whatever order the pairs come in.
Scores may be infinite. Every function raises ValueError for NaN scores, for lists of different lengths, and where
either pairs of one speaker or pairs of two are missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]


class ErrorRates(NamedTuple):
    """What one pass over a scored pair list tells."""

    eer: float
    min_dcf: dict[float, float]  # by p_target
    threshold: float


def error_rates(scores: ArrayLike, same_speaker: ArrayLike, p_targets: Sequence[float] = (0.01, 0.05)) -> ErrorRates:
    """`eer`, `min_dcf` at each prior and `eer_threshold`, from one sort.

    Args:
        scores: `(pairs,)`, larger for more alike.
        same_speaker: `(pairs,)`, true where both recordings are of one speaker.
        p_targets: priors of a pair of one speaker.
    """
    points = _operating_points(scores, same_speaker)
    min_dcfs = {prior: _min_dcf(points, prior, 1, 1) for prior in p_targets}
    return ErrorRates(_crossing(points.p_miss, points.p_fa), min_dcfs, _threshold(points))


def eer(scores: ArrayLike, same_speaker: ArrayLike) -> float:
    """Equal error rate in [0, 1]: where the operating points, joined by straight lines, meet P_miss = P_fa.

    A line between two points is what a threshold drawn at random between the two would reach. Ties thus cost what
    guessing costs: when all scores are equal, the EER is 0.5.
    """
    points = _operating_points(scores, same_speaker)
    return _crossing(points.p_miss, points.p_fa)


def eer_threshold(scores: ArrayLike, same_speaker: ArrayLike) -> float:
    """The threshold, itself one of the scores, whose P_miss and P_fa are closest; of two such, the lower."""
    return _threshold(_operating_points(scores, same_speaker))


def min_dcf(scores: ArrayLike, same_speaker: ArrayLike, p_target: float, c_miss: float = 1, c_fa: float = 1) -> float:
    """Smallest detection cost over all thresholds, divided by the cost of the better system that ignores its input.

    Returns: min of `p_target · c_miss · P_miss + (1 − p_target) · c_fa · P_fa`, over
        `min(p_target · c_miss, (1 − p_target) · c_fa)`; so in [0, 1].
    Source: the evaluation plan of NIST SRE 2016.
    """
    return _min_dcf(_operating_points(scores, same_speaker), p_target, c_miss, c_fa)


def det_curve(scores: ArrayLike, same_speaker: ArrayLike, points: int | None = None) -> tuple[Array, Array]:
    """P_miss, rising from 0 to 1, and P_fa, falling from 1 to 0, of every operating point.

    Args:
        points: the most points to return, both ends among them, spread so that the rare errors of a DET plot's
            stretched axes keep theirs; all where None.
    """
    _, p_miss, p_fa = _operating_points(scores, same_speaker)
    if points is None or points >= len(p_miss):
        return p_miss, p_fa
    if points < 2:
        raise ValueError(f"A curve needs at least its 2 ends, got points={points}.")
    same = np.asarray(same_speaker, dtype=bool)
    position = _log_odds(p_miss, same.sum()) - _log_odds(p_fa, (~same).sum())
    kept = np.unique(np.searchsorted(position, np.linspace(position[0], position[-1], points)))
    return p_miss[kept], p_fa[kept]


def bootstrap_eer(
    scores: ArrayLike,
    same_speaker: ArrayLike,
    enrolment_speakers: ArrayLike,
    test_speakers: ArrayLike,
    generator: np.random.Generator,
    rounds: int = 1000,
    level: float = 0.9,
) -> tuple[float, float]:
    """Interval of the EER if other speakers of the same population had been recorded.

    Pairs that share a speaker err together, so speakers are drawn anew, not pairs. A round draws as many speakers as
    there are, with replacement. A pair of two speakers then counts as often as the product of how often each was
    drawn, a pair of one as often as that one was. A round left without one kind of pair is drawn again.

    Args:
        enrolment_speakers, test_speakers: `(pairs,)` names or numbers.
        generator: the randomness of the draws.
        level: share of the rounds that fall inside the interval.

    Returns: its ends, `low` and `high`, in [0, 1].
    Source: Poh and Bengio 2007, IEEE TPAMI 29(3), on user-level bootstraps.
    """
    values, same = _checked(scores, same_speaker)
    order, cuts = _ranking(values)
    if not np.shape(enrolment_speakers) == np.shape(test_speakers) == values.shape:
        raise ValueError(
            f"{len(values)} pairs need as many enrolment and test speakers, "
            f"got {np.shape(enrolment_speakers)} and {np.shape(test_speakers)}."
        )
    names, codes = np.unique(np.concatenate([enrolment_speakers, test_speakers]), return_inverse=True)
    enrolment, test = codes.reshape(2, -1)[:, order]
    targets = same[order]
    target_speakers, enrolment, test = enrolment[targets], enrolment[~targets], test[~targets]
    target_cuts = _below(targets, cuts)
    corners = _corners(target_cuts, cuts - target_cuts)  # resampling stretches the lines between them, no more
    target_cuts, other_cuts = target_cuts[corners], (cuts - target_cuts)[corners]
    rates: list[float] = []
    while len(rates) < rounds:
        counts = generator.multinomial(len(names), np.full(len(names), 1 / len(names)))
        rejected_targets = _below(counts[target_speakers], target_cuts)
        rejected_others = _below(counts[enrolment] * counts[test], other_cuts)
        if rejected_targets[-1] and rejected_others[-1]:
            rates.append(_crossing(*_error_shares(rejected_targets, rejected_others)))
    low, high = np.quantile(rates, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


class _OperatingPoints(NamedTuple):
    """Thresholds rising, so P_miss rising and P_fa falling; the last threshold, above every score, is infinite."""

    thresholds: Array
    p_miss: Array
    p_fa: Array


def _operating_points(scores: ArrayLike, same_speaker: ArrayLike) -> _OperatingPoints:
    values, same = _checked(scores, same_speaker)
    order, cuts = _ranking(values)
    rejected_targets = _below(same[order], cuts)
    thresholds = np.append(values[order[cuts[:-1]]], np.inf)
    return _OperatingPoints(thresholds, *_error_shares(rejected_targets, cuts - rejected_targets))


def _checked(scores: ArrayLike, same_speaker: ArrayLike) -> tuple[Array, NDArray[np.bool_]]:
    values, same = np.asarray(scores), np.asarray(same_speaker, dtype=bool)
    if values.ndim != 1 or values.shape != same.shape:
        raise ValueError(f"Scores and labels must be two lists of one length, got {values.shape} and {same.shape}.")
    if bad := int(np.isnan(values).sum()):
        first = int(np.isnan(values).argmax())
        raise ValueError(f"{bad} of {len(values)} scores are NaN, the first that of pair {first}, counted from 0.")
    if same.all() or not same.any():
        raise ValueError(
            f"Error rates need pairs of one speaker and of two, got {same.sum()} and {(~same).sum()}. "
            "Check the labels of the pair list."
        )
    return values, same


def _ranking(values: Array) -> tuple[Array, Array]:
    """The order of rising scores, and how many pairs are rejected at each operating point."""
    order = np.argsort(values)
    ranked = values[order]
    cuts = np.flatnonzero(ranked[1:] != ranked[:-1]) + 1
    return order, np.concatenate([[0], cuts, [len(values)]])


def _below(weights: Array, cuts: Array) -> Array:
    """The sum of the first `cut` weights, for each cut."""
    return np.concatenate([[0], np.cumsum(weights)])[cuts]


def _error_shares(rejected_targets: Array, rejected_others: Array) -> tuple[Array, Array]:
    """P_miss and P_fa from what is rejected at each operating point; at the last, that is everything."""
    others = rejected_others[-1]
    return rejected_targets / rejected_targets[-1], (others - rejected_others) / others


def _corners(rejected_targets: Array, rejected_others: Array) -> NDArray[np.bool_]:
    """Which operating points do more than prolong a run of targets alone or of others alone."""
    turns = np.ones(len(rejected_targets), dtype=bool)
    for rejected in (rejected_targets, rejected_others):
        moves = np.diff(rejected) > 0
        turns[1:-1] &= moves[1:] | moves[:-1]
    return turns


def _crossing(p_miss: Array, p_fa: Array) -> float:
    after = int(np.searchsorted(p_miss - p_fa, 0))
    before = after - 1
    gap_before, gap_after = p_fa[before] - p_miss[before], p_miss[after] - p_fa[after]
    share = gap_before / (gap_before + gap_after)
    return float(p_miss[before] + share * (p_miss[after] - p_miss[before]))


def _threshold(points: _OperatingPoints) -> float:
    return float(points.thresholds[np.abs(points.p_miss - points.p_fa).argmin()])


def _min_dcf(points: _OperatingPoints, p_target: float, c_miss: float, c_fa: float) -> float:
    if not 0 < p_target < 1:
        raise ValueError(f"p_target is the prior of a pair of one speaker and must lie in (0, 1), got {p_target}.")
    miss, fa = p_target * c_miss, (1 - p_target) * c_fa
    return float((miss * points.p_miss + fa * points.p_fa).min() / min(miss, fa))


def _log_odds(shares: Array, count: int) -> Array:
    shares = shares.clip(0.25 / count, 1 - 0.25 / count)  # a quarter of an error: finite, and no two points merge
    return np.log(shares / (1 - shares))
