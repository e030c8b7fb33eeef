import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysv.verification.metrics import bootstrap_eer, det_curve, eer, eer_threshold, error_rates, min_dcf

# Few distinct scores, so that most are tied, within a kind and across.
SCORES = st.one_of(st.sampled_from([-math.inf, -0.5, -0.0, 0.0, 0.1, 0.25, 0.3, math.inf]), st.floats(-1, 1, width=32))


@st.composite
def scored_pairs(draw):
    """Scores and labels of 2 to 20 pairs of both kinds."""
    labels = [True, False, *draw(st.lists(st.booleans(), max_size=18))]
    scores = draw(st.lists(SCORES, min_size=len(labels), max_size=len(labels)))
    return np.array(scores, dtype=draw(st.sampled_from([np.float32, np.float64]))), np.array(labels)


def slow_points(scores, labels):
    """Every operating point as exact fractions: accepted is what reaches the threshold."""
    targets = [score for score, same in zip(scores, labels, strict=True) if same]
    others = [score for score, same in zip(scores, labels, strict=True) if not same]
    points = []
    for threshold in sorted(set(scores.tolist())):
        miss = Fraction(sum(score < threshold for score in targets), len(targets))
        fa = Fraction(sum(score >= threshold for score in others), len(others))
        points.append((miss, fa))
    return [*points, (Fraction(1), Fraction(0))]


def slow_eer(points):
    """Where a line between neighbouring points crosses P_miss = P_fa."""
    for (miss, fa), (next_miss, next_fa) in itertools.pairwise(points):
        if miss <= fa and next_miss >= next_fa:
            share = (fa - miss) / (fa - miss + next_miss - next_fa)
            return miss + share * (next_miss - miss)
    raise AssertionError("the points must run from (0, 1) to (1, 0)")


@pytest.mark.parametrize(("c_miss", "c_fa"), [(0, 1), (1, 0), (1, -2), (math.nan, 1)])
def test_errors_that_cost_nothing_are_refused(c_miss, c_fa):
    with pytest.raises(ValueError, match="c_miss and c_fa are costs of an error and must be above 0"):
        min_dcf([0.1, 0.9], [False, True], 0.5, c_miss, c_fa)


def test_a_hand_computed_list():
    # Rejecting below 0.4 misses none of 4 and lets 2 of 4 through; below 0.5, 1 of 4 and 2 of 4; below 0.6, 1 and 1.
    scores = [0.4, 0.6, 0.8, 0.9, 0.1, 0.2, 0.5, 0.7]
    same = [True] * 4 + [False] * 4
    assert eer(scores, same) == 0.25
    assert eer_threshold(scores, same) == 0.6
    # Cheapest at p_target 0.5: reject below 0.6 (1/4 + 1/4) or below 0.4 or 0.8 (1/2): each 0.25 of the cost, over 0.5.
    assert min_dcf(scores, same, 0.5) == 0.5
    # Where a false alarm costs 99 times as much, only P_fa = 0 pays: reject below 0.8, missing 2 of 4.
    assert min_dcf(scores, same, 0.01) == pytest.approx(0.5)
    p_miss, p_fa = det_curve(scores, same)
    assert p_miss.tolist() == [0, 0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 1]
    assert p_fa.tolist() == [1, 0.75, 0.5, 0.5, 0.25, 0.25, 0, 0, 0]


def test_ties_cost_what_guessing_between_them_costs():
    # The tie at 0.5 holds 1 of 2 targets and 1 of 2 others: the line from (0, 1/2) to (1/2, 0) meets at 1/4.
    assert eer([0.9, 0.5, 0.5, 0.1], [True, True, False, False]) == 0.25
    assert eer([0.3] * 10, [True] * 3 + [False] * 7) == 0.5


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("sign", "expected"), [(1, 0.0), (-1, 1.0)])
def test_perfect_and_inverted_scores(sign, expected, dtype):
    scores, same = sign * np.arange(10, dtype=dtype), np.arange(10) >= 6
    assert eer(scores, same) == expected
    assert min_dcf(scores, same, 0.05) == expected


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("score", [0.3, -math.inf, math.inf])
def test_constant_scores_are_worth_a_guess(score, dtype):
    scores, same = np.full(10, score, dtype), np.arange(10) >= 6
    rates = error_rates(scores, same)
    assert rates.eer == pytest.approx(0.5, abs=1e-12)
    assert set(rates.min_dcf.values()) == {1.0}
    assert rates.threshold == dtype(score)


