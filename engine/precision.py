"""The dtypes of a training."""

from contextlib import AbstractContextManager, nullcontext
from enum import Enum

import torch


class Precision(str, Enum):
    """The dtype of the forward pass. Each member equals its value: ``Precision.AMP_BF16 == "amp_bf16"``."""

    FP32 = "fp32"
    AMP_BF16 = "amp_bf16"
    AMP_FP16 = "amp_fp16"


def get_precision_context(
    precision: Precision | str, device: torch.device | str | None = None
) -> AbstractContextManager[object]:
    """A context in which a forward pass computes with this precision, by ``torch.autocast``.

    Args:
        precision: A `Precision` or its value.
        device: The device of the tensors; by default the GPU where there is one, else the CPU.

    Raises:
        ValueError: If there is no such precision.
    """
    dtype = _DTYPES[Precision(precision)]
    if dtype is None:
        return nullcontext()
    kind = torch.device(device).type if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    return torch.autocast(kind, dtype)


_DTYPES = {Precision.FP32: None, Precision.AMP_BF16: torch.bfloat16, Precision.AMP_FP16: torch.float16}
