"""Gradient clipping: bounds the gradients before the optimizer step."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from ...engine import Algorithm, Event, Logger, State
from ...engine.checks import check_number

ClippingType = Literal["adaptive", "norm", "value"]

_MIN_NORM = 1e-3  # of a parameter in adaptive clipping, so that one that is initialised to zero can still train


def apply_gradient_clipping(model: nn.Module, clipping_type: ClippingType, clipping_threshold: float) -> None:
    """Clip the gradients of a model in place; call it between the backward pass and the optimizer step.

    Args:
        model: Its parameters without a gradient are left out.
        clipping_type: ``"norm"`` scales all gradients together so that their joint L2 norm is at most the
            threshold. ``"value"`` clamps every element to ``[-threshold, threshold]``. ``"adaptive"`` scales the
            gradient of each output unit (row of a weight, whole bias) so that its norm is at most the threshold
            times the norm of the unit's parameters, but at least 0.001 (Brock et al. 2021, equation 3,
            arXiv:2102.06171).
        clipping_threshold: Above 0.

    Raises:
        TypeError: If `clipping_threshold` is not a number.
        ValueError: If an argument is out of range.
    """
    check_clipping(clipping_type, clipping_threshold)
    if clipping_type == "norm":
        clip_grad_norm_(model.parameters(), clipping_threshold)
    elif clipping_type == "value":
        clip_grad_value_(model.parameters(), clipping_threshold)
    else:
        _clip_adaptively(model, clipping_threshold)


def check_clipping(clipping_type: str, clipping_threshold: float) -> None:
    """Validate the settings of gradient clipping."""
    if clipping_type not in get_args(ClippingType):
        raise ValueError(f"clipping_type must be 'adaptive', 'norm' or 'value', got {clipping_type!r}")
    check_number("clipping_threshold", clipping_threshold, gt=0)


@dataclass(eq=False, repr=False)
class GradientClipping(Algorithm):
    """Clips the gradients of each step, after they are averaged over ranks and unscaled.

    Args:
        clipping_type: ``"norm"``, ``"value"`` or ``"adaptive"``, see `apply_gradient_clipping`.
        clipping_threshold: The bound, above 0.

    Raises:
        TypeError: If `clipping_threshold` is not a number.
        ValueError: If an argument is out of range.
    """

    clipping_type: ClippingType
    clipping_threshold: float

    def __post_init__(self) -> None:
        check_clipping(self.clipping_type, self.clipping_threshold)

    def match(self, event: Event, state: State) -> bool:
        """When the gradients of the step are complete."""
        return event is Event.AFTER_TRAIN_BATCH

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Clip the gradients."""
        apply_gradient_clipping(state.model, self.clipping_type, self.clipping_threshold)


@torch.no_grad()
def _clip_adaptively(model: nn.Module, threshold: float) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            largest = threshold * _unit_norms(parameter).clamp(min=_MIN_NORM)
            norm = _unit_norms(parameter.grad)
            parameter.grad.mul_(torch.where(norm > largest, largest / norm, torch.ones_like(norm)))


def _unit_norms(tensor: Tensor) -> Tensor:
    """The L2 norm of each output unit, which broadcasts against `tensor`: ``(O, 1, ...)``, of a vector its norm."""
    if tensor.dim() <= 1:
        return torch.linalg.vector_norm(tensor)
    return torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.dim())), keepdim=True)
