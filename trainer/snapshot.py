"""A copy of what a forward pass changes besides gradients, to repeat or skip a step."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .reproducibility import generator_states, set_generator_states


class Snapshot:
    """A copy of the buffers of a model and of the states of the global generators (Python, NumPy, torch).

    Args:
        model: The model whose buffers, such as BatchNorm statistics, are copied.
        device: Device whose generator is saved besides those of the CPU; None saves no generators.
    """

    def __init__(self, model: nn.Module, device: torch.device | None = None) -> None:
        self._model = model
        self._buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
        self._device = device
        self._generators = None if device is None else generator_states(device)

    def restore(self) -> None:
        self.restore_buffers()
        if self._generators is not None and self._device is not None:
            set_generator_states(self._generators, self._device)

    @torch.no_grad()
    def restore_buffers(self) -> None:
        """Restore the buffers; a buffer whose shape or dtype has changed is replaced."""
        for owner, name, buffer, saved in self._pairs():
            if buffer is not None and _has_same_form(buffer, saved):
                buffer.copy_(saved)
            else:
                setattr(owner, name, saved.clone())

    @torch.no_grad()
    def restore_buffers_where(self, flag: Tensor) -> bool:
        """Restore the buffers on the device if the scalar tensor `flag` is not 0.

        Returns:
            False if shapes or dtypes have changed, so that only the host can restore them.
        """
        pairs = [(buffer, saved) for _, _, buffer, saved in self._pairs() if buffer is not None]
        if len(pairs) < len(self._buffers) or not all(_has_same_form(*pair) for pair in pairs):
            return False
        for buffer, saved in pairs:
            torch.where(flag.to(buffer.device, non_blocking=True) != 0, saved, buffer, out=buffer)
        return True

    def _pairs(self) -> Iterator[tuple[nn.Module, str, Tensor | None, Tensor]]:
        """Module, name, current buffer and saved buffer; a forward may have replaced or deleted the buffer."""
        for path, saved in self._buffers.items():
            module, _, name = path.rpartition(".")
            owner = self._model.get_submodule(module)
            yield owner, name, getattr(owner, name, None), saved


def _has_same_form(buffer: Tensor, saved: Tensor) -> bool:
    return buffer.shape == saved.shape and buffer.dtype == saved.dtype
