import copy

import pytest
import torch

from raysv.config import ModelConfig
from raysv.speech.encoder import SpeakerEncoder
from raysv.speech.features import BandMasks, num_frames


def noise(samples, seed=0):
    return 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def encoder():
    """A small encoder in training mode whose BatchNorm has seen some noise."""
    torch.manual_seed(0)
    encoder = SpeakerEncoder(ModelConfig(channels=32, embedding_dim=16))
    for seed in range(5):
        encoder(noise((4, 8000), seed))
    return encoder


@pytest.fixture
def evaluated(encoder):
    encoder.eval()
    yield encoder
    encoder.train()


def test_waveforms_become_embeddings(encoder):
    assert encoder(noise((3, 4000))).shape == (3, 16)


def test_loudness_does_not_matter(evaluated):
    waveforms = noise((2, 8000))
    torch.testing.assert_close(evaluated(waveforms), evaluated(waveforms * 0.25), rtol=0, atol=1e-4)


def test_padding_has_no_influence(evaluated):
    waveforms = noise((2, 8000))
    waveforms[0, 5000:] = 0.3
    embeddings = evaluated(waveforms, torch.tensor([5000, 8000]))
    torch.testing.assert_close(embeddings[:1], evaluated(waveforms[:1, :5000]), rtol=0, atol=1e-5)
    torch.testing.assert_close(embeddings[1:], evaluated(waveforms[1:]), rtol=0, atol=1e-5)


def test_masks_reach_the_network(evaluated):
    waveforms = noise((2, 8000))
    zero, some = torch.tensor([0, 0]), torch.tensor([0, 10])
    plain, masked = evaluated(waveforms), evaluated(waveforms, masks=BandMasks(zero, some, zero, zero))
    assert torch.equal(plain[0], masked[0])
    assert not torch.allclose(plain[1], masked[1], atol=1e-3)


def test_fully_masked_features_are_still_finite(encoder):
    zero, frames = torch.tensor([0, 0]), torch.full((2,), num_frames(8000))
    assert encoder(noise((2, 8000)), masks=BandMasks(zero, frames, zero, zero)).isfinite().all()


@pytest.mark.parametrize("padded_seconds", [0.1, 2.0, 100.0])
def test_an_embedding_does_not_depend_on_its_batch(encoder, padded_seconds):
    waveforms = [noise(samples, seed) for seed, samples in enumerate([9000, 30_000, 8000, 3000, 9000, 12_345])]
    alone = torch.cat([encoder.embed([waveform]) for waveform in waveforms])
    together = encoder.embed(waveforms, padded_seconds)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_batches_stay_within_their_bound(encoder, monkeypatch):
    shapes = []
    forward = SpeakerEncoder.forward

    def spy(self, waveforms, *arguments):
        shapes.append(waveforms.shape)
        return forward(self, waveforms, *arguments)

    monkeypatch.setattr(SpeakerEncoder, "forward", spy)
    encoder.embed([noise(samples) for samples in [8000, 16_000, 40_000, 9000, 15_000]], padded_seconds=2.0)
    assert shapes == [(1, 40_000), (2, 16_000), (2, 9000)]


def test_embed_is_the_encoder_in_eval_mode_on_whole_utterances(evaluated):
    waveform = noise(20_000)
    torch.testing.assert_close(evaluated.embed([waveform]), evaluated(waveform[None]), rtol=0, atol=1e-6)


def test_less_than_half_a_second_is_repeated(encoder):
    waveform = noise(3000)
    repeated = torch.cat([waveform, waveform, waveform[:2000]])
    assert torch.equal(encoder.embed([waveform]), encoder.embed([repeated]))


def test_embed_leaves_the_encoder_as_it_was(encoder):
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    embeddings = encoder.embed([noise(8000)])
    assert encoder.training
    assert all(module.training for module in encoder.modules())
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert not embeddings.requires_grad


def test_nothing_to_embed_gives_no_rows(encoder):
    assert encoder.embed([]).shape == (0, 16)


@pytest.mark.parametrize("waveform", [torch.zeros(0), torch.zeros(1, 8000)], ids=["empty", "two-dimensional"])
def test_embed_names_the_waveform_it_cannot_take(encoder, waveform):
    with pytest.raises(ValueError, match=r"waveforms\[1\] must have the shape \(samples,\)"):
        encoder.embed([noise(8000), waveform])


@pytest.mark.parametrize("lengths", [[300, 8000], [8000, 8001]])
def test_lengths_that_hold_no_frame_or_more_than_there_is_are_refused(evaluated, lengths):
    with pytest.raises(ValueError, match=r"Lengths must lie between 400 samples .* and the 8000 given, got"):
        evaluated(torch.zeros(2, 8000), torch.tensor(lengths))


def test_an_encoder_made_double_computes_in_float64(evaluated):
    waveforms = torch.stack([noise(8000, 0), noise(8000, 1)])
    expected = evaluated(waveforms)
    precise = copy.deepcopy(evaluated).double()(waveforms)
    assert precise.dtype == torch.float64
    torch.testing.assert_close(precise.float(), expected, rtol=0, atol=1e-5)


def test_only_the_network_has_a_state(encoder):
    assert all(name.startswith("ecapa.") for name in encoder.state_dict())
