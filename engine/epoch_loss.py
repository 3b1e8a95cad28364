"""The mean loss of an epoch, added up without waiting for the device."""

from collections.abc import Sequence

import torch
from torch import Tensor

_MOST_KEPT = 256  # losses, before they become one tensor


class EpochLoss:
    """The mean of the loss over the samples of an epoch, without steps whose loss was not finite.

    The device is read when the mean or the sums are asked for.
    """

    def __init__(self) -> None:
        self._latest = torch.tensor(torch.nan)
        self._sums = (0.0, 0.0)
        self._chunks: list[Tensor] = []
        self._losses: list[Tensor] = []
        self._samples: list[int] = []

    def add(self, loss: Tensor, num_samples: int) -> None:
        """Add the mean loss of a batch, a tensor without dimensions."""
        self._latest = loss
        self._losses.append(loss)
        self._samples.append(num_samples)
        if len(self._losses) == _MOST_KEPT:
            self._join()

    @property
    def latest(self) -> Tensor:
        """The loss of the latest batch, on its device; NaN before the first."""
        return self._latest

    @property
    def mean(self) -> float | None:
        """The mean; None if no step had a finite loss."""
        total, count = self.sums
        return total / count if count > 0 else None

    @property
    def sums(self) -> tuple[float, float]:
        """The sum of the losses times their samples, and the number of samples."""
        self._join()
        if self._chunks:
            losses = torch.cat(self._chunks).cpu().double()
            samples = torch.tensor(self._samples, dtype=torch.float64)
            finite = losses.isfinite()
            total, count = self._sums
            self.sums = (total + float((losses * samples)[finite].sum()), count + float(samples[finite].sum()))
        return self._sums

    @sums.setter
    def sums(self, sums: Sequence[float]) -> None:
        total, count = sums
        self._sums = (float(total), float(count))
        self._chunks, self._losses, self._samples = [], [], []

    def reset(self) -> None:
        """Begin a new epoch."""
        self.sums = (0.0, 0.0)

    def _join(self) -> None:
        """Make one tensor of many, as each of them takes memory of its own."""
        if self._losses:
            self._chunks.append(torch.stack(self._losses))
            self._losses = []
