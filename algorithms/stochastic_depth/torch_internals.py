"""The private parts of torch and timm that stochastic depth depends on. tests/test_torch_internals.py checks them."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def is_in_backward() -> bool:
    """Whether autograd is running this code, as it does when a checkpointed forward is recomputed."""
    return torch._C._current_graph_task_id() != -1


def is_tracing() -> bool:
    """Whether torch.jit.trace is running this code."""
    return torch._C._is_tracing()


def is_transforming() -> bool:
    """Whether a transform of torch.func is running this code."""
    return torch._C._are_functorch_transforms_active()


def active_ddp() -> DistributedDataParallel | None:
    """The DistributedDataParallel whose forward is running."""
    return DistributedDataParallel._active_ddp_module


def maybe_mark_dynamic(tensor: Tensor, dim: int) -> None:
    """Let torch.compile treat the size of `dim` as dynamic where it can, from the first graph on."""
    torch._dynamo.maybe_mark_dynamic(tensor, dim)


def remove_forward_hooks(module: nn.Module, *classes: type) -> None:
    """Remove the forward hooks and forward pre-hooks that are instances of `classes`.

    The handles that torch gives for this don't survive a copy of a module whose original is gone.
    """
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for number in [number for number, hook in hooks.items() if isinstance(hook, classes)]:
            del hooks[number]
            module._forward_pre_hooks_with_kwargs.pop(number, None)
            module._forward_hooks_always_called.pop(number, None)


def swin_v2_cr_attention(block: Any, x: Tensor) -> Tensor:
    """The windowed attention of timm's Swin V2 Cr blocks, of ``(N, H, W, C)``."""
    return block._shifted_window_attn(x)


def swin_attention(block: Any, x: Tensor) -> Tensor:
    """The windowed attention of timm's Swin blocks, of ``(N, H, W, C)``."""
    return block._attn(x)
