"""A factor by which evaluation multiplies what a part of a model computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class EvaluationFactor:
    """A factor by which evaluation multiplies what a part of a model computes, other than 1.

    Args:
        module: The part.
        factor: The factor.
        parameters: The parameters and buffers of the model in which the output of the part is linear: multiplied by
            the factor, they give the evaluated model without it. Empty if there are none.
        obstacle: Why there are none.
    """

    module: nn.Module
    factor: float
    parameters: Sequence[Tensor] = ()
    obstacle: str | None = None
