"""Downsampling layers with a low-pass filter (Zhang 2019, arXiv:1904.11486)."""

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def blur_2d(input: Tensor, stride: int | tuple[int, int] = 1) -> Tensor:
    """Filter each channel with the binomial filter ``[1, 2, 1] / 4`` along H and W (Zhang 2019, section 3.2).

    Args:
        input: ``(N, C, H, W)``; beyond its border it is taken as 0.
        stride: Of the outputs.

    Returns:
        ``(N, C, H, W)`` with a stride of 1, otherwise every `stride`-th row and column of that, from the first on.
    """
    return _blur(input, binomial_filter().to(input), stride)


def binomial_filter() -> Tensor:
    """The outer product of ``[1, 2, 1] / 4`` with itself, ``(1, 1, 3, 3)``."""
    row = torch.tensor([1.0, 2.0, 1.0]) / 4
    return torch.outer(row, row)[None, None]


class BlurConv2d(nn.Conv2d):
    """A strided convolution that filters its input, or its output before it is downsampled.

    A `Conv2d` is converted by assigning this class, so that the object, its parameters and their names stay the same.
    The filter is one more entry of the ``state_dict``, so that the weights do not load into a plain network, which
    computes something else.
    """

    blur_filter: Tensor
    blur_first: bool

    @staticmethod
    def convert(conv: nn.Conv2d, blur_first: bool) -> None:
        """Convert a convolution in place.

        Args:
            conv: Not of a subclass.
            blur_first: Whether the filter comes before the convolution. Otherwise the convolution computes all pixels,
                which are filtered as they are downsampled, as in the paper.
        """
        conv.__class__ = BlurConv2d
        assert isinstance(conv, BlurConv2d)
        conv.blur_first = blur_first
        _add_filter(conv, binomial_filter().to(conv.weight))

    def forward(self, input: Tensor) -> Tensor:
        """Convolve and blur, ``(N, C, H, W)``."""
        if self.blur_first:
            return super().forward(_blur(input, self.blur_filter, 1))
        whole = F.conv2d(input, self.weight, self.bias, 1, self.padding, self.dilation, self.groups)
        stride = (self.stride[0], self.stride[1])
        return _blur(whole, self.blur_filter, stride)

    def extra_repr(self) -> str:
        """The settings."""
        return f"{super().extra_repr()}, blur_first={self.blur_first}"


class BlurMaxPool2d(nn.MaxPool2d):
    """A strided max-pooling that computes the maxima at all pixels, and filters them as it downsamples.

    A `MaxPool2d` is converted by assigning this class; the filter is an entry of the ``state_dict``.
    """

    blur_filter: Tensor

    @staticmethod
    def convert(pool: nn.MaxPool2d) -> None:
        """Convert a pooling in place: not of a subclass, without ``ceil_mode`` and ``return_indices``."""
        pool.__class__ = BlurMaxPool2d
        _add_filter(pool, binomial_filter())

    def forward(self, input: Tensor) -> Tensor:
        """Pool and blur, ``(N, C, H, W)``."""
        maxima = F.max_pool2d(input, self.kernel_size, 1, self.padding, self.dilation)
        return _blur(maxima, self.blur_filter, self.stride)


def _add_filter(layer: nn.Module, blur_filter: Tensor) -> None:
    layer.register_buffer("blur_filter", blur_filter)
    layer.register_load_state_dict_pre_hook(_add_to_weights)


def _add_to_weights(layer: nn.Module, weights: MutableMapping[str, Any], prefix: str, *_: Any) -> None:
    """Let weights of the plain network load."""
    weights.setdefault(f"{prefix}blur_filter", layer.blur_filter)


def _blur(input: Tensor, blur_filter: Tensor, stride: int | tuple[int, int]) -> Tensor:
    channels = input.shape[-3]
    weight = blur_filter.to(input.dtype).expand(channels, 1, 3, 3)
    return F.conv2d(input, weight, stride=stride, padding=1, groups=channels)
