"""MixUp: training on weighted means of pairs of rows and of their targets."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...engine.checks import check_number
from ..mixing import Mixed, Mixing, check_alpha, check_rows, draw_partners, generator_or_global


def mixup_batch(
    input: Tensor,
    target: Tensor,
    mixing: float | None = None,
    alpha: float = 0.2,
    indices: Tensor | None = None,
    *,
    generator: np.random.Generator | None = None,
) -> tuple[Tensor, Tensor, float]:
    """Mix each row with another one: ``(1 - mixing) * input + mixing * input[indices]`` (Zhang et al. 2018).

    For a cross entropy, the loss is that of the same mixture of the targets::

        inputs, partners, mixing = mixup_batch(inputs, targets)
        outputs = model(inputs)
        loss = (1 - mixing) * F.cross_entropy(outputs, targets) + mixing * F.cross_entropy(outputs, partners)

    Args:
        input: ``(N, ...)``, floating-point.
        target: ``(N, ...)``.
        mixing: The weight of the other row, in [0, 1], one for the batch; by default it is drawn: the smaller one of
            z and 1 - z, where z has the distribution Beta(alpha, alpha). So the row itself always has the larger
            weight.
        alpha: Above 0; the larger, the more equal are the weights.
        indices: For each row the index of the other one, ``(N,)``; by default a random permutation.
        generator: Of what is drawn; by default one that is seeded from torch's global generator.

    Returns:
        The mixed inputs, the targets of the other rows, and `mixing`.

    Raises:
        ValueError: If an argument is out of range, or `input` is not floating-point.
    """
    check_rows(input, target)
    if not input.is_floating_point():
        raise ValueError(f"input must be floating-point to be mixed, got {input.dtype}")
    generator = generator_or_global(generator)
    mixing = draw_mixing(alpha, generator) if mixing is None else check_number("mixing", mixing, ge=0, le=1)
    if indices is None:
        indices = draw_partners(len(input), input.device, generator)
    return torch.lerp(input, input[indices], mixing), target[indices], mixing


def draw_mixing(alpha: float, generator: np.random.Generator) -> float:
    """The smaller one of z and 1 - z, where z has the distribution Beta(alpha, alpha)."""
    z = generator.beta(check_alpha(alpha), alpha)
    return min(z, 1 - z)


@dataclass(eq=False, repr=False)
class MixUp(Mixing):
    """Mixes each row of a batch and its target with those of another row (Zhang et al. 2018, arXiv:1710.09412).

    The weight of the other row, at most one half, and the pairs of rows are drawn once for the batch of each rank, as
    a function of the seed, the step and the rank. Evaluation is not changed. At BATCH_END the batch is the original
    one, and so are the targets that training metrics see.

    Args:
        alpha: Parameter of the Beta distribution of the weight, above 0; the larger, the more equal are the weights.
        interpolate_loss: Whether to mix the losses for both targets instead of the targets, for a loss that takes class
            indices only. Both are the same for a loss that is linear in the targets, such as cross entropy.
        input_key: Where a batch has the inputs ``(N, ...)``, as in `State.batch_get_item`.
        target_key: Where a batch has the targets: class indices ``(N, ...)``, or probabilities ``(N, C, ...)``.

    Raises:
        TypeError: If `interpolate_loss` is not a bool.
        ValueError: If `alpha` is out of range; at INIT, if another algorithm mixes the batch too, or smooths targets
            that an interpolated loss does not read; at the first batch, if it has no floating-point inputs or no
            targets.
    """

    alpha: float = 0.2
    interpolate_loss: bool = False
    input_key: Any = 0
    target_key: Any = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_alpha(self.alpha)

    def mix(self, inputs: Tensor, targets: Tensor, generator: np.random.Generator) -> Mixed:
        """Mix whole rows."""
        mixed, partners, weight = mixup_batch(inputs, targets, alpha=self.alpha, generator=generator)
        return Mixed(mixed, targets, partners, weight)
