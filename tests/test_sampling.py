import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysv.corpus.groups import Groups
from raysv.corpus.sampling import SpeakerBatches


def batches(counts, speakers, utterances, seed=0):
    """The batches of a list whose speakers have `counts` recordings, in no order."""
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(len(counts)), counts))
    names = [f"s{n}" for n in range(len(counts))]
    return SpeakerBatches(Groups.by_label(labels, len(counts)), names, speakers, utterances, seed), labels


@st.composite
def possible_batches(draw):
    utterances = draw(st.integers(1, 4))
    counts = draw(st.lists(st.integers(utterances, 15), min_size=1, max_size=12))
    return counts, draw(st.integers(1, len(counts))), utterances


@settings(max_examples=200)
@given(possible_batches(), st.integers(0, 2**31 - 1), st.integers(0, 1000))
def test_every_batch_holds_p_different_speakers_with_k_different_utterances(possible, seed, epoch):
    counts, speakers, utterances = possible
    sampler, labels = batches(counts, speakers, utterances, seed)
    recordings = sampler.epoch(epoch)
    assert recordings.shape == (sampler.steps, speakers * utterances)
    for batch in recordings:
        assert len(set(batch)) == speakers * utterances
        groups = labels[batch].reshape(speakers, utterances)
        assert (groups == groups[:, :1]).all()
        assert len(set(groups[:, 0])) == speakers
    asked = np.bincount(labels[recordings].ravel(), minlength=len(counts)) // utterances
    assert asked.max() - asked.min() <= 1


@given(possible_batches())
def test_an_epoch_is_about_as_long_as_the_list(possible):
    counts, speakers, utterances = possible
    sampler, _ = batches(counts, speakers, utterances)
    a_round = len(counts) * utterances
    taken = sampler.steps * speakers * utterances
    assert sampler.steps >= 1
    assert max(sum(counts) - a_round / 2, a_round) - speakers * utterances < taken <= sum(counts) + a_round / 2


def test_where_everything_divides_an_epoch_takes_every_recording_once():
    sampler, labels = batches([4] * 6, speakers=3, utterances=2)
    assert sorted(sampler.epoch(1).ravel()) == list(range(len(labels)))


def test_a_speaker_repeats_no_recording_before_all_had_their_turn():
    sampler, labels = batches([2, 12], speakers=2, utterances=2)
    taken = np.bincount(sampler.epoch(1).ravel(), minlength=len(labels))
    assert taken[labels == 0].tolist() == [4, 4] or taken[labels == 0].tolist() == [3, 3]
    assert taken[labels == 1].max() == 1


def test_the_same_seed_and_epoch_give_the_same_batches_in_any_order():
    first, _ = batches([5] * 8, 4, 2, seed=3)
    second, _ = batches([5] * 8, 4, 2, seed=3)
    later = second.epoch(7)
    np.testing.assert_array_equal(first.epoch(2), second.epoch(2))
    np.testing.assert_array_equal(first.epoch(7), later)


def test_epochs_and_seeds_differ():
    drawn = {batches([5] * 8, 4, 2, seed)[0].epoch(epoch).tobytes() for seed in range(4) for epoch in range(10)}
    assert len(drawn) == 40


def test_who_comes_together_changes_from_epoch_to_epoch():
    sampler, labels = batches([2] * 10, 2, 2)
    together = {tuple(sorted(labels[batch][::2])) for epoch in range(200) for batch in sampler.epoch(epoch)}
    assert len(together) == 45  # all pairs of ten speakers


def test_which_utterances_of_a_speaker_come_together_changes_too():
    sampler, _ = batches([4] * 2, 2, 2)
    together = {frozenset(pair) for epoch in range(100) for pair in sampler.epoch(epoch).reshape(-1, 2).tolist()}
    assert len(together) == 12  # six pairs of each speaker's four


def test_a_batch_of_more_speakers_than_there_are_is_refused():
    with pytest.raises(ValueError, match=r"batch\.speakers is 4, but the training list has 3 .* to 3 or less"):
        batches([5] * 3, speakers=4, utterances=2)


def test_speakers_with_too_few_utterances_are_named():
    with pytest.raises(ValueError, match=r"is 3, but 2 of 4 training .*: s1 \(2\), s3 \(1\)\. .*--min-utterances 3"):
        batches([5, 2, 5, 1], speakers=2, utterances=3)


def test_many_speakers_with_too_few_utterances_are_counted():
    with pytest.raises(ValueError, match=r"12 of 12 training .*s9 \(1\), \.\.\.\. Lower it"):
        batches([1] * 12, speakers=2, utterances=2)


def test_a_speaker_without_any_recording_is_named():
    with pytest.raises(ValueError, match=r"b \(0\)"):
        SpeakerBatches(Groups.by_label(np.array([0, 0, 2, 2]), 3), ["a", "b", "c"], 2, 1, 0)
