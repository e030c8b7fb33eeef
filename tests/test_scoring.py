import math

import numpy as np
import pytest
import torch

from raysv.verification.scoring import CELLS_PER_PAIR, as_norm, centre, cosine_scores, mean_embeddings

EMBEDDINGS = torch.tensor([[2.0, 0.0], [3.0, 4.0], [0.0, 0.5], [-7.0, 0.0]])


def test_cosines_of_a_hand_computed_list():
    scores = cosine_scores(EMBEDDINGS, [0, 0, 1, 0, 2], [1, 2, 2, 3, 2])
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, [0.6, 0.0, 0.8, -1.0, 1.0], atol=1e-7)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunks_change_no_score(chunk):
    generator = np.random.default_rng(0)
    embeddings = torch.from_numpy(generator.normal(size=(9, 5)))
    enrolment, test = generator.integers(9, size=(2, 14))
    scores = cosine_scores(embeddings, enrolment, test, chunk)
    rows = embeddings.numpy()
    expected = [
        rows[a] @ rows[b] / np.linalg.norm(rows[a]) / np.linalg.norm(rows[b])
        for a, b in zip(enrolment, test, strict=True)
    ]
    np.testing.assert_allclose(scores, expected, atol=1e-6)


def test_scattered_pairs_score_as_they_do_within_a_crossed_list():
    generator = np.random.default_rng(0)
    recordings = 6 * CELLS_PER_PAIR
    embeddings = torch.from_numpy(generator.normal(size=(2 * recordings, 16)))
    crossed = np.stack(np.meshgrid(np.arange(recordings), recordings + np.arange(recordings))).reshape(2, -1)
    whole = cosine_scores(embeddings, *crossed)
    scattered = np.concatenate([generator.permutation(recordings), [3, 3, 3]])  # in each column one, one three times
    places = recordings * np.append(np.arange(recordings), [5, 5, 7]) + scattered
    assert recordings**2 > CELLS_PER_PAIR * len(places)
    np.testing.assert_allclose(cosine_scores(embeddings, *crossed[:, places]), whole[places], atol=1e-6)


def test_lists_that_cannot_be_written_to_are_scored():
    index = np.array([0, 1, 2])
    index.setflags(write=False)  # as those that are mapped from a file
    np.testing.assert_allclose(cosine_scores(EMBEDDINGS, index, index), 1, atol=1e-7)


def test_no_pairs_give_no_scores():
    assert cosine_scores(EMBEDDINGS, np.array([], dtype=np.int64), np.array([], dtype=np.int64)).shape == (0,)


def test_a_score_carries_no_gradient_and_leaves_its_embeddings_alone():
    embeddings = EMBEDDINGS.clone().requires_grad_()
    cosine_scores(embeddings, [0], [1])
    as_norm([0.6], embeddings, [0], [1], cohort=torch.tensor([[1.0, 1.0], [1.0, 0.0]]), top_n=2)
    assert torch.equal(embeddings, EMBEDDINGS)


def test_as_norm_of_a_hand_computed_pair():
    # Row 0 lies along x: its cosines are 1, 0.6, 0 and −1; the closest two have mean 0.8, deviation 0.2.
    # Row 2 lies along y: 0, 0.8, 1 and 0; the closest two have mean 0.9, deviation 0.1.
    cohort = torch.tensor([[5.0, 0.0], [0.3, 0.4], [0.0, 1.0], [-1.0, 0.0]])
    scores = as_norm([0.0, 0.5], EMBEDDINGS, [0, 0], [2, 0], cohort, top_n=2)
    expected = [((0 - 0.8) / 0.2 + (0 - 0.9) / 0.1) / 2, (0.5 - 0.8) / 0.2]
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_as_norm_equals_a_slow_obvious_reference(chunk):
    generator = np.random.default_rng(0)
    embeddings, cohort = (torch.from_numpy(generator.normal(size=(count, 6))) for count in (11, 25))
    enrolment, test = generator.integers(11, size=(2, 30))
    scores = cosine_scores(embeddings, enrolment, test)
    expected = []
    for score, a, b in zip(scores, enrolment, test, strict=True):
        sides = []
        for side in (a, b):
            cosines = torch.nn.functional.cosine_similarity(embeddings[side][None], cohort).numpy()
            closest = np.sort(cosines)[-10:]
            sides.append((score - closest.mean()) / closest.std())
        expected.append(sum(sides) / 2)
    normalised = as_norm(scores, embeddings, enrolment, test, cohort, top_n=10, chunk=chunk)
    assert normalised.dtype == np.float32
    np.testing.assert_allclose(normalised, expected, rtol=1e-4, atol=1e-4)


