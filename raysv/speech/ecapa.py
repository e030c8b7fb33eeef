"""ECAPA-TDNN: features in, one embedding per utterance out.

Zero-padded and without BatchNorm in the attention, like the field's common 6.19 M and 14.66 M parameter models. Where
lengths are given, frames beyond an utterance's end have no influence on its embedding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysv.distributed import BatchNorm1d
from raysv.speech.features import frame_padding, mean_over_time

SCALE = 8  # groups of a Res2 convolution
DILATIONS = (2, 3, 4)  # one SE-Res2 block each
MIN_VARIANCE = 1e-7  # keeps the gradient of the square root finite where a channel is constant


class ConvReluNorm(nn.Module):
    """Convolution that keeps the number of frames, ReLU, BatchNorm."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, kernel, dilation=dilation, padding=dilation * (kernel // 2))
        self.norm = BatchNorm1d(outputs)

    def forward(self, values: Tensor, padding: Tensor | None = None) -> Tensor:
        """`(n, inputs, frames)` to `(n, outputs, frames)`; frames marked in `padding` are read as zeros."""
        if padding is not None:
            values = values.masked_fill(padding, 0)
        return self.norm(F.relu(self.conv(values), inplace=True))


class Res2(nn.Module):
    """Groups of channels, each convolved after the output of the group before was added; the last one passes.

    Source: Gao et al. 2019, arXiv 1904.01169.
    """

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        width = channels // SCALE
        self.layers = nn.ModuleList(ConvReluNorm(width, width, kernel=3, dilation=dilation) for _ in range(SCALE - 1))

    def forward(self, values: Tensor, padding: Tensor | None) -> Tensor:
        """`(n, channels, frames)` to the same shape."""
        *groups, last = values.chunk(SCALE, dim=1)
        outputs = [self.layers[0](groups[0], padding)]
        for layer, group in zip(self.layers[1:], groups[1:], strict=True):
            outputs.append(layer(outputs[-1] + group, padding))
        return torch.cat([*outputs, last], dim=1)


class SqueezeExcitation(nn.Module):
    """A gate in (0, 1) for every channel, from the utterance's mean."""

    def __init__(self, channels: int, bottleneck: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, bottleneck)
        self.excite = nn.Linear(bottleneck, channels)

    def forward(self, values: Tensor, padding: Tensor | None) -> Tensor:
        """`(n, channels, frames)` to `(n, channels, 1)`."""
        mean = mean_over_time(values, padding).squeeze(-1)
        return self.excite(F.relu(self.squeeze(mean))).sigmoid()[..., None]


class SERes2Block(nn.Module):
    """Two 1x1 convolutions around a Res2 one, gated and added to the input."""

    def __init__(self, channels: int, dilation: int, bottleneck: int) -> None:
        super().__init__()
        self.enter = ConvReluNorm(channels, channels)
        self.res2 = Res2(channels, dilation)
        self.leave = ConvReluNorm(channels, channels)
        self.gate = SqueezeExcitation(channels, bottleneck)

    def forward(self, values: Tensor, padding: Tensor | None) -> Tensor:
        """`(n, channels, frames)` to the same shape."""
        inner = self.leave(self.res2(self.enter(values), padding))
        return torch.addcmul(values, inner, self.gate(inner, padding))


class AttentiveStatistics(nn.Module):
    """Mean and standard deviation over time, weighted per channel by an attention that sees the whole utterance.

    The attention's first layer is one matrix on [frame; mean; std]. Mean and std are the same for all frames, so their
    share of the product is computed once per utterance.
    """

    def __init__(self, channels: int, bottleneck: int) -> None:
        super().__init__()
        self.channels = channels
        self.hidden = nn.Conv1d(3 * channels, bottleneck, 1)
        self.logits = nn.Conv1d(bottleneck, channels, 1)

    def forward(self, values: Tensor, padding: Tensor | None) -> Tensor:
        """`(n, channels, frames)` to `(n, 2 * channels)` in float32: means, then standard deviations."""
        exact = values.float()
        mean = mean_over_time(exact, padding)
        centred = exact - mean
        squares = centred * centred  # `square` is slower in the backward pass
        context = torch.cat([mean, _deviation(mean_over_time(squares, padding))], dim=1)

        per_frame, per_utterance = self.hidden.weight.split([self.channels, 2 * self.channels], dim=1)
        hidden = F.conv1d(values, per_frame) + F.conv1d(context, per_utterance, self.hidden.bias)
        logits = self.logits(hidden.tanh()).float()
        if padding is not None:
            logits = logits.masked_fill(padding, -torch.inf)
        weights = logits.softmax(-1)

        shift = (weights * centred).sum(-1, keepdim=True)
        variance = (weights * squares).sum(-1, keepdim=True) - shift.square()
        return torch.cat([mean + shift, _deviation(variance)], dim=1).squeeze(-1)


def _deviation(variance: Tensor) -> Tensor:
    return variance.clamp(min=MIN_VARIANCE).sqrt()


class ECAPATDNN(nn.Module):
    """ECAPA-TDNN of a given width: 6.19 M parameters with 512 channels, 14.66 M with 1024.

    Args:
        mels: bands of the features.
        channels: C, a multiple of 16. Below 512 the other widths shrink with it.
        embedding_dim: length of an embedding.

    Source: Desplanques et al. 2020, arXiv 2005.07143.
    """

    def __init__(self, mels: int = 80, channels: int = 512, embedding_dim: int = 192) -> None:
        super().__init__()
        bottleneck = min(128, channels // 4)
        aggregated = min(1536, 3 * channels)
        self.stem = ConvReluNorm(mels, channels, kernel=5)
        self.blocks = nn.ModuleList(SERes2Block(channels, dilation, bottleneck) for dilation in DILATIONS)
        self.aggregate = nn.Conv1d(len(DILATIONS) * channels, aggregated, 1)
        self.pool = AttentiveStatistics(aggregated, bottleneck)
        self.norm = BatchNorm1d(2 * aggregated)
        self.embedding = nn.Linear(2 * aggregated, embedding_dim)

    def forward(self, fbank: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Embeddings `(n, embedding_dim)`, not normalised.

        Args:
            fbank: `(n, mels, frames)`, mean-normalised.
            lengths: `(n,)` frames of each utterance; None: all are full. Lengths are for inference: in training mode
                BatchNorm's statistics would see the padding.
        """
        padding = None if lengths is None else frame_padding(lengths, fbank.shape[-1])
        values = self.stem(fbank, padding)
        outputs = []
        for block in self.blocks:
            values = block(values, padding)
            outputs.append(values)
        frames = F.relu(self.aggregate(torch.cat(outputs, dim=1)), inplace=True)
        return self.embedding(self.norm(self.pool(frames, padding)))
