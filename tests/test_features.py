import os
from pathlib import Path

import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchaudio.compliance import kaldi

from raysv.speech.features import BandMasks, Fbank, frame_padding, mask_bands, mean_normalise, num_frames


def speech(samples, seed=0, pitch_hz=120.0):
    """A buzz through two resonances with some breath: loud and soft stretches like speech, no silence."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(samples) / 16_000
    harmonics = torch.arange(1, 30)[:, None]
    tract = sum(torch.exp(-(((harmonics * pitch_hz - formant) / 300) ** 2)) for formant in (600, 1500))
    buzz = ((tract + 0.01) * torch.sin(2 * torch.pi * harmonics * pitch_hz * time)).sum(0)
    breath = torch.randn(samples, generator=generator)
    loudness = 0.05 + torch.sin(2 * torch.pi * 3 * time).square()
    return 0.05 * loudness * buzz + 0.01 * breath


def kaldi_fbank(waveform, mels=80):
    options = {"num_mel_bins": mels, "window_type": "hamming", "dither": 0.0, "sample_frequency": 16_000}
    return kaldi.fbank(waveform[None] * 32768, **options).T


@pytest.mark.parametrize("samples", [400, 559, 560, 16_123, 48_000])
def test_fbank_is_that_of_kaldi(samples):
    waveform = speech(samples)
    features = Fbank()(waveform)
    assert features.shape == (80, num_frames(samples))
    torch.testing.assert_close(features, kaldi_fbank(waveform), rtol=0, atol=2e-5)


def test_fbank_of_another_number_of_mels_is_that_of_kaldi():
    waveform = speech(8000)
    torch.testing.assert_close(Fbank(mels=40)(waveform), kaldi_fbank(waveform, 40), rtol=0, atol=1e-4)


def test_the_gradient_of_fbank_is_that_of_kaldi():
    weights = torch.randn(80, num_frames(8000), generator=torch.Generator().manual_seed(1))
    gradients = []
    for features_of in (Fbank(), kaldi_fbank):
        waveform = speech(8000).requires_grad_()
        gradients.append(torch.autograd.grad((weights * features_of(waveform)).sum(), waveform)[0])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-2)


@pytest.mark.skipif(not os.environ.get("RAYSV_DATA"), reason="RAYSV_DATA does not name the pack of real speech")
@pytest.mark.parametrize("corpus", ["speechocean762", "ravdess", "urdu"])
def test_fbank_of_real_speech_is_that_of_kaldi_also_in_a_batch(corpus):
    speakers = sorted(path for path in Path(os.environ["RAYSV_DATA"], "speech", corpus).iterdir() if path.is_dir())
    files = [sorted(speaker.rglob("*.flac"))[0] for speaker in speakers[:: len(speakers) // 10]]
    waveforms = [torch.from_numpy(soundfile.read(file, dtype="float32")[0]) for file in files]
    fbank = Fbank()
    for waveform in waveforms:
        torch.testing.assert_close(fbank(waveform), kaldi_fbank(waveform), rtol=0, atol=1e-4)
    crops = torch.stack([waveform[:32_000] for waveform in waveforms])
    torch.testing.assert_close(fbank(crops), torch.stack([kaldi_fbank(crop) for crop in crops]), rtol=0, atol=1e-4)


def test_a_constant_offset_leaves_no_trace():
    waveform = speech(8000)
    torch.testing.assert_close(Fbank()(waveform + 0.25), kaldi_fbank(waveform), rtol=0, atol=2e-2)


def test_silence_lies_on_the_floor_and_is_finite():
    features = Fbank()(torch.zeros(1000))
    assert torch.equal(features, torch.full((80, 4), torch.finfo(torch.float32).eps).log())


def test_a_batch_of_views_is_its_waveforms_one_by_one():
    waveforms = torch.stack([speech(5000, seed, pitch) for seed, pitch in enumerate([80.0, 110, 150, 190, 220, 250])])
    fbank = Fbank()
    features = fbank(waveforms.view(2, 3, -1))
    assert features.shape == (2, 3, 80, num_frames(5000))
    for one, waveform in zip(features.flatten(0, 1), waveforms, strict=True):
        torch.testing.assert_close(one, fbank(waveform), rtol=0, atol=1e-5)


def test_fbank_is_float32_under_autocast_and_for_half_precision():
    waveform = speech(4000)
    fbank = Fbank()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fbank(waveform), fbank.eval()(waveform))
    assert fbank(waveform.bfloat16()).dtype == torch.float32


def test_fbank_adds_nothing_to_a_checkpoint():
    assert not Fbank().state_dict()


def test_a_waveform_shorter_than_a_frame_is_refused():
    with pytest.raises(ValueError, match=r"at least 400 samples .* got 399"):
        Fbank()(torch.zeros(2, 399))


@given(samples=st.integers(400, 100_000))
def test_num_frames_counts_windows_that_fit(samples):
    assert num_frames(samples) == len(range(0, samples - 400 + 1, 160))
    assert num_frames(torch.tensor([samples])).tolist() == [num_frames(samples)]


def test_mean_normalise_takes_each_mean_over_time():
    fbank = torch.tensor([[[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]]])
    assert mean_normalise(fbank).tolist() == [[[-2.0, -1.0, 3.0], [-1.0, -1.0, 2.0]]]


def test_mean_normalise_leaves_padding_out_and_at_zero():
    fbank = torch.tensor([[[1.0, 3.0, 99.0]], [[1.0, 3.0, 5.0]]])
    assert mean_normalise(fbank, torch.tensor([2, 3])).tolist() == [[[-1.0, 1.0, 0.0]], [[-2.0, 0.0, 2.0]]]


def test_frame_padding_marks_what_lies_beyond():
    assert frame_padding(torch.tensor([1, 3]), 3).tolist() == [[[False, True, True]], [[False, False, False]]]


@settings(deadline=None)
@given(st.data())
def test_masks_are_bands_of_zeros(data):
    mels, frames = 5, 7
    count = data.draw(st.integers(1, 3))

    def draw(largest):
        return torch.tensor(data.draw(st.lists(st.integers(0, largest), min_size=count, max_size=count)))

    masks = BandMasks(draw(frames), draw(3), draw(mels), draw(2))
    fbank = torch.randn(count, mels, frames)
    expected = fbank.clone()
    for row, (start, width, low, height) in enumerate(torch.stack(masks, 1).tolist()):
        expected[row, :, start : start + width] = 0
        expected[row, low : low + height] = 0
    given_features = fbank.clone()
    assert torch.equal(mask_bands(fbank, masks), expected)
    assert torch.equal(fbank, given_features)


def test_a_width_of_zero_masks_nothing():
    fbank = torch.randn(2, 5, 7)
    place, nothing = torch.tensor([0, 3]), torch.zeros(2, dtype=torch.int64)
    assert torch.equal(mask_bands(fbank, BandMasks(place, nothing, place, nothing)), fbank)
