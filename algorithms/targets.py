"""Targets of a classification as probabilities."""

import torch
from torch import Tensor


def as_probabilities(target: Tensor, logits: Tensor) -> Tensor:
    """The targets as probabilities, one-hot where they are class indices.

    Args:
        target: Class indices ``(N, ...)``, or probabilities ``(N, C, ...)``.
        logits: Outputs of the model, ``(N, C, ...)``; they tell the number of classes C.

    Returns:
        Probabilities ``(N, C, ...)`` in float32, or in float64 for logits in float64.

    Raises:
        ValueError: If `target` has neither of the two shapes, or its indices are no integers. On a CPU also if an
            index is not in [0, C), such as the ``ignore_index`` of a loss, which probabilities do not have.
    """
    if logits.dim() < 2:
        raise ValueError(f"logits must be of shape (N, C, ...), got {tuple(logits.shape)}")
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if target.shape == logits.shape:
        return target.to(dtype)
    shape_of_indices = logits.shape[:1] + logits.shape[2:]
    if target.shape != shape_of_indices:
        shape, wanted = tuple(target.shape), f"{tuple(shape_of_indices)} or {tuple(logits.shape)}"
        raise ValueError(f"target must be of shape {wanted} for these logits, got {shape}")
    if target.is_floating_point() or target.is_complex():
        raise ValueError(f"target must be class indices of an integer type, got {target.dtype}")
    try:
        # As one_hot, which waits for a GPU to check the indices; a CPU checks them here without reading them twice.
        return torch.zeros_like(logits, dtype=dtype).scatter_(1, target.unsqueeze(1).long(), 1)
    except RuntimeError as error:
        raise ValueError(
            f"target must be class indices in [0, {logits.shape[1]}), as probabilities have no ignore_index: {error}"
        ) from error
