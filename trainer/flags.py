"""Flags of a step, such as whether its loss is finite: computed on the device, reduced over ranks, read later."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import distributed
from .torch_internals import flag_nonfinite


class StepFlags(NamedTuple):
    """The flags of a step, the same on all ranks.

    Args:
        loss: Mean over the rows of all ranks, on the device.
        found_nonfinite: float32 scalar on the device: 1 if the update must be skipped, because loss or gradients of
            a rank are not finite or the fingerprints of the ranks differ, else 0.
        copy: Asynchronous copy of the reduced flags on the host.
        arrival: Event recorded after the copy; None if there is nothing to wait for.
        second: Flags of the second passes of a step that had some.
    """

    loss: Tensor
    found_nonfinite: Tensor
    copy: Tensor
    arrival: torch.Event | None
    second: "StepFlags | None" = None

    def followed_by(self, second: "StepFlags") -> "StepFlags":
        """The flags of a step whose gradients were computed again: its loss is that of the first passes."""
        return self._replace(found_nonfinite=torch.maximum(self.found_nonfinite, second.found_nonfinite), second=second)

    def read(self) -> "KnownFlags":
        """Wait until the flags are on the host."""
        known = self._read_first()
        return known if self.second is None else known.merge(self.second.read())

    def _read_first(self) -> "KnownFlags":
        if self.arrival is not None:
            self.arrival.synchronize()
        values = self.copy.tolist()
        if isinstance(values, float):  # single process
            return _NONFINITE if values > 0 else _FINITE
        _, num_nonfinite, num_interrupted, *fingerprints = values
        by_rank = [
            tuple(fingerprints[first : first + _NUM_PRINTS]) for first in range(0, len(fingerprints), _NUM_PRINTS)
        ]
        return KnownFlags(num_nonfinite > 0, num_interrupted > 0, by_rank)


class KnownFlags(NamedTuple):
    """The flags of a step on the host.

    Args:
        is_nonfinite: Whether loss or gradients of any rank are not finite.
        is_interrupted: Whether any rank was asked to stop.
        fingerprints: For each rank, hashes of the parameters that require a gradient, of those that have one, and of
            the indices of the batch.
    """

    is_nonfinite: bool
    is_interrupted: bool = False
    fingerprints: Sequence[tuple[float, ...]] = ()

    def merge(self, other: "KnownFlags") -> "KnownFlags":
        """The flags of both passes of a step."""
        return KnownFlags(
            self.is_nonfinite or other.is_nonfinite,
            self.is_interrupted or other.is_interrupted,
            [first + second for first, second in zip(self.fingerprints, other.fingerprints, strict=True)],
        )

    def check_same(self, step: int) -> None:
        """Raise a RuntimeError if the fingerprints of the ranks differ."""
        for number, prints in enumerate(zip(*self.fingerprints, strict=True)):
            what = _MUST_BE_SAME[number % _NUM_PRINTS]
            if others := [rank for rank, value in enumerate(prints) if value != prints[0]]:
                raise RuntimeError(what.format(others=f"ranks {others}", step=step))


_FINITE, _NONFINITE = KnownFlags(False), KnownFlags(True)  # single process
_MUST_BE_SAME = (
    "all ranks must train the same parameters, but those that require a gradient on {others} are not those of rank 0 "
    "in step {step}",
    "all ranks must use the same parameters in a step, but those of {others} with gradients are not those of rank 0 "
    "in step {step}; a model whose branches depend on the data needs find_unused_parameters=True",
    "all ranks must list the same batches, but those of {others} are not those of rank 0 in step {step}; a sampler "
    "must give the same indices on every rank, so seed its generator",
)
_NUM_PRINTS = len(_MUST_BE_SAME)


def flag_step(loss: Tensor, gradients: Iterable[Tensor]) -> StepFlags:
    """Compute the flags in a single process.

    Args:
        loss: Mean over the batch, detached.
        gradients: Gradients that must be finite.
    """
    found = find_nonfinite([loss, *gradients])
    if found.device.type == "cpu":
        return StepFlags(loss, found, found, None)
    return StepFlags(loss, found, *_send_to_host(found))


def flag_step_over_ranks(
    loss: Tensor, gradients: Iterable[Tensor], *, share: float, is_interrupted: bool, fingerprints: Sequence[int]
) -> StepFlags:
    """Compute the flags and reduce them over ranks, with the same backend as the gradients.

    Args:
        loss: Mean over the rows of this rank, detached.
        gradients: Gradients that must be finite.
        share: Fraction of the rows of the batch on this rank.
        is_interrupted: Whether this rank was asked to stop.
        fingerprints: Hashes that must be the same on all ranks, as in `KnownFlags`.

    Raises:
        RankLostError: If another rank does not respond.
    """
    first = 3 + distributed.rank() * _NUM_PRINTS
    values = [0.0] * (3 + distributed.world_size() * _NUM_PRINTS)
    values[2], values[first : first + _NUM_PRINTS] = float(is_interrupted), map(float, fingerprints)
    flags = torch.tensor(values, dtype=torch.float64, pin_memory=loss.device.type == "cuda")
    flags = flags.to(loss.device, non_blocking=True)
    flags[0] = loss * share
    flags[1] = find_nonfinite([loss, *gradients])
    with distributed.translate_errors():
        dist.all_reduce(flags)
    prints = flags[3:].view(-1, _NUM_PRINTS)
    found = ((flags[1] > 0) | (prints != prints[0]).any()).float()
    return StepFlags(flags[0], found, *_send_to_host(flags))


def find_nonfinite(tensors: list[Tensor]) -> Tensor:
    """A float32 scalar tensor on the device of the first tensor: 1 if any value is not finite, else 0.

    Uses the fused kernel of GradScaler, which also multiplies the tensors in place, here by 1.
    """
    dtype, device = tensors[0].dtype, tensors[0].device
    for tensor in tensors:
        if type(tensor) is not Tensor or tensor.dtype is not dtype or tensor.is_sparse or tensor.device != device:
            return _find_in_many_kinds(tensors)
    return _find_in_one_kind(tensors, device)


def _find_in_many_kinds(tensors: list[Tensor]) -> Tensor:
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in map(_dense_values, tensors):
        kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    found = [_find_in_one_kind(same, device) for (device, _), same in kinds.items()]
    if len(found) == 1:
        return found[0]
    return torch.stack([flag.to(found[0].device, non_blocking=True) for flag in found]).amax(0)


def _find_in_one_kind(tensors: list[Tensor], device: torch.device) -> Tensor:
    if device not in _constants:
        _constants[device] = torch.zeros((), device=device), torch.ones((), device=device)
    zero, one = _constants[device]
    found = zero.clone()
    flag_nonfinite(tensors, found, one)
    return found


_constants: dict[torch.device, tuple[Tensor, Tensor]] = {}  # cached: creating a tensor is slower than a copy


def _dense_values(tensor: Tensor) -> Tensor:
    if hasattr(tensor, "to_local"):  # a shard
        tensor = tensor.to_local()
    if tensor.layout is not torch.strided:
        tensor = tensor.coalesce().values()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _send_to_host(flags: Tensor) -> tuple[Tensor, torch.Event | None]:
    """Start the copy to the host. Returns it with an event that is recorded after it."""
    if flags.device.type == "cpu":
        return flags, None
    copy = flags.to("cpu", non_blocking=True)
    arrival = torch.Event(flags.device)
    arrival.record()
    return copy, arrival
