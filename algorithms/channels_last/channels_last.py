"""Channels-last: the memory format in which convolutions are fastest on most devices."""

from dataclasses import dataclass
from itertools import chain

import torch
from torch import nn

from ...engine import Algorithm, Event, Logger, State


def apply_channels_last(model: nn.Module) -> nn.Module:
    """Store the weights of 2d convolutions with the channels as the innermost dimension.

    The activations follow: a convolution with such weights converts its input, and returns its output in this format.
    Values, shapes and the `Parameter` objects stay the same, so that optimizers and checkpoints fit as before.

    Args:
        model: Its parameters and buffers of four dimensions are converted, in place.

    Returns:
        `model` itself.

    Raises:
        ValueError: If there is none. A sharded parameter counts as none.
    """
    tensors = [tensor for tensor in chain(model.parameters(), model.buffers()) if tensor.dim() == 4]
    if not tensors:
        raise ValueError(f"model must have weights of four dimensions, as of Conv2d, {type(model).__name__} has none")
    for tensor in tensors:
        tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    return model


@dataclass(eq=False, repr=False)
class ChannelsLast(Algorithm):
    """Stores the weights of 2d convolutions in the memory format channels-last, see `apply_channels_last`.

    Applied at INIT. Not with ``parallelism="fsdp"``, which shards contiguous parameters only.

    Raises:
        ValueError: At INIT, if the model has no weights of four dimensions.
    """

    def match(self, event: Event, state: State) -> bool:
        """At INIT."""
        return event is Event.INIT

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Convert the model."""
        apply_channels_last(state.model)
