import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st

from raysv.config import SAMPLE_RATE
from raysv.speech.augmentation import (
    ADDITIVE,
    FRAME,
    HARSH,
    MAX_VOICES,
    OFF,
    USUAL,
    active_power,
    add_noise,
    choose,
    recipe,
    reverberate,
)

KINDS = ["noise", "music", "babble", "reverb"]
MANY = (10_000, 2)
STRENGTHS = st.floats(0, 1)


def draw(strength, kinds=KINDS, views=MANY, frames=198, mels=80, seed=0):
    return choose(recipe(strength), kinds, views, frames, mels, np.random.default_rng(seed))


def fields(data):
    return {item.name: getattr(data, item.name) for item in dataclasses.fields(data)}


def flat(strength):
    return np.hstack([np.atleast_1d(value) for value in fields(recipe(strength)).values()])


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def speech_with_pauses(level=0.1, speaking=0.2, frames=100):
    """Bursts of noise between silence, `(1, samples)`, and which samples are bursts."""
    spoken = np.random.default_rng(1).permutation(frames) < speaking * frames
    mask = torch.from_numpy(np.repeat(spoken, FRAME))
    return level * noise(1, frames * FRAME) * mask, mask


def test_the_dial_has_three_named_positions():
    assert recipe(0) == OFF
    assert recipe(0.5) == USUAL
    np.testing.assert_allclose(flat(1), np.hstack(list(fields(HARSH).values())))


def test_between_the_positions_the_dial_follows_straight_lines():
    quarter = recipe(0.25)
    assert quarter.probability == pytest.approx(1 / 3)
    assert quarter.noise_snr_db == pytest.approx((5, 20))
    assert (quarter.mask_frames, quarter.mask_mels) == (5, 4)
    assert recipe(0.75).babble_snr_db == pytest.approx((9, 17.5))


@given(STRENGTHS, STRENGTHS)
def test_more_strength_is_never_gentler(one, other):
    gentle, harsh = fields(recipe(min(one, other))), fields(recipe(max(one, other)))
    for name in gentle:
        harder = np.subtract(harsh[name], gentle[name]) * (-1 if name.endswith("snr_db") else 1)
        assert (harder >= -1e-9).all(), name


@given(STRENGTHS)
def test_every_recipe_can_be_followed(strength):
    chosen = recipe(strength)
    for name, value in fields(chosen).items():
        if name.endswith("snr_db"):
            assert value[0] < value[1]
        elif not name.startswith("mask"):
            assert 0 <= value <= 1


def test_the_same_seed_gives_the_same_choices_and_another_seed_others():
    first, again, other = (fields(draw(0.5, views=(8, 2), seed=seed)) for seed in (3, 3, 4))
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    assert any(not np.array_equal(first[name], other[name]) for name in first)


def test_zero_strength_disturbs_nothing():
    choices = draw(0)
    assert (choices.kind == -1).all()
    assert not choices.reverberated.any()
    assert not choices.masks[..., [1, 3]].any()


def test_without_kinds_only_masks_are_left():
    choices = draw(1, kinds=[])
    assert (choices.kind == -1).all()
    assert not choices.reverberated.any()
    assert choices.masks[..., 1].max() == HARSH.mask_frames


def test_with_reverberation_alone_every_disturbed_view_is_reverberated():
    choices = draw(0.5, kinds=["reverb"])
    assert (choices.kind == -1).all()
    assert choices.reverberated.mean() == pytest.approx(USUAL.probability, abs=0.02)


@pytest.mark.parametrize("kind", ADDITIVE)
def test_with_one_additive_kind_every_disturbed_view_gets_it(kind):
    choices = draw(0.5, kinds=[kind])
    assert not choices.reverberated.any()
    assert set(np.unique(choices.kind)) == {-1, ADDITIVE.index(kind)}
    assert (choices.kind >= 0).mean() == pytest.approx(USUAL.probability, abs=0.02)


@pytest.mark.parametrize(("strength", "expected"), [(0.5, USUAL), (1, HARSH)])
def test_views_are_disturbed_as_often_as_the_recipe_says(strength, expected):
    choices = draw(strength)
    added, reverberated = choices.kind >= 0, choices.reverberated
    disturbed = added | reverberated
    assert disturbed.mean() == pytest.approx(expected.probability, abs=0.02)
    assert reverberated[disturbed].mean() == pytest.approx(expected.reverb_share, abs=0.02)
    assert added[reverberated].mean() == pytest.approx(expected.both_share, abs=0.02)
    shares = np.bincount(choices.kind[added], minlength=len(ADDITIVE)) / added.sum()
    np.testing.assert_allclose(shares, 1 / 3, atol=0.02)