@settings(deadline=None)
@given(scored_pairs())
def test_everything_equals_brute_force(pairs):
    scores, same = pairs
    points = slow_points(scores, same)
    p_miss, p_fa = det_curve(scores, same)
    assert p_miss.tolist() == [float(miss) for miss, _ in points]
    assert p_fa.tolist() == [float(fa) for _, fa in points]
    assert eer(scores, same) == pytest.approx(float(slow_eer(points)), abs=1e-12)
    for prior in (0.01, 0.5, 0.9):
        cheapest = min(prior * 10 * float(miss) + (1 - prior) * 2 * float(fa) for miss, fa in points)
        expected = cheapest / min(prior * 10, (1 - prior) * 2)
        assert min_dcf(scores, same, prior, c_miss=10, c_fa=2) == pytest.approx(expected, abs=1e-12)


@settings(deadline=None)
@given(scored_pairs())
def test_threshold_gives_the_closest_error_rates_and_is_the_lowest_that_does(pairs):
    scores, same = pairs
    thresholds = sorted(set(scores.tolist()))
    gaps = [abs(miss - fa) for miss, fa in slow_points(scores, same)[:-1]]
    assert eer_threshold(scores, same) == thresholds[gaps.index(min(gaps))]


def test_of_two_thresholds_with_equal_gaps_the_lower_is_taken_although_their_floats_differ():
    scores = [0.1] * 8 + [0.2] * 4 + [0.3] * 8
    same = [True] * 2 + [False] * 6 + [False] * 3 + [True] + [True] * 7 + [False]
    assert eer_threshold(scores, same) == 0.2  # (0.2, 0.4) and (0.3, 0.1): 1/5 both times


@settings(deadline=None)
@given(scored_pairs(), st.randoms(use_true_random=False))
def test_order_of_pairs_and_rising_transforms_change_nothing(pairs, random):
    scores, same = pairs
    expected = error_rates(scores, same)
    order = list(range(len(scores)))
    random.shuffle(order)
    assert error_rates(scores[order], same[order]) == expected
    doubled = error_rates(2 * scores, same)
    assert (doubled.eer, doubled.min_dcf) == (expected.eer, expected.min_dcf)


@settings(deadline=None)
@given(scored_pairs())
def test_swapping_the_kinds_and_the_sign_keeps_the_eer(pairs):
    scores, same = pairs
    assert eer(-scores, ~same) == pytest.approx(eer(scores, same), abs=1e-12)


def test_one_pass_gives_what_the_single_functions_give():
    generator = np.random.default_rng(0)
    same = generator.random(2000) < 0.1
    scores = (generator.normal(size=2000) + 2 * same).astype(np.float32)
    rates = error_rates(scores, same, p_targets=(0.01, 0.05, 0.5))
    assert rates.eer == eer(scores, same)
    assert rates.min_dcf == {prior: min_dcf(scores, same, prior) for prior in (0.01, 0.05, 0.5)}
    assert rates.threshold == eer_threshold(scores, same)


def test_gaussian_scores_have_the_eer_theory_says():
    generator = np.random.default_rng(0)
    same = np.arange(200_000) % 2 == 0
    scores = generator.normal(size=len(same)) + 2 * same
    assert eer(scores, same) == pytest.approx(0.5 * math.erfc(1 / math.sqrt(2)), abs=2e-3)


@settings(deadline=None)
@given(scored_pairs(), st.integers(2, 12))
def test_a_thinned_curve_keeps_its_ends_and_only_its_points(pairs, points):
    whole = list(zip(*det_curve(*pairs), strict=True))
    thinned = list(zip(*det_curve(*pairs, points=points), strict=True))
    assert len(thinned) <= max(points, 2)
    assert thinned[0] == (0, 1)
    assert thinned[-1] == (1, 0)
    assert [point for point in whole if point in thinned] == thinned


def test_a_thinned_curve_keeps_its_shape_down_to_rare_errors():
    generator = np.random.default_rng(0)
    same = np.arange(100_000) % 10 == 0
    scores = generator.normal(size=len(same)) + 3 * same
    p_miss, p_fa = det_curve(scores, same, points=200)
    assert 100 < len(p_miss) <= 200
    assert (p_fa < 1e-3).sum() > 20
    assert (p_miss < 1e-3).sum() > 20


def test_a_curve_of_one_point_is_refused():
    with pytest.raises(ValueError, match="points=1"):
        det_curve([0.1, 0.2, 0.3], [True, False, True], points=1)


@pytest.mark.parametrize("function", [eer, eer_threshold, error_rates, det_curve])
def test_unusable_lists_are_refused(function):
    with pytest.raises(ValueError, match=r"2 of 4 scores are NaN, the first that of pair 1"):
        function([0.1, math.nan, 0.3, math.nan], [True, False, True, False])
    with pytest.raises(ValueError, match="got 2 and 0"):
        function([0.1, 0.2], [True, True])
    with pytest.raises(ValueError, match="got 0 and 2"):
        function([0.1, 0.2], [False, False])
    with pytest.raises(ValueError, match="one length"):
        function([0.1, 0.2, 0.3], [True, False])
    with pytest.raises(ValueError, match="got 0 and 0"):
        function([], [])


