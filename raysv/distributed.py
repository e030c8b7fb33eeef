"""Several workers as one: rank, shard, gather, BatchNorm. Each does nothing more than it must for a lone worker.

Every worker computes the loss of the whole global batch from gathered tensors. The backward pass of `gather` adds up
what all workers' copies of that loss ask of a tensor, and DDP then takes the mean over workers: together exactly the
gradient of one worker with the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from raysv.precision import at_least_float32

T = TypeVar("T")


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


def gather(rows: Tensor, total: int) -> Tensor:
    """All workers' rows in rank order, `(total, ...)`; gradients flow back to every worker's own.

    Every worker brings its `shard(total)`, so all know how many rows the others have and exchange nothing else.

    Raises: ValueError when this worker's rows are not as many as its share.
    """
    share = shard(total)
    if len(rows) != share.stop - share.start:
        raise ValueError(
            f"Worker {rank()} of {world_size()} has {len(rows)} rows to gather, but its share of {total} is "
            f"{share.stop - share.start}. Take the rows of shard(total), with the same total for every worker."
        )
    return rows if world_size() == 1 else _Gather.apply(rows, total)


def agree(value: T) -> T:
    """The first worker's value, on every worker; for what a worker saw outside, such as files."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def together(work: Callable[[], T], look: float = 1.0) -> T:
    """Do something that takes one worker far longer than another; returns when all are done.

    A worker that waits in a collective gives up after minutes, and takes the others with it; here it may be hours.

    Args:
        look: seconds between two looks at how the others are doing.
    """
    if world_size() == 1:
        return work()
    with ThreadPoolExecutor(1) as pool:
        mine = pool.submit(work)
        done = [False] * world_size()
        while not all(done):
            wait([mine], look)
            dist.all_gather_object(done, mine.done())
        return mine.result()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, rows: Tensor, total: int) -> Tensor:
        context.share = shard(total)
        longer = total % world_size()  # workers with one row more than the others, who fill up
        fill = 1 if longer and rank() >= longer else 0
        shares = _from_everyone(torch.cat([rows, rows.new_zeros((fill, *rows.shape[1:]))]) if fill else rows)
        if not longer:
            return shares.flatten(0, 1)
        return torch.cat([shares[:longer].flatten(0, 1), shares[longer:, :-1].flatten(0, 1)])

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        summed = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        return summed[context.share], None


def _from_everyone(tensor: Tensor) -> Tensor:
    """Every worker's tensor, all of one shape, as `(workers, ...)`."""
    everyone = tensor.new_empty((world_size(), *tensor.shape))
    dist.all_gather_into_tensor(everyone.flatten(0, 1), tensor.contiguous())  # gloo wants them joined
    return everyone


class BatchNorm1d(nn.BatchNorm1d):
    """BatchNorm over the batches of all workers together, on CPU and GPU; alone, PyTorch's own.

    Takes `(batch, channels)`, `(batch, channels, time)` or `(batch, channels, 1, time)`; the workers' batches may
    differ in size, or be empty. As in PyTorch, the biased variance of the global batch normalises and the unbiased one
    goes into the running statistics.
    PyTorch's SyncBatchNorm needs a GPU, hence this one.
    """

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002
        """Images of height 1 are welcome too: of them alone PyTorch knows more than one memory layout."""

    def forward(self, values: Tensor) -> Tensor:
        """Normalise each channel by the statistics of the global batch (training) or by the running ones (eval)."""
        if not self.training or world_size() == 1:
            return super().forward(values)
        normalised, mean, unbiased_variance = _Normalise.apply(values, self.weight, self.bias, self.eps)
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(unbiased_variance, self.momentum)
        self.num_batches_tracked.add_(1)
        return normalised


class _Normalise(torch.autograd.Function):
    """BatchNorm with one exchange forward and one backward; also returns the statistics, for the running ones.

    The workers' means and sums of squared deviations are merged as moments about zero, in float64, where these do not
    cancel. NCCL adds them up in a number of hops that grows with the logarithm of the workers; to gather everyone's
    would take as many hops as there are workers. With x̂ the normalised values and ⟨·⟩ the mean over the global batch,
    the gradient is weight/σ · (g − ⟨g⟩ − x̂⟨g·x̂⟩).
    """

    @staticmethod
    def forward(
        context: Any, values: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        axes = [axis for axis in range(values.dim()) if axis != 1]
        precise = at_least_float32(values)
        count = values.numel() // values.shape[1]
        local_mean = precise.sum(axes) / max(count, 1)
        local_squares = (precise - _per_channel(local_mean, precise)).square().sum(axes)
        first, second = local_mean.double() * count, local_mean.double().square() * count + local_squares
        sums = torch.cat([first, second, first.new_full((1,), count)])
        dist.all_reduce(sums)

        total = sums[-1]
        mean, second = (sums[:-1] / total).chunk(2)
        variance = (second - mean.square()).clamp(min=0)
        unbiased_variance = (variance * total / (total - 1).clamp(min=1)).to(local_mean.dtype)
        inverse = torch.rsqrt(variance + eps).to(local_mean.dtype)
        mean, total = mean.to(local_mean.dtype), total.to(local_mean.dtype)
        context.save_for_backward(values, weight, mean, inverse, total)
        context.mark_non_differentiable(mean, unbiased_variance)

        scale = weight * inverse
        shift = bias - mean * scale
        normalised = torch.addcmul(_per_channel(shift, precise), precise, _per_channel(scale, precise))
        return normalised.to(values.dtype), mean, unbiased_variance

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        values, weight, mean, inverse, total = context.saved_tensors
        gradient = at_least_float32(gradients[0])
        axes = [axis for axis in range(values.dim()) if axis != 1]
        whitened = (at_least_float32(values) - _per_channel(mean, values)) * _per_channel(inverse, values)
        for_bias = gradient.sum(axes)
        for_weight = (gradient * whitened).sum(axes)
        sums = torch.stack([for_bias, for_weight])
        dist.all_reduce(sums)
        shared_bias, shared_weight = (_per_channel(part, values) for part in sums / total)
        centred = gradient - torch.addcmul(shared_bias, whitened, shared_weight)
        for_values = centred * _per_channel(weight * inverse, values)
        return for_values.to(values.dtype), for_weight, for_bias, None


def _per_channel(vector: Tensor, like: Tensor) -> Tensor:
    return vector.view([1, -1] + [1] * (like.dim() - 2))


def wrap(module: nn.Module) -> nn.Module:
    """The module behind DDP where there is more than one worker."""
    return nn.parallel.DistributedDataParallel(module, broadcast_buffers=False) if world_size() > 1 else module
