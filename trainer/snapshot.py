"""What a forward pass changes besides gradients, kept so that a step can be repeated or left out."""

import torch
from torch import nn

from .reproducibility import generator_states, set_generator_states


class Snapshot:
    """The buffers of a model and the global generators (python, numpy, torch), as they were when it was made.

    Args:
        model: Its buffers, such as the running statistics of BatchNorm, are copied.
        device: Whose generator is kept, besides those of the CPU.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model = model
        self._buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        self._device = device
        self._generators = generator_states(device)

    def restore(self) -> None:
        """Put buffers and generators back."""
        self.restore_buffers()
        set_generator_states(self._generators, self._device)

    @torch.no_grad()
    def restore_buffers(self) -> None:
        """Put the buffers back."""
        for name, buffer in self._model.named_buffers():  # by name: a forward may have put others in their place
            buffer.copy_(self._buffers[name])
