"""BatchNorm over the rows of all ranks."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable

from ...engine import State
from ..torch_internals import BatchNormBase
from .declarations import find_difference_over_ranks
from .group import is_initialized, translate_errors


def convert_batchnorm(state: State) -> None:
    """Convert the BatchNorm layers of the model to compute their statistics over the rows of all ranks.

    They become torch's `SyncBatchNorm`, on CPUs `CPUSyncBatchNorm`, with the same parameters and buffers.
    In a single process the model is checked and left as it is.

    Raises:
        ValueError: If there is no BatchNorm, one of an unknown subclass, or ranks may compute different
            layers, as a rank would wait for the others in a layer that they skip. The model is then unchanged.
    """
    layers = {name: module for name, module in state.model.named_modules() if isinstance(module, BatchNormBase)}
    if not layers:
        raise ValueError(f"sync_batchnorm needs a model with BatchNorm to have an effect, got {state.model!r}")
    for name, layer in layers.items():
        if type(layer) not in _CONVERTIBLE:
            known = ", ".join(one.__name__ for one in _CONVERTIBLE)
            raise ValueError(
                f"sync_batchnorm knows {known}, not what a subclass adds; got {type(layer).__name__} at model.{name}"
            )
    if (source := find_difference_over_ranks(state)) is not None:
        raise ValueError(f"sync_batchnorm needs all ranks to compute the same layers, but {source} lets them differ")
    if state.world_size == 1:
        return
    nn.SyncBatchNorm.convert_sync_batchnorm(state.model)
    if state.device.type == "cpu":
        for module in state.model.modules():
            if type(module) is nn.SyncBatchNorm:
                module.__class__ = CPUSyncBatchNorm


class CPUSyncBatchNorm(nn.SyncBatchNorm):
    """torch's `SyncBatchNorm` for CPUs, where torch has none: two all-reduces forward and one backward.

    Ranks may have different numbers of rows; statistics are those of all rows together.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalize `input` of shape ``(N, C, ...)``; in evaluation by the running statistics, without communication.

        Raises:
            ValueError: If there is a single value per channel over all ranks.
            RankLostError: If another rank does not answer.
        """
        if not self.training or not is_initialized():
            return super().forward(input)
        if input.dim() < 2:
            raise ValueError(f"BatchNorm needs an input of at least 2 dimensions, got {input.dim()}")
        normalized, mean, variance, count = _NormalizeOverRanks.apply(input, self.eps)
        if self.track_running_stats:
            self._track(mean, variance * (count / (count - 1)))
        shape = _per_channel(input)
        if self.weight is not None:
            normalized = normalized * self.weight.view(shape)
        if self.bias is not None:
            normalized = normalized + self.bias.view(shape)
        return normalized.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        buffers: Any = self
        buffers.num_batches_tracked.add_(1)
        # With momentum=None, the running statistics are the plain mean over all batches.
        momentum = 1.0 / buffers.num_batches_tracked.item() if self.momentum is None else self.momentum
        buffers.running_mean.lerp_(mean.to(buffers.running_mean.dtype), momentum)
        buffers.running_var.lerp_(unbiased_variance.to(buffers.running_var.dtype), momentum)


_CONVERTIBLE = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, CPUSyncBatchNorm)


class _NormalizeOverRanks(Function):
    """Subtracts the mean and divides by the deviation of all ranks' rows (Ioffe & Szegedy 2015, algorithm 1)."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The normalised rows in float32 or more; mean, biased variance and number of values per channel."""
        input = input if input.dtype == torch.float64 else input.float()
        dims, shape = _all_but_channels(input), _per_channel(input)
        own_count = input.new_full((1,), input.numel() // input.size(1), dtype=torch.float64)
        *_, count = totals = _sum_over_ranks(torch.cat([input.sum(dims, dtype=torch.float64), own_count]))
        if count <= 1:
            raise ValueError(
                f"BatchNorm needs more than 1 value per channel in training, got {tuple(input.shape)} over all ranks"
            )
        mean = totals[:-1] / count
        centered = input - mean.to(input.dtype).view(shape)
        # From centered values: the mean of squares minus the squared mean cancels badly where means are large.
        variance = _sum_over_ranks(centered.square().sum(dims, dtype=torch.float64)) / count
        inverse_deviation = (variance + eps).rsqrt().to(input.dtype).view(shape)
        normalized = centered.mul_(inverse_deviation)
        ctx.save_for_backward(normalized, inverse_deviation, count)
        ctx.mark_non_differentiable(mean, variance, count)
        return normalized, mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        """The gradient of the sum of all ranks' losses, which the averaging of gradients divides by their number."""
        normalized, inverse_deviation, count = ctx.saved_tensors
        dims, shape = _all_but_channels(gradient), _per_channel(gradient)
        sums = torch.stack([gradient.sum(dims), (gradient * normalized).sum(dims)])
        means = (_sum_over_ranks(sums.double()) / count).to(gradient.dtype)
        centered = gradient - means[0].view(shape) - normalized * means[1].view(shape)
        return centered.mul_(inverse_deviation), None


def _sum_over_ranks(values: Tensor) -> Tensor:
    with translate_errors():
        dist.all_reduce(values)
    return values


def _all_but_channels(tensor: Tensor) -> list[int]:
    return [0, *range(2, tensor.dim())]


def _per_channel(tensor: Tensor) -> list[int]:
    return [1, -1, *[1] * (tensor.dim() - 2)]
