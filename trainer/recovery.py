"""What a forward pass changes besides gradients, kept so that a step can be repeated or left out."""

import random

import numpy as np
import torch
from torch import nn


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
        self._python = random.getstate()
        self._numpy = np.random.get_state()  # noqa: NPY002  # the global generator is what user code draws from
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        """Put buffers and generators back."""
        self.restore_buffers()
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)

    @torch.no_grad()
    def restore_buffers(self) -> None:
        """Put the buffers back."""
        for name, buffer in self._model.named_buffers():  # by name: a forward may have put others in their place
            buffer.copy_(self._buffers[name])
