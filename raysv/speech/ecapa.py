"""ECAPA-TDNN: features in, one embedding per utterance out.

Zero-padded and without BatchNorm in the attention, like the field's common 6.19 M and 14.66 M parameter models. Where
lengths are given, frames beyond an utterance's end have no influence on its embedding.

Between the layers frames are images of height 1, `(n, channels, 1, frames)`: of images alone PyTorch knows the memory
layout in which a CPU's convolutions compute, a frame's channels side by side. In the usual one they would turn every
tensor round and back.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from raysv.distributed import BatchNorm1d
from raysv.precision import at_least_float32
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
        """`(n, inputs, 1, frames)` to `(n, outputs, 1, frames)`; frames marked in `padding` are read as zeros."""
        if padding is not None:
            values = values.masked_fill(padding, 0)
        return self.norm(F.relu(convolve(self.conv, values), inplace=True))


def convolve(conv: nn.Conv1d, values: Tensor) -> Tensor:
    """What the layer makes of `(n, channels, 1, frames)`, in the memory layout of the values."""
    padding, dilation = (0, *conv.padding), (1, *conv.dilation)
    return F.conv2d(values, conv.weight[:, :, None], conv.bias, padding=padding, dilation=dilation)


class Res2(nn.Module):
    """Groups of channels, each convolved after the output of the group before was added; the last one passes.

    Source: Gao et al. 2019, arXiv 1904.01169.
    """

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        width = channels // SCALE
        self.layers = nn.ModuleList(ConvReluNorm(width, width, kernel=3, dilation=dilation) for _ in range(SCALE - 1))

    def forward(self, values: Tensor, padding: Tensor | None) -> Tensor:
        """`(n, channels, 1, frames)` to the same shape."""
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
        """`(n, channels, ..., frames)` to `(n, channels, ..., 1)`."""
        mean = mean_over_time(values, padding)
        return self.excite(F.relu(self.squeeze(mean.flatten(1)))).sigmoid().view_as(mean)


class SERes2Block(nn.Module):
    """Two 1x1 convolutions around a Res2 one, gated and added to the input."""

    def __init__(self, channels: int, dilation: int, bottleneck: int) -> None:
        super().__init__()
        self.enter = ConvReluNorm(channels, channels)
        self.res2 = Res2(channels, dilation)
        self.leave = ConvReluNorm(channels, channels)
        self.gate = SqueezeExcitation(channels, bottleneck)

    def forward(self, values: Tensor, padding: Tensor | None) -> Tensor:
        """`(n, channels, 1, frames)` to the same shape."""
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
        """`(n, channels, frames)` to `(n, 2 * channels)`, at least float32: means, then standard deviations."""
        centred, mean, deviation = _Moments.apply(values, padding)
        context = torch.cat([mean, deviation], dim=1)

        per_frame, per_utterance = self.hidden.weight.split([self.channels, 2 * self.channels], dim=1)
        shared = F.conv1d(context, per_utterance, self.hidden.bias)
        hidden = F.conv2d(values[:, :, None], per_frame[:, :, None]) + shared[..., None]
        logits = convolve(self.logits, hidden.tanh()).squeeze(2)
        if padding is not None:
            logits = logits.masked_fill(padding, -torch.inf)
        shift, deviation = _WeightedMoments.apply(centred, logits)
        return torch.cat([mean + shift, deviation], dim=1).squeeze(-1)


class _Moments(torch.autograd.Function):
    """Values less their mean over time, the mean, and the standard deviation, in float32 or float64.

    With the gradient written out, here and below, because autograd's goes through the largest tensors of the network
    twice as often: a tenth of a training step on a CPU.
    """

    @staticmethod
    def forward(context: Any, values: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        precise = at_least_float32(values)
        mean = mean_over_time(precise, padding)
        centred = precise - mean
        if padding is not None:
            centred = centred.masked_fill(padding, 0)
        variance = mean_over_time(centred * centred, padding)
        deviation = _deviation(variance)
        context.save_for_backward(centred, variance, deviation, padding)
        context.dtype = values.dtype
        return centred, mean, deviation

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        centred, variance, deviation, padding = context.saved_tensors
        for_centred, for_mean, for_deviation = gradients
        frames = centred.shape[-1] if padding is None else (~padding).sum(-1, keepdim=True)
        slope = torch.where(variance > MIN_VARIANCE, for_deviation / deviation, 0) / frames
        shared = (for_mean - for_centred.sum(-1, keepdim=True)) / frames
        for_values = torch.addcmul(for_centred, centred, slope).add_(shared)
        if padding is not None:
            for_values = for_values.masked_fill(padding, 0)
        return for_values.to(context.dtype), None


class _WeightedMoments(torch.autograd.Function):
    """Mean and standard deviation over time under the weights softmax(logits), in float32 or float64."""

    @staticmethod
    def forward(context: Any, values: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        weights = (at_least_float32(logits) - logits.amax(-1, keepdim=True)).exp_()  # not yet of sum 1
        total = weights.sum(-1, keepdim=True)
        weighted = weights * values
        mean = weighted.sum(-1, keepdim=True) / total
        variance = weighted.mul_(values).sum(-1, keepdim=True) / total - mean.square()
        deviation = _deviation(variance)
        context.save_for_backward(values, weights, total, mean, variance, deviation)
        context.dtype = logits.dtype
        return mean, deviation

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        values, weights, total, mean, variance, deviation = context.saved_tensors
        for_mean, for_deviation = gradients[0] / total, gradients[1] / total
        slope = torch.where(variance > MIN_VARIANCE, for_deviation / deviation, 0)
        offset = for_mean - slope * mean
        for_values = torch.addcmul(offset, values, slope).mul_(weights)
        # the softmax takes from each frame's share the weighted mean of all, which the moments give
        average = for_mean * mean + slope / 2 * (variance - mean.square())
        for_logits = torch.addcmul(offset, values, slope / 2).mul_(values).sub_(average).mul_(weights)
        return for_values, for_logits.to(context.dtype)


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
        padding = None if lengths is None else frame_padding(lengths, fbank.shape[-1])[:, :, None]
        layout = torch.channels_last if fbank.device.type == "cpu" else torch.contiguous_format
        values = self.stem(fbank[:, :, None].contiguous(memory_format=layout), padding)
        outputs = []
        for block in self.blocks:
            values = block(values, padding)
            outputs.append(values)
        frames = F.relu(convolve(self.aggregate, torch.cat(outputs, dim=1)), inplace=True)
        pooled = self.pool(frames.squeeze(2), None if padding is None else padding.squeeze(2))
        return self.embedding(self.norm(pooled))
