"""How the ranks train one model: each with a copy of it, or each with a shard of its parameters."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol

from torch import nn

from ...engine import State
from .declarations import find_difference_over_ranks, gradient_units, running_units
from .gradients import GradientSynchronizer
from .group import copy_from_rank_zero, world_size

Parallelism = Literal["ddp", "fsdp"]


class Synchronizer(Protocol):
    """Averages the gradients of a step over all ranks; the methods are called in this order."""

    has_changed: bool

    def begin_step(self) -> None:
        """Look up which parameters require a gradient."""

    def begin_last_backward(self) -> None:
        """Announce that the gradients of the step will be complete after the next backward."""

    def refuse_edits(self) -> Any:
        """A context that raises a RuntimeError if gradients are changed in it."""

    def finish(self) -> None:
        """Wait until all gradients of the step are averaged."""

    def fingerprints(self) -> tuple[int, int]:
        """Hashes, below 2**32, of which parameters require a gradient and of which have one."""

    def adopt_changes(self) -> None:
        """Follow a change of the parameters that require a gradient."""

    def end_step(self) -> None:
        """Allow gradients that are not averaged, until the next step begins."""

    def close(self) -> None:
        """Remove what was attached to the model."""


def check_parallelism(
    parallelism: Parallelism, *, halve_microbatches: bool, sync_batchnorm: bool, find_unused_parameters: bool
) -> None:
    """Raise a ValueError for a kind of parallelism that does not go with other settings."""
    if find_unused_parameters and (parallelism == "fsdp" or sync_batchnorm):
        raise ValueError(
            "find_unused_parameters must be False with parallelism='fsdp' or sync_batchnorm=True, whose ranks wait for "
            "each other in the forward pass, got True"
        )
    several = world_size() > 1
    if parallelism == "fsdp" and not several:
        raise ValueError("parallelism='fsdp' needs several processes, started by torchrun, got one")
    if several and halve_microbatches and (parallelism == "fsdp" or sync_batchnorm):
        raise ValueError(
            "device_train_microbatch_size must be a number with parallelism='fsdp' or sync_batchnorm=True, whose ranks "
            "wait for each other in the forward pass, got 'auto'"
        )


def parallelize(state: State, parallelism: Parallelism, *, find_unused_parameters: bool) -> Synchronizer | None:
    """Copy the weights of rank 0 to all ranks and move the model to the device, or shard it.

    Args:
        state: The run after INIT; where parameters are replaced, its optimizers get the new ones.
        parallelism: ``"ddp"`` keeps a copy on every rank, ``"fsdp"`` shards parameters, gradients and the
            states of optimizers.
        find_unused_parameters: Whether ranks may use different parameters in a step, whatever algorithms and
            modules say.

    Returns:
        What averages the gradients; None in a single process.

    Raises:
        ValueError: If parameters are to be sharded and ranks may compute different modules.
    """
    copy_from_rank_zero([*state.model.parameters(), *state.model.buffers()])
    source = find_difference_over_ranks(state)
    if parallelism == "fsdp":
        if source is not None:
            raise ValueError(
                "parallelism='fsdp' needs all ranks to compute the same blocks, or those of equal shape are mixed up "
                f"without any error, but {source} lets ranks differ"
            )
        return _shard(state, gradient_units(state))
    state.model.to(state.device)
    if state.world_size == 1:
        return None

    def units() -> list[list[nn.Parameter]]:
        return [[parameter for module in unit for parameter in module.parameters()] for unit in gradient_units(state)]

    may_differ = find_unused_parameters or source is not None
    return GradientSynchronizer(state.model, units, ranks_may_differ=may_differ)


def reshard(model: nn.Module) -> None:
    """Free the whole parameters that a forward without a backward leaves on each rank; only of a sharded model."""
    if world_size() > 1:
        from torch.distributed.fsdp import FSDPModule

        if isinstance(model, FSDPModule):
            model.reshard()


class _ShardedSynchronizer:
    """FSDP2 averages gradients in the backward pass itself; this sets when, and what is gathered in advance."""

    has_changed = False

    def __init__(self, model: Any) -> None:
        self._model = model
        self._hook = model.register_forward_pre_hook(_prefetch_running_units, prepend=True)  # before that of FSDP

    def begin_step(self) -> None:
        # A forward without a backward, as in evaluation, leaves the outermost parameters gathered. zero_grad would then
        # reset their gradients and not those of the shards, which would add up over steps.
        self._model.reshard()
        self._model.set_requires_gradient_sync(False)
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad and not hasattr(parameter, "full_tensor"):
                raise RuntimeError(
                    f"parallelism='fsdp' shards the parameters that the model has after INIT, got {name!r} later; add "
                    "parameters at INIT"
                )

    def begin_last_backward(self) -> None:
        self._model.set_requires_gradient_sync(True)

    @contextmanager
    def refuse_edits(self) -> Iterator[None]:
        yield  # the gradients of shards exist only when they are averaged

    def finish(self) -> None:
        """Nothing is left to do after the backward pass."""

    def fingerprints(self) -> tuple[int, int]:
        return 0, 0  # ranks that differ would have waited for each other in the backward pass

    def adopt_changes(self) -> None:
        """FSDP reads ``requires_grad`` itself."""

    def end_step(self) -> None:
        """Nothing to do: a further backward pass is averaged too."""

    def close(self) -> None:
        """The model stays sharded, and gathers what it needs when it needs it."""
        self._hook.remove()
        for module in self._model.modules():
            if hasattr(module, "set_modules_to_forward_prefetch"):
                module.set_modules_to_forward_prefetch([])


def _prefetch_running_units(model: Any, args: Any) -> None:
    """Let each unit that the next forward runs be gathered during the one before it; the others are not gathered."""
    order = [model, *(unit[0] for unit in running_units(model))]
    for module, following in zip(order, [*order[1:], None], strict=True):
        module.set_modules_to_forward_prefetch([] if following is None else [following])


def _shard(state: State, units: Sequence[Sequence[nn.Module]]) -> Synchronizer:
    """Shard the model, each unit on its own, so that a skipped one is neither gathered nor reduced."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    names = {parameter: name for name, parameter in state.model.named_parameters()}
    for parameter, name in names.items():
        if not parameter.is_contiguous():
            raise ValueError(
                f"parallelism='fsdp' shards contiguous parameters only, but the strides of {name} are "
                f"{parameter.stride()}; leave out ChannelsLast"
            )
    mesh = init_device_mesh(state.device.type, (state.world_size,))
    for unit in units:
        fully_shard(list(unit), mesh=mesh)
    fully_shard(state.model, mesh=mesh)
    sharded = dict(state.model.named_parameters())
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            group["params"] = [sharded[names[parameter]] for parameter in group["params"]]
    return _ShardedSynchronizer(state.model)
