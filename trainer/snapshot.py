"""What a forward pass changes besides gradients, kept so that a step can be repeated or skipped."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .reproducibility import generator_states, set_generator_states


class Snapshot:
    """The buffers of a model and the global generators (python, numpy, torch) at the moment it is made.

    Args:
        model: Its buffers, such as the running statistics of BatchNorm, are copied.
        device: Whose generator is kept, besides those of the CPU; None keeps no generators.
    """

    def __init__(self, model: nn.Module, device: torch.device | None = None) -> None:
        self._model = model
        self._buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
        self._device = device
        self._generators = None if device is None else generator_states(device)

    def restore(self) -> None:
        """Restore buffers and generators."""
        self.restore_buffers()
        if self._generators is not None and self._device is not None:
            set_generator_states(self._generators, self._device)

    @torch.no_grad()
    def restore_buffers(self) -> None:
        """Restore the buffers; one whose shape or dtype has changed is replaced."""
        for owner, name, buffer, saved in self._pairs():
            if buffer is not None and _has_same_form(buffer, saved):
                buffer.copy_(saved)
            else:
                setattr(owner, name, saved.clone())

    @torch.no_grad()
    def restore_buffers_where(self, flag: Tensor) -> bool:
        """Restore the buffers on the device if `flag` is not 0 there.

        Args:
            flag: Without dimensions.

        Returns:
            Whether that is done; it cannot be where shapes or dtypes have changed.
        """
        pairs = [(buffer, saved) for _, _, buffer, saved in self._pairs() if buffer is not None]
        if len(pairs) < len(self._buffers) or not all(_has_same_form(*pair) for pair in pairs):
            return False
        for buffer, saved in pairs:
            torch.where(flag.to(buffer.device, non_blocking=True) != 0, saved, buffer, out=buffer)
        return True

    def _pairs(self) -> Iterator[tuple[nn.Module, str, Tensor | None, Tensor]]:
        """The owner, the name, what the buffer is now and what it was; a forward may have replaced it."""
        for path, saved in self._buffers.items():
            module, _, name = path.rpartition(".")
            owner = self._model.get_submodule(module)
            yield owner, name, getattr(owner, name, None), saved


def _has_same_form(buffer: Tensor, saved: Tensor) -> bool:
    return buffer.shape == saved.shape and buffer.dtype == saved.dtype
