from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.multiprocessing
import torch.nn.functional as F
from encoder_fixtures import tiny_encoder
from learning_fixtures import DEV, UTTERANCES, process_group, run_workers, tiny_config, write_corpus

from raysv.corpus.groups import Groups
from raysv.corpus.loading import load_corpus
from raysv.corpus.sets import PairSet
from raysv.corpus.store import open_store
from raysv.corpus.utterances import Utterance
from raysv.verification import evaluation
from raysv.verification.evaluation import (
    NotFiniteError,
    eer_interval,
    embed_recordings,
    embed_utterances,
    evaluate,
    pair_embeddings,
    speaker_means,
)
from raysv.verification.metrics import bootstrap_eer, eer, min_dcf
from raysv.verification.scoring import as_norm

RECORDINGS = len(DEV) * UTTERANCES["dev"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def dev(root):
    return dev_pairs(root)


@pytest.fixture(scope="module")
def encoder():
    return tiny_encoder()


@pytest.fixture(scope="module")
def embeddings(encoder, dev):
    """One after the other, each alone."""
    return torch.cat([encoder.embed([waveform(dev.store, index)]) for index in range(len(dev.store))])


def dev_pairs(root):
    config = tiny_config(root)
    return load_corpus(config.data, config.augment).dev


def waveform(store, index):
    return torch.from_numpy(store[index].astype(np.float32)) / 32768


def counting(encoder, monkeypatch):
    """The lengths of all waveforms that are embedded from now on."""
    embed, lengths = encoder.embed, []
    monkeypatch.setattr(encoder, "embed", lambda batch: lengths.extend(map(len, batch)) or embed(batch))
    return lengths


def pairs_of(store, models, rows):
    enrolment, test, same_speaker = np.array(rows).T
    return PairSet(store, Groups.of(models), enrolment, test, same_speaker.astype(bool), np.arange(len(store)))


def test_scores_are_the_cosines_of_recordings_embedded_alone(encoder, dev, embeddings):
    result = evaluate(encoder, dev)
    recordings = [int(dev.models[model][0]) for model in dev.enrolment]
    expected = F.cosine_similarity(embeddings[recordings], embeddings[dev.test])
    np.testing.assert_allclose(result.scores, expected, atol=1e-5)
    assert np.array_equal(result.same_speaker, dev.same_speaker)
    assert result.rates.eer == eer(result.scores, dev.same_speaker)
    assert result.rates.min_dcf == {prior: min_dcf(result.scores, dev.same_speaker, prior) for prior in (0.01, 0.05)}


def test_metrics_carry_the_name_of_their_list(encoder, dev):
    result = evaluate(encoder, dev)
    assert result.metrics("dev") == {
        "dev/eer": result.rates.eer,
        "dev/min_dcf_0.01": result.rates.min_dcf[0.01],
        "dev/min_dcf_0.05": result.rates.min_dcf[0.05],
    }


def test_every_recording_is_embedded_once_however_many_pairs_name_it(encoder, dev, monkeypatch):
    lengths = counting(encoder, monkeypatch)
    evaluate(encoder, dev)
    assert len(dev.test) == RECORDINGS * (RECORDINGS - 1) / 2
    assert len(lengths) == RECORDINGS


def test_a_store_is_read_longest_first_and_in_parts(encoder, root, monkeypatch):
    store = open_store([root / f"noise/{name}.wav" for name in (1, 0, 2, 1)], root / "cache")
    whole = embed_recordings(encoder, store)
    monkeypatch.setattr(evaluation, "CHUNK_SAMPLES", 20_000)
    lengths = counting(encoder, monkeypatch)
    torch.testing.assert_close(embed_recordings(encoder, store), whole, rtol=0, atol=1e-4)
    assert lengths == [24_000, 16_000, 16_000, 8000]


def test_the_mode_of_the_encoder_is_left_as_it_was(encoder, dev):
    for mode in (True, False):
        encoder.train(mode)
        evaluate(encoder, dev)
        assert encoder.training is mode


def test_a_model_of_several_recordings_is_the_mean_of_their_directions(encoder, dev, embeddings):
    pairs = pairs_of(dev.store, [[0, 1, 2], [5]], [(0, 3, 1), (1, 3, 0), (0, 7, 0)])
    model = F.normalize(embeddings[:3], dim=1).mean(0)
    expected = [
        F.cosine_similarity(model, embeddings[3], 0),
        F.cosine_similarity(embeddings[5], embeddings[3], 0),
        F.cosine_similarity(model, embeddings[7], 0),
    ]
    np.testing.assert_allclose(evaluate(encoder, pairs).scores, expected, atol=1e-5)


def test_embeddings_are_those_of_the_models_and_then_of_the_recordings(encoder, dev):
    pairs = pairs_of(dev.store, [[4], [5, 6], [6]], [(2, 9, 1), (1, 9, 0), (2, 3, 0)])
    compared, enrolment, test = pair_embeddings(encoder, pairs)
    everything = F.normalize(embed_recordings(encoder, dev.store))
    expected = torch.stack([everything[6], everything[5:7].mean(0), everything[6]])
    torch.testing.assert_close(compared[enrolment], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(F.normalize(compared[test]), everything[[9, 9, 3]], rtol=0, atol=1e-6)


def test_centring_takes_the_mean_from_recordings_before_models_are_made_of_them(encoder, dev):
    pairs = pairs_of(dev.store, [[0, 1], [5]], [(0, 3, 1), (1, 3, 0), (0, 7, 0)])
    embeddings = embed_recordings(encoder, dev.store)
    mean = embeddings[10:].mean(0)
    rows = F.normalize(embeddings - mean, dim=1)
    model = F.normalize(rows[:2].mean(0), dim=0)
    expected = [model @ rows[3], rows[5] @ rows[3], model @ rows[7]]
    np.testing.assert_allclose(evaluate(encoder, pairs, mean=mean).scores, expected, atol=1e-5)


def speakers_of(pairs, count):
    """The pairs as if that many speakers had taken turns in the recordings."""
    return replace(pairs, speakers=np.arange(len(pairs.store)) % count)


def test_the_interval_is_that_of_drawing_the_speakers_of_both_sides(encoder, dev):
    pairs = speakers_of(dev, 6)
    result = evaluate(encoder, pairs, generator=np.random.default_rng(3))
    enrolment = np.array([pairs.speakers[pairs.models[model][0]] for model in pairs.enrolment])
    test = pairs.speakers[pairs.test]
    expected = bootstrap_eer(result.scores, pairs.same_speaker, enrolment, test, np.random.default_rng(3))
    assert result.interval == (*expected, 6)
    metrics = result.metrics("test")
    assert (metrics["test/eer_low"], metrics["test/eer_high"]) == expected
    assert metrics.keys() - evaluate(encoder, pairs).metrics("test").keys() == {"test/eer_low", "test/eer_high"}


@pytest.mark.parametrize(("count", "there"), [(1, False), (4, False), (5, True)])
def test_few_speakers_give_no_interval(dev, count, there):
    scores = np.linspace(0, 1, len(dev.test))
    interval = eer_interval(scores, speakers_of(dev, count), np.random.default_rng(0))
    assert (interval is not None) is there


def test_a_cohort_normalises_the_scores(encoder, dev, root, embeddings):
    cohort = cohort_embeddings(encoder, train_list(root), root / "cache")
    assert cohort.shape == (7, 16)
    recordings = [int(dev.models[model][0]) for model in dev.enrolment]
    cosines = F.cosine_similarity(embeddings[recordings], embeddings[dev.test])
    expected = as_norm(cosines, embeddings, recordings, dev.test, cohort, 5)
    np.testing.assert_allclose(evaluate(encoder, dev, cohort, 5).scores, expected, atol=1e-3)


def test_more_of_the_cohort_than_there_is_means_all_of_it(encoder, dev, root):
    cohort = cohort_embeddings(encoder, train_list(root), root / "cache")
    few, many = (evaluate(encoder, dev, cohort, top_n).scores for top_n in (7, 300))
    np.testing.assert_array_equal(few, many)


def test_a_cohort_has_the_mean_direction_of_each_speaker(encoder, dev, embeddings, root):
    utterances = [Utterance(str(index), "ABBA"[index], root / f"dev-0/{10 + index}.wav") for index in range(4)]
    cohort = cohort_embeddings(encoder, utterances, root / "cache")
    unit = F.normalize(embeddings[:4], dim=1)
    expected = torch.stack([unit[[0, 3]].mean(0), unit[[1, 2]].mean(0)])
    torch.testing.assert_close(cohort, expected, rtol=0, atol=1e-5)


def test_an_unusable_recording_in_a_list_to_normalise_by_is_refused(encoder, root, tmp_path):
    utterances = [*train_list(root)[:2], Utterance("gone", "somebody", tmp_path / "gone.wav")]
    with pytest.raises(ValueError, match=r"1 of 3 recordings to normalise by cannot be used, first .*gone\.wav: "):
        embed_utterances(encoder, utterances, tmp_path / "cache")


def test_recordings_left_out_of_the_pairs_disturb_no_normalisation(encoder, root, tmp_path):
    paths = [root / f"dev-0/{take}.wav" for take in (10, 11, 12)]
    store = open_store([*paths, tmp_path / "gone.wav"], tmp_path / "cache")
    assert not embed_recordings(encoder, store)[3].any()
    pairs = pairs_of(store, [[0], []], [(0, 1, 1), (0, 2, 0)])
    cohort = cohort_embeddings(encoder, train_list(root), root / "cache")
    assert np.isfinite(evaluate(encoder, pairs, cohort).scores).all()


def test_embeddings_that_are_no_numbers_are_refused(dev):
    broken = tiny_encoder()
    with torch.no_grad():
        broken.ecapa.embedding.bias[0] = torch.nan
    with pytest.raises(NotFiniteError, match=f"embeddings of {RECORDINGS} of {RECORDINGS} recordings hold NaN"):
        evaluate(broken, dev)


def cohort_embeddings(encoder, utterances, cache):
    return speaker_means(embed_utterances(encoder, utterances, cache), utterances)


def train_list(root):
    return [
        Utterance(f"{speaker}/{take}", str(speaker), root / f"train-{speaker}/{take}.wav")
        for speaker in range(7)
        for take in range(2)
    ]


def work(number, root, folder):
    """One of two workers; the second list has fewer recordings than there are workers."""
    encoder = tiny_encoder()
    with process_group(folder / "meet", number, 2), pytest.MonkeyPatch.context() as patch:
        result = evaluate(encoder, dev_pairs(root))
        lengths = counting(encoder, patch)
        lone = embed_recordings(encoder, open_store([root / "noise/0.wav"], root / "cache"))
    saved = {"scores": torch.from_numpy(result.scores), "eer": result.rates.eer, "lone": lone, "read": len(lengths)}
    torch.save(saved, folder / f"{number}.pt")


@pytest.mark.slow
def test_two_workers_share_the_recordings_and_both_know_the_result_of_one(encoder, dev, root, tmp_path):
    expected = evaluate(encoder, dev)
    lone = embed_recordings(encoder, open_store([root / "noise/0.wav"], root / "cache"))
    run_workers(work, (root, tmp_path), 2)
    workers = [SimpleNamespace(**torch.load(tmp_path / f"{number}.pt")) for number in range(2)]
    for worker in workers:
        np.testing.assert_allclose(worker.scores, expected.scores, atol=1e-5)
        assert worker.eer == expected.rates.eer
        torch.testing.assert_close(worker.lone, lone, rtol=0, atol=1e-5)
    assert [worker.read for worker in workers] == [1, 0]
