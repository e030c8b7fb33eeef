import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from raysv.config import SAMPLE_RATE
from raysv.corpus.audio import BadAudio, floating, read_audio, take

RATES = (8_000, 16_000, 22_050, 44_100, 48_000)


def noise(samples=2000, channels=1):
    return np.random.default_rng(0).integers(-32768, 32768, (samples, channels)).astype(np.int16)


def write(path, samples, rate=SAMPLE_RATE, subtype="PCM_16"):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, subtype=subtype)
    return path


def pitch(samples):
    """Frequency in Hz of the largest peak of a spectrum, between its bins."""
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples)), 16 * len(samples)))
    return spectrum.argmax() * SAMPLE_RATE / (16 * len(samples))


def refused(path):
    with pytest.raises(BadAudio) as caught:
        read_audio(path)
    return str(caught.value)


@pytest.mark.parametrize("suffix", ["wav", "flac"])
@pytest.mark.parametrize("channels", [1, 2])
def test_16_bit_audio_at_16_khz_comes_back_bit_for_bit(tmp_path, suffix, channels):
    samples = noise(channels=channels)
    waveform = read_audio(write(tmp_path / f"a.{suffix}", samples))
    assert waveform.dtype == np.int16
    np.testing.assert_array_equal(waveform, samples[:, 0])


@pytest.mark.parametrize("suffix", ["wav", "flac"])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", RATES)
def test_any_usual_rate_becomes_16_khz_with_its_pitch_length_and_level(tmp_path, suffix, channels, rate):
    samples = rate // 4 + 7
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(samples) / rate)
    other = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(samples) / rate)
    waveform = read_audio(write(tmp_path / f"a.{suffix}", np.stack([tone, other], 1)[:, :channels], rate))
    assert len(waveform) == math.ceil(samples * SAMPLE_RATE / rate)
    assert pitch(waveform) == pytest.approx(440, abs=1)
    middle = waveform[len(waveform) // 4 : -len(waveform) // 4]
    assert np.abs(middle).max() == pytest.approx(0.5 * 32768, rel=0.01)


def test_what_16_khz_cannot_hold_is_filtered_out(tmp_path):
    tone = 0.5 * np.sin(2 * np.pi * 10_000 * np.arange(24_000) / 48_000)
    middle = read_audio(write(tmp_path / "a.wav", tone, 48_000))[1000:-1000]
    assert np.abs(middle).max() < 0.01 * 32768


@pytest.mark.parametrize(
    ("suffix", "subtype"), [("wav", "PCM_24"), ("flac", "PCM_24"), ("wav", "FLOAT"), ("wav", "DOUBLE")]
)
def test_finer_samples_are_rounded(tmp_path, suffix, subtype):
    exact = np.random.default_rng(0).uniform(-0.99, 0.99, 2000)
    waveform = read_audio(write(tmp_path / f"a.{suffix}", exact, subtype=subtype))
    assert np.abs(waveform - exact * 32768).max() <= 0.51


def test_samples_beyond_full_scale_are_clipped_not_wrapped(tmp_path):
    waveform = read_audio(write(tmp_path / "a.wav", np.array([0, 1.5, -1.5, 1.0, -1.0]), subtype="FLOAT"))
    assert waveform.tolist() == [0, 32767, -32768, 32767, -32768]


def test_a_full_scale_square_wave_is_not_silent(tmp_path):
    samples = np.tile(np.array([32767, -32768], np.int16), 500)
    np.testing.assert_array_equal(read_audio(write(tmp_path / "a.wav", samples)), samples)


def test_paths_may_hold_spaces_and_any_letters(tmp_path):
    assert len(read_audio(write(tmp_path / "зal é" / "日本 1.flac", noise()))) == 2000


def test_a_missing_file_is_called_missing(tmp_path):
    assert refused(tmp_path / "a.wav") == refused(tmp_path) == "there is no such file"


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.raw"])
@pytest.mark.parametrize("content", [b"", b"this is no audio at all" * 10])
def test_what_is_no_audio_is_called_unreadable(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert refused(tmp_path / name).startswith("it cannot be read as audio")


def test_half_a_flac_file_is_called_unreadable(tmp_path):
    path = write(tmp_path / "a.flac", noise(20_000))
    path.write_bytes(path.read_bytes()[:20_000])
    assert refused(path).startswith("it cannot be read as audio")


def test_a_header_that_tells_of_days_is_refused_before_anything_is_decoded(tmp_path):
    soundfile.write(tmp_path / "a.flac", np.zeros(1000), SAMPLE_RATE)
    content = bytearray((tmp_path / "a.flac").read_bytes())
    assert content[:4] == b"fLaC"
    content[21] = content[21] & 0xF0 | 0x0F  # the upper bits of the number of samples
    (tmp_path / "a.flac").write_bytes(content)
    with pytest.raises(BadAudio, match=r"tells of 6\d{10} samples in 1 channel\(s\), more than the 100 million"):
        read_audio(tmp_path / "a.flac")


@pytest.mark.parametrize("rate", [10, 3999, 1_000_010])
def test_a_rate_that_no_recorder_has_is_refused(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", np.linspace(-0.5, 0.5, 1000), rate)
    with pytest.raises(BadAudio, match=rf"its rate of {rate} Hz is not between 4000 and 384000 Hz"):
        read_audio(tmp_path / "a.wav")


def test_a_header_without_samples_is_called_empty(tmp_path):
    assert refused(write(tmp_path / "a.wav", np.zeros(0, np.int16))) == "it has no samples"


@pytest.mark.parametrize("rate", [16_000, 8_000])
@pytest.mark.parametrize("level", [0, 1000])
def test_a_constant_is_called_silent(tmp_path, rate, level):
    samples = np.full(1000, level, np.int16)
    samples[::7] += 1  # the flicker of the last bit
    assert refused(write(tmp_path / "a.wav", samples, rate)) == "it is silent from beginning to end"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_no_numbers_are_named(tmp_path, value):
    samples = np.linspace(-0.5, 0.5, 100)
    samples[50] = value
    assert "not finite" in refused(write(tmp_path / "a.wav", samples, subtype="FLOAT"))


def test_a_rate_without_a_ratio_is_refused_before_it_takes_all_memory(tmp_path):
    assert "44101 Hz" in refused(write(tmp_path / "a.wav", noise(), 44_101))


@given(length=st.integers(1, 20), start=st.integers(0, 40), wanted=st.integers(1, 50))
def test_taking_goes_round_and_round(length, start, wanted):
    start %= length
    waveform = np.arange(length, dtype=np.int16)
    np.testing.assert_array_equal(take(waveform, start, wanted), np.tile(waveform, 100)[start : start + wanted])


def test_taking_from_the_middle_copies_nothing():
    waveform = np.arange(10, dtype=np.int16)
    assert np.shares_memory(take(waveform, 2, 8), waveform)


def test_floating_samples_are_exact_and_a_copy():
    waveform = np.arange(-32768, 32768).astype(np.int16)
    floats = floating(waveform)
    assert floats.dtype == np.float32
    np.testing.assert_array_equal(floats, np.arange(-32768, 32768) / 32768)
    assert not np.shares_memory(floats, waveform)


def test_bad_audio_is_a_value_error():
    assert issubclass(BadAudio, ValueError)
    with pytest.raises(ValueError, match="no such file"):
        read_audio(Path("nowhere.wav"))