def test_ratios_fill_the_range_of_their_kind():
    choices = draw(0.5)
    for index, kind in enumerate(ADDITIVE):
        low, high = getattr(USUAL, f"{kind}_snr_db")
        ratios = choices.snr_db[choices.kind == index]
        assert low <= ratios.min() < low + 0.1 and high - 0.1 < ratios.max() <= high
        assert ratios.mean() == pytest.approx((low + high) / 2, abs=0.2)


def test_three_to_eight_voices_babble_each_number_as_often():
    voices = draw(0.5).voices
    np.testing.assert_allclose(np.bincount(voices.ravel())[3:] / voices.size, 1 / 6, atol=0.02)
    assert voices.min() == 3 and voices.max() == MAX_VOICES


def test_every_mask_width_up_to_the_widest_is_as_probable():
    masks = draw(0.5).masks
    for widths, widest in ((masks[..., 1], 10), (masks[..., 3], 8)):
        counts = np.bincount(widths.ravel())
        assert len(counts) == widest + 1
        np.testing.assert_allclose(counts / widths.size, 1 / (widest + 1), atol=0.02)


@given(STRENGTHS, st.integers(2, 40), st.integers(2, 40), st.integers(0, 100))
def test_masks_lie_inside_the_features_and_never_cover_them(strength, frames, mels, seed):
    masks = draw(strength, views=(20, 2), frames=frames, mels=mels, seed=seed).masks
    for (start, width), size in ((masks[..., :2].reshape(-1, 2).T, frames), (masks[..., 2:].reshape(-1, 2).T, mels)):
        assert (start >= 0).all() and (width >= 0).all()
        assert (start + width <= size).all() and (width < size).all()


def test_a_slice_of_choices_is_those_rows_of_every_array():
    whole = draw(0.5, views=(6, 2))
    part = fields(whole[2:5])
    for name, value in fields(whole).items():
        np.testing.assert_array_equal(part[name], value[2:5])


@pytest.mark.parametrize("speaking", [0.05, 0.5, 1.0])
def test_pauses_do_not_count_as_speech(speaking):
    waveform, spoken = speech_with_pauses(speaking=speaking)
    torch.testing.assert_close(active_power(waveform), waveform[:, spoken].square().mean(1))


@pytest.mark.parametrize("level", [2 / 32768, 0.1])
@pytest.mark.parametrize("speaking", [0.05, 1.0])
@pytest.mark.parametrize("snr_db", [-5.0, 0.0, 20.0])
def test_noise_lies_below_the_active_speech_by_the_ratio_asked_for(level, speaking, snr_db):
    waveform, spoken = speech_with_pauses(level, speaking)
    added = add_noise(waveform, 0.3 * noise(*waveform.shape, seed=1), torch.tensor([snr_db])) - waveform
    ratio = waveform[:, spoken].square().mean() / added.square().mean()
    assert 10 * torch.log10(ratio).item() == pytest.approx(snr_db, abs=0.1)


def test_every_waveform_has_a_ratio_of_its_own():
    waveforms, clips = 0.1 * noise(3, 50 * FRAME), noise(3, 50 * FRAME, seed=1)
    asked = torch.tensor([0.0, 10.0, 20.0])
    added = add_noise(waveforms, clips, asked) - waveforms
    measured = 10 * torch.log10(waveforms.square().mean(1) / added.square().mean(1))
    torch.testing.assert_close(measured, asked, rtol=0, atol=0.1)


def test_a_silent_clip_adds_nothing():
    waveform = 0.1 * noise(1, 3200)
    assert torch.equal(add_noise(waveform, torch.zeros(1, 3200), torch.tensor([5.0])), waveform)


def test_silence_gets_no_noise_and_no_echo():
    silence, clip = torch.zeros(1, 3200), noise(1, 3200)
    assert torch.equal(add_noise(silence, clip, torch.tensor([5.0])), silence)
    assert torch.equal(reverberate(silence, clip), silence)