@pytest.mark.parametrize("prior", [0, 1, 1.5])
def test_a_prior_that_is_none_is_refused(prior):
    with pytest.raises(ValueError, match="p_target"):
        min_dcf([0.1, 0.2], [False, True], prior)


def speaker_pairs(generator, speakers=12, per_speaker=3):
    """All pairs of a few recordings of a few speakers, some of whom are hard."""
    who = np.repeat(np.arange(speakers), per_speaker)
    rows, columns = np.triu_indices(len(who), 1)
    enrolment, test = who[rows], who[columns]
    same = enrolment == test
    hardness = generator.normal(size=speakers)
    scores = generator.normal(size=len(same)) + 2.5 * same - 0.7 * same * hardness[enrolment]
    return np.round(scores, 1), same, enrolment, test


def slow_interval(scores, same, enrolment, test, generator, rounds, level):
    """Every round by itself: its pairs as often as they count, sorted anew."""
    names = np.unique([enrolment, test])
    enrolment, test = np.searchsorted(names, enrolment), np.searchsorted(names, test)
    rates = []
    while len(rates) < rounds:
        counts = generator.multinomial(len(names), np.full(len(names), 1 / len(names)))
        times = np.where(same, counts[enrolment], counts[enrolment] * counts[test])
        drawn = np.repeat(same, times)
        if drawn.any() and not drawn.all():
            rates.append(eer(np.repeat(scores, times), drawn))
    return np.quantile(rates, [(1 - level) / 2, (1 + level) / 2])


@pytest.mark.parametrize(("speakers", "per_speaker"), [(12, 3), (4, 40), (40, 2)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bootstrap_equals_repeating_the_pairs_of_the_drawn_speakers(speakers, per_speaker, dtype):
    scores, same, enrolment, test = speaker_pairs(np.random.default_rng(3), speakers, per_speaker)
    pairs = scores.astype(dtype), same, enrolment, test
    expected = slow_interval(*pairs, np.random.default_rng(7), 40, 0.8)
    assert bootstrap_eer(*pairs, np.random.default_rng(7), 40, 0.8) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=60)
@given(scored_pairs(), st.integers(2, 6), st.integers(0, 99))
def test_bootstrap_equals_brute_force_whatever_is_tied_or_infinite(pairs, speakers, seed):
    scores, same = pairs
    enrolment, test = np.random.default_rng(seed).integers(speakers, size=(2, len(scores)))
    test = np.where(same, enrolment, test)
    expected = slow_interval(scores, same, enrolment, test, np.random.default_rng(seed), 10, 0.8)
    low, high = bootstrap_eer(scores, same, enrolment, test, np.random.default_rng(seed), 10, 0.8)
    assert (low, high) == pytest.approx(expected, abs=1e-12)


def test_bootstrap_interval_surrounds_the_eer_and_widens_with_the_level():
    scores, same, enrolment, test = speaker_pairs(np.random.default_rng(0))
    names = np.array([f"id{number:05d}" for number in range(12)])
    narrow = bootstrap_eer(scores, same, names[enrolment], names[test], np.random.default_rng(1), 200, level=0.5)
    wide = bootstrap_eer(scores, same, names[enrolment], names[test], np.random.default_rng(1), 200, level=0.95)
    assert 0 <= wide[0] < narrow[0] < eer(scores, same) < narrow[1] < wide[1] <= 1


@pytest.mark.parametrize(("worth", "expected"), [(1.0, 0), (0.0, 0.5), (-1.0, 1)])
def test_bootstrap_of_perfect_constant_and_inverted_scores_has_no_width(worth, expected):
    _, same, enrolment, test = speaker_pairs(np.random.default_rng(0))
    low, high = bootstrap_eer(worth * same, same, enrolment, test, np.random.default_rng(0), 50)
    assert (low, high) == pytest.approx((expected, expected), abs=1e-12)


def test_bootstrap_draws_again_where_one_kind_is_left_out():
    # Two speakers, one of whom has the only pair of one speaker: half of the draws hold no usable list.
    low, high = bootstrap_eer([0.9, 0.1], [True, False], ["a", "a"], ["a", "b"], np.random.default_rng(0), 20)
    assert (low, high) == (0, 0)


def test_bootstrap_wants_two_speakers_for_each_pair():
    with pytest.raises(ValueError, match="2 pairs need as many"):
        bootstrap_eer([0.9, 0.1], [True, False], ["a"], ["a", "b"], np.random.default_rng(0))
