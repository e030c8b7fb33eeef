"""Read one recording as 16 kHz mono int16, or say what is wrong with it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile
import torch
import torchaudio.functional

from raysv.config import SAMPLE_RATE

FULL_SCALE = 32768  # int16 samples divided by it lie in [-1, 1)
SMALLEST_DIVISOR = 10  # Hz, of a rate and 16 kHz together: the resampler's filters for 44101 Hz would take gigabytes

RATES = (4000, 384_000)  # Hz
MOST_SAMPLES = 100_000_000  # of all channels, and of what is made of them: 1.7 hours; a float each takes 0.4 GB

Waveform = npt.NDArray[np.int16]
Floats = npt.NDArray[np.float32]


class BadAudio(ValueError):  # noqa: N818, it is the audio that is bad
    """A recording that cannot be used; the message says why, the caller knows which one."""


def read_audio(path: Path) -> Waveform:
    """The first channel of a WAV or FLAC file, at 16 kHz.

    Returns: `(samples,)` int16; exactly the file's own samples where it holds 16-bit audio at 16 kHz.
    Raises: BadAudio for a file that is missing, unreadable, empty, silent, has samples that are not finite, or a rate
        that 16 kHz cannot be made of, or for one too long.
    """
    try:
        if not path.is_file():
            raise BadAudio("there is no such file")
        _refuse_giant(path)
        samples, rate = soundfile.read(str(path), dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError, TypeError) as error:  # TypeError: a name that ends in .raw
        raise BadAudio(f"it cannot be read as audio ({error})") from error
    if not len(samples):
        raise BadAudio("it has no samples")
    channel = samples[:, 0]
    if not np.isfinite(channel).all():
        raise BadAudio("it has samples that are not finite (NaN or infinity)")
    if np.ptp(channel) * FULL_SCALE <= 1:  # a constant offset, or the flicker of the last bit
        raise BadAudio("it is silent from beginning to end")
    if rate != SAMPLE_RATE:
        if math.gcd(rate, SAMPLE_RATE) < SMALLEST_DIVISOR:
            raise BadAudio(f"its rate of {rate} Hz has no simple ratio to {SAMPLE_RATE} Hz; convert it")
        channel = torchaudio.functional.resample(torch.from_numpy(channel.copy()), rate, SAMPLE_RATE).numpy()
    return np.clip(np.rint(channel * FULL_SCALE), -FULL_SCALE, FULL_SCALE - 1).astype(np.int16)


def _refuse_giant(path: Path) -> None:
    """By its header alone: a few kilobytes of FLAC can be days of silence, and a header can claim anything."""
    header = soundfile.info(str(path))
    if not RATES[0] <= header.samplerate <= RATES[1]:
        raise BadAudio(f"its rate of {header.samplerate} Hz is not between {RATES[0]} and {RATES[1]} Hz")
    samples = header.frames * max(header.channels, SAMPLE_RATE / header.samplerate)
    if samples > MOST_SAMPLES:
        raise BadAudio(
            f"its header tells of {header.frames} samples in {header.channels} channel(s), more than the "
            f"{MOST_SAMPLES / 1e6:g} million that are decoded at once; cut it into shorter recordings"
        )


def floating(waveform: Waveform) -> Floats:
    """The same samples as float32 in [-1, 1), exactly."""
    floats = waveform.astype(np.float32)
    floats *= np.float32(1 / FULL_SCALE)  # in place: a page of memory touched for the first time costs more
    return floats


def take(waveform: Waveform, start: int, length: int) -> Waveform:
    """`length` samples from `start`, going round to the beginning where the recording ends."""
    if start + length <= len(waveform):
        return waveform[start : start + length]
    return np.take(waveform, np.arange(start, start + length), mode="wrap")
