import math

import numpy as np
import pytest
from scipy.stats import t

from raysv.verification.confidence import mean_over_seeds


def test_a_hand_computed_interval_over_seeds_alone():
    estimate = mean_over_seeds([0.10, 0.12, 0.14], None, 0, level=0.9)
    half = 2.91999 * 0.02 / math.sqrt(3)  # Student's t at 95 % with 2 degrees of freedom
    assert estimate.mean == pytest.approx(0.12)
    assert (estimate.low, estimate.high) == pytest.approx((0.12 - half, 0.12 + half), rel=1e-5)


def test_speakers_add_their_variance_and_their_degrees_of_freedom():
    values, drawn = [0.10, 0.12, 0.14], 0.12 + 0.01 * np.array([-1.0, 0.0, 1.0])
    by_seeds, by_speakers = 0.02**2 / 3, 0.01**2
    freedom = (by_seeds + by_speakers) ** 2 / (by_seeds**2 / 2 + by_speakers**2 / 19)
    half = t.ppf(0.95, freedom) * math.sqrt(by_seeds + by_speakers)
    estimate = mean_over_seeds(values, drawn, 20, level=0.9)
    assert estimate.high - estimate.mean == pytest.approx(half)
    assert 2 < freedom < 21


def test_where_nothing_varies_the_interval_has_no_width():
    assert mean_over_seeds([0.25, 0.25], [0.25, 0.25, 0.25], 20) == (0.25, 0.25, 0.25)


def test_a_single_seed_tells_nothing_of_seeds():
    with pytest.raises(ValueError, match="needs two of them at least, got 1"):
        mean_over_seeds([0.1], None, 0)


@pytest.mark.parametrize(("seed_deviation", "speaker_deviation"), [(1.0, 0.0), (1.0, 1.0), (0.3, 1.0)])
def test_the_interval_covers_the_truth_as_often_as_it_says(seed_deviation, speaker_deviation):
    """Three seeds and twenty speakers, whose variance a bootstrap knows only from these twenty."""
    generator, covered, rounds = np.random.default_rng(0), 0, 2000
    for _ in range(rounds):
        speakers = speaker_deviation * generator.normal(size=20) * math.sqrt(20)
        values = speakers.mean() + seed_deviation * generator.normal(size=3)
        drawn = speakers[generator.integers(20, size=(200, 20))].mean(1)
        estimate = mean_over_seeds(values, drawn, 20, level=0.9)
        covered += estimate.low <= 0 <= estimate.high
    assert covered / rounds > 0.87
    if not speaker_deviation:  # then it is Student's, and exact
        assert covered / rounds < 0.93


def test_of_one_part_alone_the_widening_is_bonferronis():
    plain = mean_over_seeds([0.10, 0.12, 0.14], None, 0, level=1 - 0.1 / 5)
    assert mean_over_seeds([0.10, 0.12, 0.14], None, 0, level=0.9, chosen_by_seeds=5) == pytest.approx(plain)
    none = mean_over_seeds([0.10, 0.12, 0.14], [0.12, 0.12], 20, level=0.9, chosen_by_speakers=50)
    assert none == pytest.approx(mean_over_seeds([0.10, 0.12, 0.14], None, 0, level=0.9))


@pytest.mark.parametrize(("chosen_by_speakers", "fewest", "most"), [(1, 0.12, 1.0), (20, 0.0, 0.07)])
def test_what_was_found_on_the_speakers_it_is_judged_by_is_seldom_said_to_be_better(chosen_by_speakers, fewest, most):
    """Twenty settings that are no better than the paper's, the best of them on twenty speakers, new seeds for it.

    Five in a hundred would be exact; a bootstrap of twenty speakers knows their variance a little too small.
    """
    generator, said, rounds = np.random.default_rng(0), 0, 1000
    for _ in range(rounds):
        speakers = generator.normal(size=(20, 20)) * math.sqrt(20)  # by setting: how much better with each speaker
        found = int(np.argmax(speakers.mean(1) + 0.3 * generator.normal(size=20)))
        values = speakers[found].mean() + 0.3 * generator.normal(size=3)
        drawn = speakers[found][generator.integers(20, size=(200, 20))].mean(1)
        estimate = mean_over_seeds(values, drawn, 20, level=0.9, chosen_by_speakers=chosen_by_speakers)
        said += estimate.low > 0
    assert fewest <= said / rounds <= most
