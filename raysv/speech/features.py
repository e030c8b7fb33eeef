"""Log-mel filterbank features as Kaldi computes them, for a whole batch at once, and SpecAugment's masks."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torchaudio.compliance.kaldi import get_mel_banks

from raysv.config import SAMPLE_RATE
from raysv.corpus.audio import FULL_SCALE

FRAME_SAMPLES = SAMPLE_RATE * 25 // 1000  # 25 ms
HOP_SAMPLES = SAMPLE_RATE * 10 // 1000  # 10 ms
FFT_SIZE = 512
MELS = 80
PREEMPHASIS = 0.97
LOWEST_HZ = 20.0
CPU_ROWS = 4  # waveforms at a time on a CPU: what stays in its cache is twice as fast
MEL_BLOCK = 16  # mels at a time: neighbours weigh few of the frequencies, all 80 together mostly by zero

Count = TypeVar("Count", int, Tensor)


def num_frames(samples: Count) -> Count:
    """Frames that fit wholly into this many samples (`snip_edges`); at most 0 where not even one does."""
    return (samples - FRAME_SAMPLES) // HOP_SAMPLES + 1


class Fbank(nn.Module):
    """Log-mel filterbank of 25 ms frames every 10 ms, equal to Kaldi's with a Hamming window and no dither.

    Source: Kaldi's `compute-fbank-feats`; the reference is `torchaudio.compliance.kaldi.fbank`.
    """

    window: Tensor
    mel_banks: Tensor

    def __init__(self, mels: int = MELS) -> None:
        super().__init__()
        nyquist = SAMPLE_RATE / 2
        banks, _ = get_mel_banks(mels, FFT_SIZE, SAMPLE_RATE, LOWEST_HZ, nyquist, 100.0, -500.0, 1.0)
        # Kaldi's samples are 16-bit integers, ours lie in [-1, 1)
        window = torch.hamming_window(FRAME_SAMPLES, periodic=False) * FULL_SCALE
        self.register_buffer("window", window, persistent=False)
        banks = nn.functional.pad(banks, (0, 1)).T  # Nyquist weighs nothing
        banks = banks.repeat_interleave(2, dim=0)  # the squares of real and imaginary parts weigh alike
        self.register_buffer("mel_banks", banks, persistent=False)
        self._blocks = [_weighed(banks, slice(low, low + MEL_BLOCK)) for low in range(0, mels, MEL_BLOCK)]

    def forward(self, waveforms: Tensor) -> Tensor:
        """Features `(..., mels, frames)` of waveforms `(..., samples)` in [-1, 1) at 16 kHz; float32, as the module is.

        Raises: ValueError when the waveforms are shorter than one frame.
        """
        samples = waveforms.shape[-1]
        if samples < FRAME_SAMPLES:
            raise ValueError(
                f"Features need at least {FRAME_SAMPLES} samples (25 ms at 16 kHz), got {samples}. "
                "Leave such recordings out or repeat them."
            )
        exported = torch.compiler.is_exporting()  # into a graph, which takes any number of waveforms at once
        if waveforms.device.type == "cpu" and waveforms.dim() == 2 and not exported:
            return torch.cat([self._log_mel(part) for part in waveforms.split(CPU_ROWS)])
        return self._log_mel(waveforms)

    def _log_mel(self, waveforms: Tensor) -> Tensor:
        with torch.autocast(waveforms.device.type, enabled=False):
            mel = self.mel_energies(self._frames(waveforms.to(self.window.dtype)))
            return mel.clamp_(min=torch.finfo(torch.float32).eps).log_().mT

    def mel_energies(self, frames: Tensor) -> Tensor:
        """The energy `(..., mels)` in each mel band of windowed frames `(..., FFT_SIZE)`."""
        squares = torch.view_as_real(torch.fft.rfft(frames)).flatten(-2).square_()
        return torch.cat([squares[..., bins] @ self.mel_banks[bins, mels] for bins, mels in self._blocks], dim=-1)

    def _frames(self, waveforms: Tensor) -> Tensor:
        """Frames `(..., frames, FFT_SIZE)` less their mean, pre-emphasised, windowed, with zeros behind."""
        unfolded = waveforms.unfold(-1, FRAME_SAMPLES, HOP_SAMPLES)
        frames = waveforms.new_empty((*unfolded.shape[:-1], FFT_SIZE))
        frames[..., FRAME_SAMPLES:] = 0
        whole = frames[..., :FRAME_SAMPLES]
        whole.copy_(unfolded).sub_(unfolded.mean(-1, keepdim=True))
        before = whole * PREEMPHASIS  # `sub_(alpha=)` would round once less than Kaldi's reference
        whole[..., 1:].sub_(before[..., :-1])
        whole[..., :1].sub_(before[..., :1])  # a frame's first sample has itself before it
        whole.mul_(self.window)
        return frames


def _weighed(banks: Tensor, mels: slice) -> tuple[slice, slice]:
    """The rows in which any of these columns weighs something, and the columns."""
    rows = banks[:, mels].any(1).nonzero()
    return slice(int(rows.min()), int(rows.max()) + 1), mels


def frame_padding(lengths: Tensor, frames: int) -> Tensor:
    """True `(n, 1, frames)` at the frames that lie beyond an utterance's length."""
    return (torch.arange(frames, device=lengths.device) >= lengths[:, None])[:, None]


def mean_over_time(values: Tensor, padding: Tensor | None) -> Tensor:
    """Mean `(n, channels, 1)` of `(n, channels, frames)` over the frames that are not padding."""
    if padding is None:
        return values.mean(-1, keepdim=True)
    return values.masked_fill(padding, 0).sum(-1, keepdim=True) / (~padding).sum(-1, keepdim=True)


def mean_normalise(fbank: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Features with the mean over time taken from each mel band of each utterance.

    Args:
        fbank: `(n, mels, frames)`.
        lengths: `(n,)` frames of each utterance; what lies beyond becomes 0. None: all are full.
    """
    if lengths is None:
        return fbank - mean_over_time(fbank, None)
    padding = frame_padding(lengths, fbank.shape[-1])
    return (fbank - mean_over_time(fbank, padding)).masked_fill(padding, 0)


class BandMasks(NamedTuple):
    """One band of frames and one of mels per utterance, each `(n,)` integers; a width of 0 masks nothing."""

    time_start: Tensor
    time_width: Tensor
    mel_start: Tensor
    mel_width: Tensor


def mask_bands(fbank: Tensor, masks: BandMasks) -> Tensor:
    """SpecAugment: features `(n, mels, frames)` with a band of frames and a band of mels set to 0, their mean.

    Features must be finite, as those of finite waveforms are: masking multiplies.

    Source: Park et al. 2019, arXiv 1904.08779, with one mask of each kind and no time warping.
    """
    time_start, time_width, mel_start, mel_width = (values[:, None] for values in masks)
    frame = torch.arange(fbank.shape[-1], device=fbank.device)
    mel = torch.arange(fbank.shape[-2], device=fbank.device)
    keep_time = (frame < time_start) | (frame >= time_start + time_width)
    keep_mel = (mel < mel_start) | (mel >= mel_start + mel_width)
    return (fbank * keep_time[:, None, :]).mul_(keep_mel[:, :, None])
