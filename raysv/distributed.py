"""Several workers as one: rank, shard, gather, BatchNorm. Each does nothing more than it must for a lone worker.

Every worker computes the loss of the whole global batch from gathered tensors. The backward pass of `gather` adds up
what all workers' copies of that loss ask of a tensor, and DDP then takes the mean over workers: together exactly the
gradient of one worker with the whole batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def world_size() -> int:
    """Number of workers; 1 where no process group was started."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This worker's number, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def shard(total: int) -> slice:
    """This worker's contiguous share of `total` items; the first workers take one more where it does not divide."""
    whole, extra = divmod(total, world_size())
    start = rank() * whole + min(rank(), extra)
    return slice(start, start + whole + (rank() < extra))


def gather(rows: Tensor) -> Tensor:
    """All workers' rows `(n_r, ...)`, in rank order, as `(sum of n_r, ...)`; gradients flow back to every worker's own.

    The row counts may differ; everything else must agree.
    """
    return rows if world_size() == 1 else _Gather.apply(rows)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, rows: Tensor) -> Tensor:
        counts = torch.zeros(world_size(), dtype=torch.int64, device=rows.device)
        counts[rank()] = rows.shape[0]
        dist.all_reduce(counts)
        sizes = counts.tolist()
        context.start, context.length = sum(sizes[: rank()]), rows.shape[0]
        largest = max(sizes)
        padded = rows.new_zeros((largest, *rows.shape[1:]))
        padded[: rows.shape[0]] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total[context.start : context.start + context.length]


class BatchNorm1d(nn.BatchNorm1d):
    """BatchNorm over the batches of all workers together, on CPU and GPU; alone, PyTorch's own.

    Takes `(batch, channels)` or `(batch, channels, time)`. PyTorch's SyncBatchNorm needs a GPU, hence this one. The
    workers' means and variances are merged by the parallel formula of Chan et al. 1979, stable where sums of squares
    are not.
    """

    def forward(self, values: Tensor) -> Tensor:
        """Normalise each channel by the statistics of the global batch (training) or by the running ones (eval)."""
        if not self.training or world_size() == 1:
            return super().forward(values)
        axes = [axis for axis in range(values.dim()) if axis != 1]
        count = values.numel() // values.shape[1]
        exact = values.float()
        local_variance, local_mean = torch.var_mean(exact, dim=axes, correction=0)
        counts = torch.full_like(local_mean, count)
        statistics = gather(torch.stack([local_mean, local_variance, counts])[None])
        means, variances, weights = statistics[:, 0], statistics[:, 1], statistics[:, 2].detach()
        total = weights.sum(0)
        mean = (weights * means).sum(0) / total
        variance = (weights * (variances + (means - mean).square())).sum(0) / total
        self._follow(mean.detach(), variance.detach() * total / (total - 1))
        return _normalise(exact, mean, variance, self.weight, self.bias, self.eps).to(values.dtype)

    def _follow(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(unbiased_variance, self.momentum)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)


def _normalise(values: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    shape = [1, -1] + [1] * (values.dim() - 2)
    scale = weight * torch.rsqrt(variance + eps)
    return torch.addcmul((bias - mean * scale).view(shape), values, scale.view(shape))


def average(value: float) -> float:
    """The mean over workers of a number that each of them has."""
    if world_size() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64)
    return float(gather(total[None]).mean())


def wrap(module: nn.Module) -> nn.Module:
    """The module behind DDP where there is more than one worker."""
    return nn.parallel.DistributedDataParallel(module, broadcast_buffers=False) if world_size() > 1 else module
