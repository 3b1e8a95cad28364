"""Number formats of the forward pass: full precision, or automatic mixed precision."""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal, get_args

import torch

Precision = Literal["fp32", "amp_bf16", "amp_fp16"]

_DTYPES = {"amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}


def check_precision(precision: str) -> None:
    """Refuse an unknown precision with a ValueError."""
    if precision not in get_args(Precision):
        raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}, got {precision!r}")


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[None]:
    """The context in which the model and the loss are computed."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=_DTYPES[precision])


def grad_scaler(precision: Precision, device: torch.device) -> torch.amp.GradScaler:
    """The loss scaler: fp16 gradients underflow without one, for the others it passes everything on."""
    return torch.amp.GradScaler(device.type, enabled=precision == "amp_fp16")
