"""Averages gradients over the ranks, unit by unit, so that what sat out costs no communication."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .group import explained, sum_over_ranks, world_size

_BUCKET_BYTES = 25 * 2**20  # of what belongs to no unit, as DistributedDataParallel has it


class GradientSynchronizer:
    """Averages the gradients of a model over all ranks, once per optimizer step.

    Parameters are reduced in units. While the last backward of a step runs, a unit is reduced as soon
    as all its gradients are there; what is not complete then follows at the end. A parameter without
    a gradient on any rank is neither searched for nor sent, and its gradient stays None.

    Args:
        parameters: All parameters that train.
        units: Parameters that get their gradients together or not at all, such as those of a residual
            block that may be dropped. What is in none of them is reduced in buckets of 25 MiB.
        ranks_may_differ: Whether a parameter may have a gradient on one rank and none on another. The
            ranks then first tell each other, and missing gradients count as zeros.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        units: Sequence[Sequence[nn.Parameter]] = (),
        *,
        ranks_may_differ: bool = False,
    ) -> None:
        parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._units = [*_of_one_kind(units), *_of_one_kind(_buckets(parameters, units))]
        self._unit_of = {parameter: number for number, unit in enumerate(self._units) for parameter in unit}
        self._ranks_may_differ = ranks_may_differ
        self._missing: Counter[int] = Counter()  # by unit, while the last backward runs
        self._is_last_backward = False
        self._sent: dict[int, tuple[list[Tensor], Tensor, Any]] = {}
        self._hooks = [parameter.register_post_accumulate_grad_hook(self._count) for parameter in parameters]

    def begin_step(self) -> None:
        """Say that a step begins: nothing is sent before its last backward."""

    def begin_last_backward(self) -> None:
        """Say that the gradients of a step will be complete after the backward that comes next."""
        self._is_last_backward = not self._ranks_may_differ
        self._missing = Counter({number: len(unit) for number, unit in enumerate(self._units)})

    def fingerprint(self) -> int:
        """A hash of which parameters have gradients, if all ranks must have the same; otherwise 0."""
        if self._ranks_may_differ:
            return 0
        return hash(tuple(parameter.grad is None for parameter in self._unit_of)) % 2**52  # a float holds it exactly

    def finish(self) -> None:
        """Wait until all gradients of the step are averaged.

        Raises:
            RankLostError: If another rank does not answer.
        """
        self._is_last_backward = False
        if self._ranks_may_differ:
            self._fill_missing()
        with explained():
            for number in range(len(self._units)):
                if number not in self._sent:
                    self._send(number)
            for gradients, flat, work in self._sent.values():
                work.wait()
                for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                    gradient.copy_(mean.view_as(gradient))
        self._sent.clear()

    def close(self) -> None:
        """Let go of the parameters."""
        for hook in self._hooks:
            hook.remove()

    def _count(self, parameter: nn.Parameter) -> None:
        if not self._is_last_backward:
            return
        number = self._unit_of[parameter]
        if number in self._sent:
            raise RuntimeError(
                f"a parameter of shape {tuple(parameter.shape)} got a second gradient in one backward, after the first "
                "was sent to the other ranks; checkpoint with use_reentrant=False where parameters are shared"
            )
        self._missing[number] -= 1
        if self._missing[number] == 0:
            self._send(number)

    @torch.no_grad()
    def _send(self, number: int) -> None:
        gradients = [parameter.grad for parameter in self._units[number] if parameter.grad is not None]
        if not gradients:
            return
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients]).div_(world_size())
        self._sent[number] = gradients, flat, dist.all_reduce(flat, async_op=True)

    def _fill_missing(self) -> None:
        """Give zeros to the parameters that have a gradient on some other rank only."""
        parameters = list(self._unit_of)
        counts = sum_over_ranks([parameter.grad is not None for parameter in parameters])
        for parameter, count in zip(parameters, counts, strict=True):
            if count and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)


def _buckets(parameters: Sequence[nn.Parameter], units: Sequence[Sequence[nn.Parameter]]) -> list[list[nn.Parameter]]:
    """What belongs to no unit, last parameters first, as their gradients come first."""
    in_units = {parameter for unit in units for parameter in unit}
    buckets: list[list[nn.Parameter]] = [[]]
    num_bytes = 0
    for parameter in reversed([parameter for parameter in parameters if parameter not in in_units]):
        buckets[-1].append(parameter)
        num_bytes += parameter.nbytes
        if num_bytes >= _BUCKET_BYTES:
            buckets.append([])
            num_bytes = 0
    return buckets


def _of_one_kind(units: Iterable[Sequence[nn.Parameter]]) -> list[list[nn.Parameter]]:
    """The same units, divided where number formats or devices differ, without what does not train."""
    divided: list[list[nn.Parameter]] = []
    for unit in units:
        kinds: dict[Any, list[nn.Parameter]] = {}
        for parameter in unit:
            if parameter.requires_grad:
                kinds.setdefault((parameter.dtype, parameter.device), []).append(parameter)
        divided += kinds.values()
    return divided
