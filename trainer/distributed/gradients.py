"""Averages gradients over the ranks, unit by unit, so that a skipped unit costs no communication."""

import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..torch_internals import version_of
from .declarations import skippable_modules
from .group import RankLostError, copy_from_rank_zero, gather, sum_over_ranks, translate_errors, world_size

_BUCKET_BYTES = 25 * 2**20  # of the parameters in no unit, as in DistributedDataParallel


class GradientSynchronizer:
    """Averages the gradients of a model over all ranks, once per optimizer step.

    Which parameters require a gradient is looked up at the beginning of each step. They are reduced in units.
    While the last backward of a step runs, a unit is reduced as soon as all its gradients are there; the others
    follow in `finish`. A unit without any gradient is not sent, and its gradients stay None.

    The calls of a step are `begin_step`, `begin_last_backward`, `finish`, `adopt_changes` if `has_changed`, and
    `end_step`.

    Args:
        model: Its parameters are the same on all ranks.
        units: Returns the groups of parameters that get their gradients together or not at all, such as those of a
            residual block that may be dropped. All others are reduced in buckets of 25 MiB.
        ranks_may_differ: Whether a parameter may have a gradient on one rank and none on another. The
            ranks then exchange which they have, and missing gradients count as zeros.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Callable[[], Sequence[Sequence[nn.Parameter]]] = list,
        *,
        ranks_may_differ: bool = False,
    ) -> None:
        self._model, self._find_units, self._ranks_may_differ = model, units, ranks_may_differ
        self._known = set(model.parameters())  # all ranks have the same values for them
        self._names = self._find_trainable()
        self._key = self._find_key(self._names)
        self.has_changed = False
        self._missing: Counter[int] = Counter()  # by unit, while the last backward runs
        self._is_last_backward = False
        self._is_averaged = False
        self._sent: dict[int, tuple[list[nn.Parameter], Tensor, Any]] = {}
        self._hooks: list[Any] = []
        self._build()

    def begin_step(self) -> None:
        """Look up which parameters require a gradient.

        Raises:
            RuntimeError: If parameters were added that the ranks do not have alike.
        """
        self._is_averaged = False
        names = self._find_trainable()
        key = self._find_key(names)
        if key == self._key:
            return
        self._names, self._key, self.has_changed = names, key, True
        added = {name: parameter for parameter, name in names.items() if parameter not in self._known}
        if added:
            _copy_added(added)
            self._known.update(added.values())

    def begin_last_backward(self) -> None:
        """Announce that the gradients of the step will be complete after the next backward."""
        self._is_last_backward = not self._ranks_may_differ
        self._missing = Counter({number: len(unit) for number, unit in enumerate(self._units)})

    @contextmanager
    def refuse_edits(self) -> Iterator[None]:
        """Raise a RuntimeError if the body changes gradients, which are not averaged yet."""
        before = self._gradient_versions()
        yield
        if self._gradient_versions() != before:
            raise RuntimeError(
                "gradients must not be changed at AFTER_BACKWARD on several ranks before they are averaged, which is "
                'after the last microbatch, and with device_train_microbatch_size="auto" after that event; change '
                "them at AFTER_TRAIN_BATCH"
            )

    def fingerprints(self) -> tuple[int, int]:
        """Hashes, below 2**32, of which parameters require a gradient and of which have one.

        They must be the same on all ranks; the second is 0 where ranks may differ.
        """
        trainable = zlib.crc32(repr([(name, tuple(p.shape)) for p, name in self._names.items()]).encode())
        if self._ranks_may_differ:
            return trainable, 0
        return trainable, zlib.crc32(bytes(parameter.grad is None for parameter in self._names))

    def finish(self) -> None:
        """Wait until all gradients of the step are averaged.

        Raises:
            RankLostError: If another rank does not answer.
        """
        self._is_last_backward = False
        if self._ranks_may_differ:
            self._fill_missing(list(self._unit_of))
        with translate_errors():
            for number, unit in enumerate(self._units):
                if number not in self._sent and (number >= self._num_skippable or _have_gradient(unit)):
                    self._send(number, unit)
            self._receive()
        self._is_averaged = True

    def adopt_changes(self) -> None:
        """Average the gradients of parameters that require one since this step, and follow the change from here on.

        All ranks must call it together, so it comes after their fingerprints were compared.
        """
        added = [parameter for parameter in self._names if parameter not in self._unit_of]
        if self._ranks_may_differ:
            self._fill_missing(added)
        with translate_errors():
            for number, unit in enumerate(_of_one_kind([[p for p in added if p.grad is not None]])):
                self._send(number, unit)
            self._receive()
        self._build()
        self.has_changed = False

    def end_step(self) -> None:
        """Allow gradients that are not averaged, until the next step begins."""
        self._is_averaged = False

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _find_trainable(self) -> dict[nn.Parameter, str]:
        return {parameter: name for name, parameter in self._model.named_parameters() if parameter.requires_grad}

    def _find_key(self, names: dict[nn.Parameter, str]) -> list[int]:
        """Equal as long as neither the parameters that require a gradient nor the units change."""
        return [*map(id, names), *map(id, skippable_modules(self._model))]

    def _build(self) -> None:
        self.close()
        trainable = list(self._names)
        # A parameter in two units, as where blocks share it, gets its gradient with no single one of them.
        counts = Counter(parameter for unit in self._find_units() for parameter in set(unit))
        found = [[p for p in unit if p in self._names and counts[p] == 1] for unit in self._find_units()]
        units = _of_one_kind(found)
        self._num_skippable = len(units)
        self._units = [*units, *_of_one_kind(_buckets(trainable, units))]
        self._unit_of = {parameter: number for number, unit in enumerate(self._units) for parameter in unit}
        self._hooks = [parameter.register_post_accumulate_grad_hook(self._count) for parameter in trainable]

    def _count(self, parameter: nn.Parameter) -> None:
        if self._is_averaged:
            raise RuntimeError(
                "a backward pass after the gradients of the step were averaged over the ranks would make them differ "
                f"between ranks, got one for {self._names[parameter]!r}"
            )
        if not self._is_last_backward:
            return
        number = self._unit_of.get(parameter)
        if number is None:  # requires a gradient since this step: `adopt_changes` averages it
            return
        if number in self._sent:
            raise RuntimeError(
                f"the parameter {self._names[parameter]!r} got a second gradient after the first was sent to the other "
                "ranks; use one backward pass per microbatch, and checkpoint with use_reentrant=False where "
                "parameters are shared"
            )
        self._missing[number] -= 1
        if self._missing[number] == 0:
            self._send(number, self._units[number])

    @torch.no_grad()
    def _send(self, number: int, unit: list[nn.Parameter]) -> None:
        """Begin to reduce a whole unit, so that its size is the same on all ranks; missing gradients are zeros."""
        flat = torch.cat([self._flat_gradient(parameter) for parameter in unit]).div_(world_size())
        self._sent[number] = unit, flat, dist.all_reduce(flat, async_op=True)

    def _flat_gradient(self, parameter: nn.Parameter) -> Tensor:
        if parameter.grad is None:
            return torch.zeros_like(parameter).reshape(-1)
        if parameter.grad.layout is not torch.strided:
            raise RuntimeError(
                f"gradients must be dense to be averaged over ranks, got a sparse one for {self._names[parameter]!r}; "
                "an embedding needs sparse=False"
            )
        return parameter.grad.reshape(-1)

    def _receive(self) -> None:
        for unit, flat, work in self._sent.values():
            work.wait()
            for parameter, mean in zip(unit, flat.split([p.numel() for p in unit]), strict=True):
                if parameter.grad is not None:
                    parameter.grad.copy_(mean.view_as(parameter.grad))
        self._sent.clear()

    def _fill_missing(self, parameters: list[nn.Parameter]) -> None:
        """Give zeros to the parameters that have a gradient on some other rank only."""
        counts = sum_over_ranks([parameter.grad is not None for parameter in parameters])
        for parameter, count in zip(parameters, counts, strict=True):
            if count and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def _gradient_versions(self) -> list[tuple[int, int]]:
        gradients = (parameter.grad for parameter in self._names if parameter.grad is not None)
        return [(id(gradient), version_of(gradient)) for gradient in gradients]


def _copy_added(added: dict[str, nn.Parameter]) -> None:
    """Give parameters that were added to the model on all ranks the values of rank 0."""
    forms = [(name, tuple(parameter.shape), str(parameter.dtype)) for name, parameter in added.items()]
    try:
        others = gather(forms)
    except RankLostError as error:
        error.add_note(f"parameters were added to the model, which all ranks must do at the same step: {list(added)}")
        raise
    if any(other != forms for other in others):
        raise RuntimeError(f"all ranks must add the same parameters to the model at a step, got {others}")
    copy_from_rank_zero(added.values())


def _have_gradient(parameters: Iterable[nn.Parameter]) -> bool:
    return any(parameter.grad is not None for parameter in parameters)


def _buckets(parameters: Sequence[nn.Parameter], units: Sequence[Sequence[nn.Parameter]]) -> list[list[nn.Parameter]]:
    """The parameters in no unit, last ones first, as their gradients come first."""
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
    """The same units, divided where dtypes or devices differ."""
    divided: list[list[nn.Parameter]] = []
    for unit in units:
        kinds: dict[Any, list[nn.Parameter]] = {}
        for parameter in unit:
            kinds.setdefault((parameter.dtype, parameter.device), []).append(parameter)
        divided += kinds.values()
    return divided
