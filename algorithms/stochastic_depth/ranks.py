"""Checks of distributed training: parallel wrappers of the model, and equal plans on all ranks."""

import hashlib
from typing import Any

import torch.distributed as dist
from torch import nn

from .plan import DropPlan
from .torch_internals import active_ddp


def current_rank() -> int:
    """The rank of this process, 0 without a process group."""
    return dist.get_rank() if _is_distributed() else 0


def check_parallel(model: nn.Module, *, ranks_may_differ: bool) -> None:
    """Check that the parallel wrappers in a model support stochastic depth.

    Raises:
        ValueError: If a DistributedDataParallel does not expect parameters without gradients, or ranks that
            shard their parameters may drop different blocks.
    """
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            check_ddp(module)
        if ranks_may_differ and _is_sharded(module):
            raise ValueError(
                "fully_shard needs all ranks to compute the same blocks, or parameters of blocks of equal shape are "
                "mixed up without any error; stochastic_method='sample' and use_same_gpu_seed=False let ranks differ"
            )


def check_ddp(module: Any) -> None:
    """Check that a DistributedDataParallel expects parameters without gradients."""
    if module.static_graph:
        raise ValueError(
            "DistributedDataParallel must have static_graph=False with stochastic depth, whose graph changes from step "
            "to step, got True"
        )
    if not module.find_unused_parameters:
        raise ValueError(
            "DistributedDataParallel must have find_unused_parameters=True with stochastic depth, as dropped blocks "
            "get no gradients, got False"
        )


def check_active_ddp() -> None:
    """Check the DistributedDataParallel whose forward is running.

    It wraps the model after stochastic depth was applied, so it cannot be checked earlier.
    """
    if (active := active_ddp()) is not None:
        check_ddp(active)


def check_same_plan(plan: DropPlan, step: int) -> None:
    """In torch's debug mode (``TORCH_DISTRIBUTED_DEBUG=INFO`` or ``DETAIL``), compare the plan over the ranks.

    Raises:
        RuntimeError: If ranks that must drop the same blocks do not.
    """
    debug: Any = dist  # its stubs leave the debug level out
    if not plan.same_on_all_ranks or not _is_distributed() or debug.get_debug_level() == debug.DebugLevel.OFF:
        return
    drawn = repr((plan.seed, step, plan.rates, plan.dropped_blocks))
    digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, hashlib.sha256(drawn.encode()).hexdigest()[:16])
    if others := [rank for rank, digest in enumerate(digests) if digest != digests[0]]:
        raise RuntimeError(
            f"all ranks must drop the same blocks, but at step {step} the plans of ranks {others} differ from that of "
            f"rank 0; this is rank {dist.get_rank()}, with seed {plan.seed} and {plan.dropped_blocks}"
        )


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _is_sharded(module: nn.Module) -> bool:
    if not dist.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)
