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

PRIORS = (0.01, 0.05)  # of a pair of one speaker, for minDCF
MOST_DRAWN = 2**22  # speakers drawn at a time in a bootstrap, over all its rounds: bounds the memory
INTERVAL_LEVEL = 0.9  # of the interval of an EER


class ErrorRates(NamedTuple):
    """What one pass over a scored pair list tells."""

    eer: float
    min_dcf: dict[float, float]  # by p_target
    threshold: float


def error_rates(scores: ArrayLike, same_speaker: ArrayLike, p_targets: Sequence[float] = PRIORS) -> ErrorRates:
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
    _, _, p_miss, p_fa = _operating_points(scores, same_speaker)
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
    level: float = INTERVAL_LEVEL,
) -> tuple[float, float]:
    """Interval of the EER if other speakers of the same population had been recorded: quantiles of `bootstrap_eers`.

    Args:
        level: share of the rounds that fall inside the interval.

    Returns: its ends, `low` and `high`, in [0, 1].
    """
    rates = bootstrap_eers(scores, same_speaker, enrolment_speakers, test_speakers, generator, rounds)
    low, high = np.quantile(rates, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_eers(
    scores: ArrayLike,
    same_speaker: ArrayLike,
    enrolment_speakers: ArrayLike,
    test_speakers: ArrayLike,
    generator: np.random.Generator,
    rounds: int = 1000,
) -> Array:
    """EERs `(rounds,)` if other speakers of the same population had been recorded.

    Pairs that share a speaker err together, so speakers are drawn anew, not pairs. A round draws as many speakers as
    there are, with replacement. A pair of two speakers then counts as often as the product of how often each was
    drawn, a pair of one as often as that one was. A round left without one kind of pair is drawn again. Equal
    generators draw equal speakers, whatever the scores: two systems can be compared round by round.

    Args:
        enrolment_speakers, test_speakers: `(pairs,)` names or numbers.
        generator: the randomness of the draws.

    Source: Poh and Bengio 2007, IEEE TPAMI 29(3), on user-level bootstraps.
    """
    values, same = _checked(scores, same_speaker)
    if not np.shape(enrolment_speakers) == np.shape(test_speakers) == values.shape:
        raise ValueError(
            f"{len(values)} pairs need as many enrolment and test speakers, "
            f"got {np.shape(enrolment_speakers)} and {np.shape(test_speakers)}."
        )
    names, numbers = np.unique(np.concatenate([enrolment_speakers, test_speakers]), return_inverse=True)
    enrolment, test = numbers.reshape(2, -1)
    pairs = _rank_pairs(values, same, enrolment, test, len(names))
    rates: list[float] = []
    while len(rates) < rounds:
        rates += _bootstrap_rounds(pairs, len(names), min(rounds - len(rates), MOST_DRAWN // len(names) + 1), generator)
    return np.array(rates)


def _bootstrap_rounds(pairs: _RankedPairs, speakers: int, rounds: int, generator: np.random.Generator) -> list[float]:
    """The EERs of some draws of speakers."""
    end = len(pairs.target_cuts) - 1
    counts, totals = np.empty((0, speakers)), np.empty((2, 0))
    while len(counts) < rounds:
        more = generator.multinomial(speakers, np.full(speakers, 1 / speakers), rounds - len(counts))
        weights = _weights(pairs, more.astype(float), 0, end)
        usable = weights.all(0)
        counts = np.concatenate([counts, more[usable]])
        totals = np.concatenate([totals, weights[:, usable]], axis=1)
    ones, zeros = np.ones(rounds), np.zeros(rounds)
    rates = _drawn_eers(pairs, counts, totals, 0, end, np.stack([zeros, ones]), np.stack([ones, zeros]))
    return list(rates)


class _RankedPairs(NamedTuple):
    """Pairs of rising score by the numbers of their speakers, and how many the corners of their curve reject."""

    targets: Array  # speaker
    others: Array  # enrolment speaker · number of speakers + test speaker
    target_cuts: Array
    other_cuts: Array


def _rank_pairs(values: Array, same: Array, enrolment: Array, test: Array, speakers: int) -> _RankedPairs:
    order, _, cuts = _ranking(values)
    same = same[order]
    targets, others = order[same], order[~same]
    target_cuts = _below(same, cuts)
    corners = _corners(target_cuts, cuts - target_cuts)  # resampling stretches the lines between them, no more
    cuts, target_cuts = cuts[corners], target_cuts[corners]
    return _RankedPairs(
        enrolment[targets], enrolment[others] * speakers + test[others], target_cuts, cuts - target_cuts
    )


def _weights(pairs: _RankedPairs, counts: Array, first: int, last: int) -> Array:
    """How often the targets and the others between two corners count, `(2, rounds)`.

    Args:
        counts: `(rounds, speakers)` how often each was drawn.
    """
    rounds, speakers = counts.shape
    targets = pairs.targets[pairs.target_cuts[first] : pairs.target_cuts[last]]
    others = pairs.others[pairs.other_cuts[first] : pairs.other_cuts[last]]
    if speakers**2 <= 8 * len(others):  # fewer products, and no more memory, than pair by pair
        table = np.bincount(others, minlength=speakers**2).reshape(speakers, speakers)
        other_weights = ((counts @ table) * counts).sum(1)
    else:
        enrolment, test = np.divmod(others, speakers)
        other_weights = np.fromiter((drawn[enrolment] @ drawn[test] for drawn in counts), float, rounds)
    return np.stack([counts @ np.bincount(targets, minlength=speakers), other_weights])


def _drawn_eers(
    pairs: _RankedPairs, counts: Array, totals: Array, first: int, last: int, before: Array, after: Array
) -> Array:
    """The EER of each round, found by halving the stretch of the list that it lies in.

    Args:
        counts: `(rounds, speakers)` of rounds whose curves meet P_miss = P_fa between the corners `first` and `last`.
        totals: `(2, rounds)` weights of all targets and of all others.
        before, after: `(2, rounds)` P_miss and P_fa at the two corners.
    """
    if last - first == 1 or not len(counts):
        return _meeting(*before, *after)
    cuts = pairs.target_cuts + pairs.other_cuts
    middle = int(np.clip(np.searchsorted(cuts, (cuts[first] + cuts[last]) // 2), first + 1, last - 1))
    rejected_targets, rejected_others = _weights(pairs, counts, first, middle) / totals
    there = np.stack([before[0] + rejected_targets, before[1] - rejected_others])
    met = there[0] >= there[1]
    rates = np.empty(len(counts))
    for half, start, end, low, high in ((met, first, middle, before, there), (~met, middle, last, there, after)):
        rates[half] = _drawn_eers(pairs, counts[half], totals[:, half], start, end, low[:, half], high[:, half])
    return rates


class _OperatingPoints(NamedTuple):
    """Thresholds rising, so P_miss rising and P_fa falling; the last threshold, above every score, is infinite.

    The gaps are |P_miss − P_fa| times both numbers of pairs: whole numbers, of which equal ones are equal.
    """

    thresholds: Array
    gaps: Array
    p_miss: Array
    p_fa: Array


def _operating_points(scores: ArrayLike, same_speaker: ArrayLike) -> _OperatingPoints:
    values, same = _checked(scores, same_speaker)
    order, ranked, cuts = _ranking(values)
    rejected_targets = _below(same[order], cuts)
    rejected_others = cuts - rejected_targets
    targets, others = rejected_targets[-1], rejected_others[-1]
    gaps = np.abs(rejected_targets * others - (others - rejected_others) * targets)
    thresholds = np.append(ranked[cuts[:-1]], np.inf)
    return _OperatingPoints(thresholds, gaps, *_error_shares(rejected_targets, rejected_others))


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


def _ranking(values: Array) -> tuple[Array, Array, Array]:
    """The order of rising scores, these, and how many pairs are rejected at each operating point."""
    order = np.argsort(values)
    ranked = values[order]
    cuts = np.flatnonzero(ranked[1:] != ranked[:-1]) + 1
    return order, ranked, np.concatenate([[0], cuts, [len(values)]])


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
    return float(_meeting(p_miss[after - 1], p_fa[after - 1], p_miss[after], p_fa[after]))


def _meeting(miss_before: Array, fa_before: Array, miss_after: Array, fa_after: Array) -> Array:
    """Where the line between an operating point of P_miss < P_fa and one of P_miss ≥ P_fa meets P_miss = P_fa."""
    gap_before, gap_after = fa_before - miss_before, miss_after - fa_after
    return miss_before + gap_before / (gap_before + gap_after) * (miss_after - miss_before)


def _threshold(points: _OperatingPoints) -> float:
    return float(points.thresholds[points.gaps.argmin()])


def _min_dcf(points: _OperatingPoints, p_target: float, c_miss: float, c_fa: float) -> float:
    if not 0 < p_target < 1:
        raise ValueError(f"p_target is the prior of a pair of one speaker and must lie in (0, 1), got {p_target}.")
    if not (c_miss > 0 and c_fa > 0):
        raise ValueError(f"c_miss and c_fa are costs of an error and must be above 0, got {c_miss} and {c_fa}.")
    miss, fa = p_target * c_miss, (1 - p_target) * c_fa
    return float((miss * points.p_miss + fa * points.p_fa).min() / min(miss, fa))


def _log_odds(shares: Array, count: int) -> Array:
    shares = shares.clip(0.25 / count, 1 - 0.25 / count)  # a quarter of an error: finite, and no two points merge
    return np.log(shares / (1 - shares))
