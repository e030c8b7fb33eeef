"""The speaker encoder: waveforms in, embeddings out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from raysv.config import SAMPLE_RATE, ModelConfig
from raysv.speech.ecapa import ECAPATDNN
from raysv.speech.features import FRAME_SAMPLES, BandMasks, Fbank, mask_bands, mean_normalise, num_frames

SHORTEST_SAMPLES = SAMPLE_RATE // 2  # `embed` repeats what is shorter than half a second


class SpeakerEncoder(nn.Module):
    """Filterbank, mean normalisation over time, SpecAugment where masks are given, ECAPA-TDNN."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fbank = Fbank()
        self.ecapa = ECAPATDNN(channels=config.channels, embedding_dim=config.embedding_dim)

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None, masks: BandMasks | None = None) -> Tensor:
        """Embeddings `(n, dim)`, not normalised.

        Args:
            waveforms: `(n, samples)` in [-1, 1) at 16 kHz.
            lengths: `(n,)` samples of each utterance, the rest being padding; None: all are full.
            masks: bands of SpecAugment, one entry per utterance; None: none.

        Raises: ValueError when a length is less than one frame, or more than there is.
        """
        samples = waveforms.shape[-1]
        if lengths is not None and not FRAME_SAMPLES <= int(lengths.min()) <= int(lengths.max()) <= samples:
            raise ValueError(
                f"Lengths must lie between {FRAME_SAMPLES} samples (25 ms at 16 kHz) and the {samples} given, got "
                f"{lengths.tolist()}. Leave shorter recordings out or repeat them, as `embed` does."
            )
        frames = None if lengths is None else num_frames(lengths)
        features = mean_normalise(self.fbank(waveforms), frames)
        if masks is not None:
            features = mask_bands(features, masks)
        return self.ecapa(features, frames)

    def embed(self, waveforms: Sequence[Tensor], padded_seconds: float = 120.0) -> Tensor:
        """Embeddings `(n, dim)` of whole utterances, in the order given, for inference.

        Utterances of similar length share a batch; an embedding does not depend on what else is in it. One of less
        than 0.5 s is repeated up to that length. The mode, training or eval, is afterwards what it was.

        Args:
            waveforms: n tensors `(samples,)` in [-1, 1) at 16 kHz, each of its own length, on any device.
            padded_seconds: largest batch, in seconds of audio with its padding; a longer utterance goes alone.

        Raises: ValueError naming the position of a waveform that is empty or not one-dimensional.
        """
        for position, waveform in enumerate(waveforms):
            if waveform.dim() != 1 or not len(waveform):
                raise ValueError(
                    f"waveforms[{position}] must have the shape (samples,) with at least one sample, "
                    f"got {tuple(waveform.shape)}. Pass one channel of one recording each."
                )
        weight = self.ecapa.embedding.weight
        embeddings = weight.new_empty((len(waveforms), len(weight)))
        samples = [max(len(waveform), SHORTEST_SAMPLES) for waveform in waveforms]
        was_training = self.training
        self.eval()
        try:
            with torch.inference_mode():
                for batch in _batches(samples, int(padded_seconds * SAMPLE_RATE)):
                    padded = pad_sequence([_repeat(waveforms[index]) for index in batch], batch_first=True)
                    lengths = torch.tensor([samples[index] for index in batch])
                    ragged = lengths.to(weight.device) if lengths.min() < lengths.max() else None
                    embeddings[batch] = self(padded.to(weight.device), ragged).to(embeddings.dtype)
        finally:
            self.train(was_training)
        return embeddings


def _repeat(waveform: Tensor) -> Tensor:
    copies = -(-SHORTEST_SAMPLES // len(waveform))
    return waveform if copies == 1 else waveform.repeat(copies)[:SHORTEST_SAMPLES]


def _batches(samples: list[int], limit: int) -> Iterator[list[int]]:
    """Positions grouped by falling length, so that each group's count times its longest stays within the limit."""
    longest_first = sorted(range(len(samples)), key=lambda index: -samples[index])
    while longest_first:
        size = max(1, limit // samples[longest_first[0]])
        yield longest_first[:size]
        longest_first = longest_first[size:]
