"""How the ranks train one model: each with a whole copy of it, or each with a shard of its parameters."""

from collections.abc import Sequence
from typing import Any, Literal, Protocol, get_args

from torch import nn

from ...engine import State
from .gradients import GradientSynchronizer
from .group import copy_from_rank_zero, world_size

Parallelism = Literal["ddp", "fsdp"]


class Synchronizer(Protocol):
    """Averages the gradients of a step over all ranks."""

    def begin_step(self) -> None:
        """Say that a step begins."""

    def begin_last_backward(self) -> None:
        """Say that the gradients of the step will be complete after the backward that comes next."""

    def fingerprint(self) -> int:
        """A hash of which parameters have gradients, if all ranks must have the same; otherwise 0."""

    def finish(self) -> None:
        """Wait until all gradients of the step are averaged."""

    def close(self) -> None:
        """Let go of the model."""


def check_parallelism(
    parallelism: str, *, halve_microbatches: bool, sync_batchnorm: bool, find_unused_parameters: bool
) -> None:
    """Refuse a kind of parallelism that is unknown, or does not go with other settings, with a ValueError."""
    if parallelism not in get_args(Parallelism):
        raise ValueError(
            f"parallelism must be one of {', '.join(map(repr, get_args(Parallelism)))}, got {parallelism!r}"
        )
    if find_unused_parameters and (parallelism == "fsdp" or sync_batchnorm):
        raise ValueError(
            "find_unused_parameters needs ranks that compute without each other, as parallelism='fsdp' and "
            "sync_batchnorm do not let them, got True"
        )
    several = world_size() > 1
    if parallelism == "fsdp" and not several:
        raise ValueError("parallelism='fsdp' needs several processes, as torchrun starts them, got one")
    if several and halve_microbatches and (parallelism == "fsdp" or sync_batchnorm):
        raise ValueError(
            "device_train_microbatch_size='auto' needs ranks that compute without each other, as parallelism='fsdp' "
            "and sync_batchnorm do not let them; give a number"
        )


def parallelize(state: State, parallelism: Parallelism, *, find_unused_parameters: bool) -> Synchronizer | None:
    """Give all ranks the weights of rank 0, move or shard the model to the device.

    Args:
        state: The run after INIT; its optimizers follow where parameters are replaced.
        parallelism: ``"ddp"`` keeps a copy on every rank, ``"fsdp"`` shards parameters, gradients and the
            states of optimizers.
        find_unused_parameters: Whether ranks may use different parameters in a step, whatever algorithms say.

    Returns:
        What averages the gradients; None in a process that is alone.

    Raises:
        ValueError: If ranks that shard their parameters may compute different blocks.
    """
    copy_from_rank_zero([*state.model.parameters(), *state.model.buffers()])
    units = [unit for algorithm in state.algorithms for unit in algorithm.gradient_units(state)]
    ranks_may_differ = find_unused_parameters or any(algorithm.ranks_may_differ for algorithm in state.algorithms)
    if parallelism == "fsdp":
        if ranks_may_differ:
            raise ValueError(
                "parallelism='fsdp' needs all ranks to compute the same blocks, or those of equal shape are mixed up "
                "without any error; stochastic_method='sample' and use_same_gpu_seed=False let ranks differ"
            )
        return _shard(state, units)
    state.model.to(state.device)
    if state.world_size == 1:
        return None
    parameters = [[parameter for module in unit for parameter in module.parameters()] for unit in units]
    return GradientSynchronizer(state.model.parameters(), parameters, ranks_may_differ=ranks_may_differ)


class _ShardedSynchronizer:
    """FSDP2 averages gradients in the backward itself; it is only told when."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def begin_step(self) -> None:
        # A forward without a backward, as in evaluation, leaves the outermost parameters gathered, and it would be
        # the gradients of these that are set to None, while those of the shards add up over steps.
        self._model.reshard()
        self._model.set_requires_gradient_sync(False)

    def begin_last_backward(self) -> None:
        self._model.set_requires_gradient_sync(True)

    def fingerprint(self) -> int:
        return 0  # ranks that differ have not come here

    def finish(self) -> None:
        """All is averaged when the backward is over."""

    def close(self) -> None:
        """The model stays sharded."""


def _shard(state: State, units: Sequence[Sequence[nn.Module]]) -> Synchronizer:
    """Shard the model: each unit by itself, so that one that does not run is neither gathered nor reduced."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    names = {parameter: name for name, parameter in state.model.named_parameters()}
    mesh = init_device_mesh(state.device.type, (state.world_size,))
    for unit in units:
        fully_shard(list(unit), mesh=mesh)
    fully_shard(state.model, mesh=mesh)
    sharded = dict(state.model.named_parameters())
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            group["params"] = [sharded[names[parameter]] for parameter in group["params"]]
    return _ShardedSynchronizer(state.model)
