"""One dial, `augment.strength`, and what it does to a view: noise at an SNR, reverberation, SpecAugment masks.

Every decision about a view comes from numbers drawn for it beforehand (`Choices`), from an explicit generator and for
the whole global batch, so that the same seed gives the same views however many workers share the batch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raysv.config import SAMPLE_RATE
from raysv.corpus.groups import Indices

ADDITIVE = ("noise", "music", "babble")  # kinds that are added at an SNR; the other one is reverb
MAX_VOICES = 8
FRAME = SAMPLE_RATE // 50  # 20 ms, for telling speech from pauses
ACTIVE_DB = 30  # a frame counts as speech when it is at most this far below the loudest one

Draws = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Recipe:
    """What a strength resolves to. SNR in dB, masks in frames of 10 ms and in mel bands, each range (low, high)."""

    probability: float  # that a view is disturbed at all
    reverb_share: float  # of the disturbed views, the share that is reverberated; the others get something added
    both_share: float  # of the reverberated views, the share that gets something added too
    noise_snr_db: tuple[float, float]
    music_snr_db: tuple[float, float]
    babble_snr_db: tuple[float, float]
    mask_frames: float  # the widest time mask of a view, to be rounded
    mask_mels: float  # the widest mel mask, likewise


# USUAL is the field's VoxCeleb recipe: two of three views disturbed, MUSAN's SNR ranges, SpecAugment 10 × 8
OFF = Recipe(0.0, 0.0, 0.0, (10, 25), (15, 25), (23, 30), 0, 0)
USUAL = Recipe(2 / 3, 1 / 3, 0.0, (0, 15), (5, 15), (13, 20), 10, 8)
HARSH = Recipe(1.0, 1 / 2, 1 / 2, (-5, 10), (0, 10), (5, 15), 20, 16)


def recipe(strength: float) -> Recipe:
    """The recipe of a strength in [0, 1]: `OFF` at 0, `USUAL` at 0.5, `HARSH` at 1, straight lines in between."""
    low, high, share = (OFF, USUAL, 2 * strength) if strength <= 0.5 else (USUAL, HARSH, 2 * strength - 1)

    def between(name: str) -> float | tuple[float, ...]:
        start, end = getattr(low, name), getattr(high, name)
        if isinstance(start, tuple):
            return tuple(float(a + share * (b - a)) for a, b in zip(start, end, strict=True))
        return float(start + share * (end - start))

    return Recipe(**{item.name: between(item.name) for item in dataclasses.fields(Recipe)})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Choices:
    """What happens to each view of a batch; every array begins with `(batch, views)`.

    Attributes:
        kind: index into `ADDITIVE` of what is added, −1 for nothing.
        snr_db: at which ratio.
        voices: how many voices make its babble.
        clip, offset: `(..., MAX_VOICES)` in [0, 1): which clip, and where in it; one entry is used unless it babbles.
        babbler: `(..., MAX_VOICES)` in [0, 1): which other speaker.
        reverberated: bool; `room` in [0, 1): by which response.
        masks: `(..., 4)` int: first frame and width of the time mask, first band and width of the mel mask.
    """

    kind: Indices
    snr_db: Draws
    voices: Indices
    clip: Draws
    offset: Draws
    babbler: Draws
    reverberated: npt.NDArray[np.bool_]
    room: Draws
    masks: Indices

    def __getitem__(self, rows: slice) -> Choices:
        return Choices(**{item.name: getattr(self, item.name)[rows] for item in dataclasses.fields(self)})


def choose(
    recipe: Recipe, kinds: list[str], views: tuple[int, int], frames: int, mels: int, generator: np.random.Generator
) -> Choices:
    """Draw what happens to `(batch, views)` views of `frames` × `mels` features.

    Args:
        kinds: what there is to disturb with, of `ADDITIVE` and `reverb`.
    """
    batch, per_utterance = views
    decision = generator.random((batch, per_utterance, 11))
    many = generator.random((3, batch, per_utterance, MAX_VOICES))
    additive = [index for index, kind in enumerate(ADDITIVE) if kind in kinds]
    disturbed = decision[..., 0] < (recipe.probability if kinds else 0)
    share = 0.0 if "reverb" not in kinds else recipe.reverb_share if additive else 1.0
    reverberated = disturbed & (decision[..., 1] < share)
    added = disturbed & (~reverberated | (decision[..., 2] < recipe.both_share)) & bool(additive)
    chosen = np.array(additive or [0])[(decision[..., 3] * max(1, len(additive))).astype(np.int64)]
    low, high = np.array([recipe.noise_snr_db, recipe.music_snr_db, recipe.babble_snr_db]).T
    time_start, time_width = _mask(decision[..., 7], decision[..., 8], recipe.mask_frames, frames)
    mel_start, mel_width = _mask(decision[..., 9], decision[..., 10], recipe.mask_mels, mels)
    return Choices(
        kind=np.where(added, chosen, -1),
        snr_db=low[chosen] + decision[..., 4] * (high - low)[chosen],
        voices=3 + (decision[..., 5] * (MAX_VOICES - 2)).astype(np.int64),
        clip=many[0],
        offset=many[1],
        babbler=many[2],
        reverberated=reverberated,
        room=decision[..., 6],
        masks=np.stack([time_start, time_width, mel_start, mel_width], axis=-1),
    )


def _mask(width: Draws, start: Draws, widest: float, size: int) -> tuple[Indices, Indices]:
    """First position and width of masks up to `widest` wide, each width as probable as the next."""
    widths = np.minimum((width * (round(widest) + 1)).astype(np.int64), size - 1)
    return (start * (size - widths + 1)).astype(np.int64), widths


def active_power(waveforms: Tensor) -> Tensor:
    """Mean power of the speech, `(n, samples)` → `(n,)`: of the 20 ms frames within 30 dB of the loudest one."""
    whole = waveforms.shape[-1] // FRAME * FRAME
    power = _power(waveforms[:, :whole].unflatten(-1, (-1, FRAME)))
    active = power >= power.amax(-1, keepdim=True) * 10 ** (-ACTIVE_DB / 10)
    return (power * active).sum(-1) / active.sum(-1)


def add_noise(waveforms: Tensor, noise: Tensor, snr_db: Tensor) -> Tensor:
    """Waveforms with noise at the given ratio of active speech power to mean noise power.

    Args:
        waveforms, noise: `(n, samples)`.
        snr_db: `(n,)`.
    """
    noise_power = _power(noise)
    wanted = active_power(waveforms) / 10 ** (snr_db / 10)
    gain = torch.where(noise_power > 0, wanted / noise_power.clamp_min(1e-20), 0).sqrt()  # a silent clip adds nothing
    return torch.addcmul(waveforms, gain[:, None], noise)


def reverberate(waveforms: Tensor, responses: Tensor) -> Tensor:
    """Waveforms in a room: as long as before, the direct path where it was, the power of the speech as it was.

    Args:
        waveforms: `(n, samples)`.
        responses: `(n, taps)`, each beginning with its direct path.
    """
    samples = waveforms.shape[-1]
    size = _fft_size(samples + responses.shape[-1] - 1)
    spectrum = torch.fft.rfft(waveforms, size) * torch.fft.rfft(responses, size)
    wet = torch.fft.irfft(spectrum, size)[:, :samples]
    gain = (active_power(waveforms) / active_power(wet).clamp_min(1e-20)).sqrt()
    return wet * gain[:, None]


def _power(values: Tensor) -> Tensor:
    """Mean square over the last dimension, in one pass."""
    return torch.linalg.vector_norm(values, dim=-1).square() / values.shape[-1]


def _fft_size(least: int) -> int:
    """The smallest 2^a·3^b·5^c, b and c at most 3, that is at least as large: every FFT library is fast at these."""
    sizes = (2**a * 3**b * 5**c for a in range(20) for b in range(4) for c in range(4))
    return min(size for size in sizes if size >= least)