def test_a_room_without_walls_changes_nothing():
    waveforms, responses = 0.1 * noise(2, 16_000), torch.zeros(2, 500)
    responses[:, 0] = torch.tensor([1.0, 0.02])  # nor does its gain
    torch.testing.assert_close(reverberate(waveforms, responses), waveforms, rtol=0, atol=1e-6)


@pytest.mark.parametrize("taps", [1, 700, 5000])
def test_an_echo_is_the_convolution_cut_to_length(taps):
    waveforms, responses = 0.1 * noise(2, 3200), noise(2, taps, seed=1)
    wet = reverberate(waveforms, responses)
    assert wet.shape == waveforms.shape
    for row in range(2):
        expected = np.convolve(waveforms[row].double(), responses[row].double())[:3200]
        cosine = expected @ wet[row].double().numpy() / np.linalg.norm(expected) / wet[row].double().norm()
        assert cosine == pytest.approx(1, abs=1e-6)


def test_the_speech_keeps_its_power_in_a_room():
    waveform, _ = speech_with_pauses()
    decay = torch.exp(-torch.arange(SAMPLE_RATE // 2) / 2000)
    wet = reverberate(waveform, 7 * decay * noise(1, len(decay), seed=1))
    torch.testing.assert_close(active_power(wet), active_power(waveform))


real_recordings = pytest.mark.skipif(
    not os.environ.get("RAYSV_DATA"), reason="RAYSV_DATA does not name the pack of real speech"
)


def recordings(pattern, count):
    """Some recordings of the pack, from all over the files that match."""
    files = sorted(Path(os.environ["RAYSV_DATA"]).glob(pattern))
    return [torch.from_numpy(soundfile.read(file, dtype="float32")[0]) for file in files[:: len(files) // count]]


def speech_power(waveform):
    """The power of the speech, written down once more: 20 ms frames that are at most 30 dB below the loudest one."""
    samples = waveform.double().numpy()
    powers = np.array([np.mean(samples[start : start + 320] ** 2) for start in range(0, len(samples) - 319, 320)])
    return powers[10 * np.log10(powers.max() / np.maximum(powers, 1e-20)) <= 30].mean()


def speech_and_noise():
    for corpus in ("speechocean762", "ravdess", "urdu"):
        speech = recordings(f"speech/{corpus}/*/*.flac", 6)
        yield from zip(speech, recordings("noise/*.flac", len(speech)), strict=False)


@real_recordings
@pytest.mark.parametrize("snr_db", [-5.0, 0.0, 7.3, 20.0])
def test_real_noise_lies_below_real_speech_by_the_ratio_asked_for(snr_db):
    pairs = list(speech_and_noise())
    assert len(pairs) >= 18
    for waveform, clip in pairs:
        noise = clip[torch.arange(len(waveform)) % len(clip)]
        added = (add_noise(waveform[None], noise[None], torch.tensor([snr_db])) - waveform)[0].double()
        measured = 10 * np.log10(speech_power(waveform) / added.square().mean().item())
        assert measured == pytest.approx(snr_db, abs=0.1)


def real_rooms():
    """All responses of the pack as views meet them: from their loudest sample on, a second at most."""
    responses = recordings("rir/*.flac", 30)
    assert len(responses) == 30
    return [response[response.abs().argmax() :][:SAMPLE_RATE] for response in responses]


@real_recordings
def test_a_real_room_keeps_length_and_power_of_real_speech():
    for waveform, room in zip(recordings("speech/speechocean762/*/*.flac", 30), real_rooms(), strict=False):
        wet = reverberate(waveform[None], room[None])[0]
        assert wet.shape == waveform.shape
        assert speech_power(wet) == pytest.approx(speech_power(waveform), rel=1e-3)


@real_recordings
def test_a_click_in_a_real_room_becomes_its_response_beginning_where_the_click_was():
    click = torch.zeros(1, 3 * SAMPLE_RATE)
    click[0, 5000] = 0.5
    for room in real_rooms():
        wet = reverberate(click, room[None])[0]
        assert wet.abs().argmax() == 5000
        expected = torch.zeros_like(wet)
        expected[5000 : 5000 + len(room)] = room / room[0]
        torch.testing.assert_close(wet / wet[5000], expected, rtol=0, atol=1e-5)
