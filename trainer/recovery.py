"""What a forward pass changes besides gradients, kept so that a step can be repeated or left out."""

import torch
from torch import nn


class Snapshot:
    """The buffers of a model and torch's generators, as they were when it was made.

    Args:
        model: Its buffers, such as the running statistics of BatchNorm, are copied.
        device: Whose generator is kept, besides that of the CPU.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        self._device = device
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        """Put buffers and generators back."""
        self.restore_buffers()
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)

    @torch.no_grad()
    def restore_buffers(self) -> None:
        """Put the buffers back."""
        for buffer, value in self._buffers:
            buffer.copy_(value)
