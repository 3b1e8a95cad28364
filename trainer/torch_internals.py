"""The private parts of torch that the Trainer depends on. tests/test_torch_internals.py checks each of them."""

import copy
from collections import OrderedDict
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.modules.batchnorm import _BatchNorm as BatchNormBase
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

__all__ = [
    "INNER_SCHEDULERS",
    "BatchNormBase",
    "buffer_slots",
    "copy_without_hooks",
    "discard_unscaled",
    "flag_as_overflow",
    "flag_nonfinite",
    "mark_stepped",
    "shut_down_workers",
    "split_scheduler",
    "step_without_hooks",
    "storage_info",
    "update_scale_unless",
    "version_of",
    "without_workers",
    "worker_processes",
]


def buffer_slots(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """For each buffer of a model, also those that are None, its module and its name there."""
    return {
        f"{path}.{name}" if path else name: (module, name)
        for path, module in model.named_modules(remove_duplicate=False)
        for name in module._buffers
    }


def worker_processes(iterator: Iterator[Any]) -> list[BaseProcess]:
    """The worker processes of a DataLoader's iterator; none for any other iterator."""
    return list(getattr(iterator, "_workers", ()))


def shut_down_workers(iterator: Any) -> None:
    """Tell the workers of a DataLoader's iterator to exit, and wait for them a few seconds."""
    iterator._shutdown_workers()


def without_workers(dataloader: DataLoader[Any]) -> DataLoader[Any]:
    """A shallow copy of a DataLoader that starts its own workers, even if `dataloader` has persistent ones."""
    copied = copy.copy(dataloader)
    copied._iterator = None
    return copied


def mark_stepped(optimizer: Optimizer) -> None:
    """Mark an optimizer as stepped: a scheduler warns if it steps before the optimizer ever did."""
    optimizer._opt_called = True  # type: ignore[attr-defined]


INNER_SCHEDULERS = "_schedulers"  # their key in the state of a SequentialLR or ChainedScheduler


def copy_without_hooks(optimizer: Optimizer) -> Optimizer:
    """A shallow copy of an optimizer without its hooks before and after a step."""
    copied = object.__new__(type(optimizer))
    copied.__dict__.update({name: value for name, value in vars(optimizer).items() if name != "step"})
    copied._optimizer_step_pre_hooks, copied._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    return copied


def step_without_hooks(optimizer: Optimizer) -> None:
    """Step without the hooks that are registered for all optimizers, which torch wraps around ``step``."""
    type(optimizer).step.__wrapped__(optimizer)  # type: ignore[attr-defined]


def split_scheduler(scheduler: LRScheduler) -> tuple[dict[str, Any], list[LRScheduler]]:
    """The state of a scheduler without those of the schedulers inside it, as a SequentialLR has some, and these."""
    state = {name: value for name, value in scheduler.state_dict().items() if name != INNER_SCHEDULERS}
    return state, list(getattr(scheduler, INNER_SCHEDULERS, ()))


def flag_nonfinite(tensors: list[Tensor], flag: Tensor, one: Tensor) -> None:
    """Set `flag` to 1 if a value is not finite. The loss scaler's kernel, which also multiplies by `one` in place.

    Args:
        tensors: Dense and real, of one dtype on one device.
        flag: Float32, without dimensions, on that device.
        one: The number 1, as `flag`.
    """
    torch._amp_foreach_non_finite_check_and_unscale_(tensors, flag, one)


def flag_as_overflow(scaler: GradScaler, optimizer: Optimizer, flag: Tensor) -> None:
    """Let the scaler skip the update of an optimizer, whose gradients are unscaled, if `flag` is 1 on the device."""
    for found in scaler._found_inf_per_device(optimizer).values():
        torch.maximum(found, flag.to(found.device, non_blocking=True), out=found)


@torch.no_grad()
def update_scale_unless(scaler: GradScaler, flag: Tensor) -> None:
    """Update the scale after the optimizers have stepped, unless `flag` is 1 on the device."""
    tensors: Any = scaler._scale, scaler._growth_tracker
    before = [tensor.clone() for tensor in tensors]
    scaler.update()
    for tensor, old in zip(tensors, before, strict=True):
        torch.where(flag != 0, old, tensor, out=tensor)


def discard_unscaled(scaler: GradScaler) -> None:
    """Forget which optimizers have unscaled gradients, which the scaler unscales once per update."""
    if scaler.is_enabled():
        scaler._per_optimizer_states.clear()


def version_of(tensor: Tensor) -> int:
    """How often a tensor was changed in place."""
    return tensor._version


def storage_info(file: str, offset: int, length: int) -> Any:
    """Where torch.distributed.checkpoint finds a tensor: `length` bytes of `file`, from `offset` on."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    return _StorageInfo(file, offset, length)
