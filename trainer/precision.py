"""The dtype of the forward pass: full precision, or automatic mixed precision."""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

Precision = Literal["fp32", "amp_bf16", "amp_fp16"]

_DTYPES = {"amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[None]:
    """The context of the forward pass and the loss."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=_DTYPES[precision])


def grad_scaler(precision: Precision, device: torch.device) -> torch.amp.GradScaler:
    """The loss scaler, enabled for fp16 only, whose gradients would underflow without it."""
    return torch.amp.GradScaler(device.type, enabled=precision == "amp_fp16")