def test_as_norm_is_symmetric():
    generator = torch.Generator().manual_seed(0)
    embeddings, cohort = torch.randn(6, 4, generator=generator), torch.randn(20, 4, generator=generator)
    enrolment, test = np.array([0, 1, 2]), np.array([3, 4, 5])
    scores = cosine_scores(embeddings, enrolment, test)
    there = as_norm(scores, embeddings, enrolment, test, cohort, top_n=5)
    back = as_norm(scores, embeddings, test, enrolment, cohort, top_n=5)
    np.testing.assert_allclose(there, back, rtol=1e-6)


@pytest.mark.parametrize("top_n", [1, 5])
def test_a_cohort_too_small_for_top_n_is_refused(top_n):
    with pytest.raises(ValueError, match=f"cohort's 4 embeddings, got {top_n}"):
        as_norm([0.6], EMBEDDINGS, [0], [1], cohort=torch.eye(4, 2) + 1, top_n=top_n)


def test_a_cohort_of_one_direction_is_refused():
    with pytest.raises(ValueError, match="Embedding 0 is equally close to 3 of the cohort"):
        as_norm([0.6], EMBEDDINGS, [0], [1], cohort=torch.tensor([[1.0, 2.0]]).repeat(3, 1), top_n=3)


def test_a_cohort_is_compared_with_no_embedding_that_pairs_do_not_name():
    cohort = torch.tensor([[5.0, 0.0], [0.3, 0.4], [0.0, 1.0], [-1.0, 0.0]])
    expected = as_norm([0.0, 0.5], EMBEDDINGS, [0, 0], [2, 1], cohort, top_n=2)
    more = torch.cat([torch.zeros(1, 2), EMBEDDINGS, torch.full((1, 2), torch.nan)])  # to refuse, if they were
    np.testing.assert_array_equal(as_norm([0.0, 0.5], more, [1, 1], [3, 2], cohort, top_n=2), expected)


def test_the_embedding_that_is_refused_is_named_by_its_row():
    embeddings = torch.cat([EMBEDDINGS, torch.zeros(1, 2)])
    cohort = torch.tensor([[5.0, 0.0], [0.3, 0.4], [0.0, 1.0]])
    with pytest.raises(ValueError, match="Embedding 4 is equally close"):
        as_norm([0.0], embeddings, [1], [4], cohort, top_n=2)


def test_every_enrolment_recording_counts_alike_whatever_its_length():
    recordings = torch.tensor([[100.0, 0.0], [3.0, 4.0], [0.0, 0.01]])
    models = mean_embeddings(recordings, torch.tensor([2, 0, 2]), 3)
    torch.testing.assert_close(models, torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.5, 0.5]]))
    scores = cosine_scores(torch.cat([models, torch.tensor([[1.0, 0.0]])]), [2], [3])
    np.testing.assert_allclose(scores, [math.sqrt(0.5)], rtol=1e-6)


def test_centring_moves_the_population_to_the_origin():
    population = torch.tensor([[3.0, 1.0], [1.0, 1.0], [2.0, 4.0]])
    centred = centre(population, population.mean(0))
    torch.testing.assert_close(centred, torch.tensor([[1.0, -1.0], [-1.0, -1.0], [0.0, 2.0]]))
    # All three pointed the same way before; the offset they share says nothing about who speaks.
    assert (cosine_scores(population, [0], [1]) > 0.8).all()
    np.testing.assert_allclose(cosine_scores(centred, [0], [1]), [0.0], atol=1e-7)
