"""What ``model.loss`` returns: one tensor, or a tuple or dictionary of the parts of the loss."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import distributed


class LossParts:
    """Adds up the parts of a loss over microbatches or batches, on their device.

    The parts of a dictionary have the names of its keys, those of a tuple or list ``loss0``, ``loss1``, ... The loss
    to minimize is their sum, or the entry ``"total"`` of a dictionary that has one. A loss that is one tensor has no
    parts.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, loss: Any, num_samples: int) -> Tensor:
        """Add the parts of a loss, which is the mean over so many rows.

        Returns:
            The loss to minimize.

        Raises:
            ValueError: If it is not of tensors without dimensions.
        """
        if isinstance(loss, Tensor):
            return _check(loss)
        named = dict(loss) if isinstance(loss, Mapping) else _numbered(loss)
        parts = {str(name): _check(part, f"[{name!r}]") for name, part in named.items()}
        total = parts.pop("total", None)
        for name, part in parts.items():
            value = part.detach() * num_samples
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        return torch.stack(list(parts.values())).sum() if total is None else total

    def means_over_ranks(self, num_samples: int) -> dict[str, Tensor]:
        """The means over so many rows of all ranks, which must have the same parts. The host does not wait for them."""
        if not self.sums:
            return {}
        means = torch.stack(list(self.sums.values())) / num_samples
        if distributed.world_size() > 1:
            with distributed.translate_errors():
                dist.all_reduce(means)
        return {f"loss/train/{name}": mean for name, mean in zip(self.sums, means.unbind(), strict=True)}


def _numbered(loss: Any) -> dict[str, Any]:
    if not isinstance(loss, (tuple, list)) or not loss:
        _check(loss)
    return {f"loss{index}": part for index, part in enumerate(loss)}


def _check(loss: Any, place: str = "") -> Tensor:
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise ValueError(
            "model.loss must return a tensor without dimensions, the mean over the batch, or a tuple or dictionary of "
            f"them; got {what}{place and f' at {place}'}"
        )
    return loss
