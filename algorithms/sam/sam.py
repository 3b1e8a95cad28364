"""Sharpness-aware minimization (SAM): steps by the gradients at nearby weights where the loss is higher."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from ...engine import Algorithm, Event, Logger, State
from ...engine.checks import check_int, check_number
from ..exclusion import check_only_one
from ..mixing import Mixing


@contextmanager
def sam_perturbation(model: nn.Module, rho: float = 0.05, epsilon: float = 1e-12) -> Iterator[None]:
    """Move the weights up the gradient for the body of a ``with`` statement (Foret et al. 2021, equation 2).

    Each weight that has a gradient is moved by ``rho * gradient / (norm + epsilon)``, with the L2 norm of all gradients
    together. Afterwards weights and buffers, such as the statistics of BatchNorm, are those before; the gradients are
    those that the body has computed::

        model.loss(model(batch), batch).backward()
        with sam_perturbation(model):
            optimizer.zero_grad()
            model.loss(model(batch), batch).backward()
        optimizer.step()

    Args:
        model: With gradients.
        rho: How far the weights are moved, above 0.
        epsilon: Keeps the division finite, above 0.

    Raises:
        ValueError: If `rho` or `epsilon` is out of range.
    """
    check_number("rho", rho, gt=0)
    check_number("epsilon", epsilon, gt=0)
    gradients = {parameter: parameter.grad for parameter in model.parameters() if parameter.grad is not None}
    kept = [(tensor, tensor.detach().clone()) for tensor in (*gradients, *model.buffers())]
    try:
        _ascend(gradients, rho, epsilon)
        yield
    finally:
        with torch.no_grad():
            for tensor, before in kept:  # copies, as a subtraction would round
                tensor.copy_(before)


@dataclass(eq=False, repr=False)
class SAM(Algorithm):
    """Minimizes the loss and its sharpness (Foret et al. 2021, arXiv:2010.01412).

    At AFTER_TRAIN_BATCH the weights are moved up the gradient, the gradients of the same batch are computed there, and
    the weights are moved back, so that the optimizer steps by them. Both passes have the same drop plan, microbatches
    and mixed rows. The weights are moved by the gradients of all ranks. Loss, outputs and the statistics of BatchNorm
    are those of the first pass.

    Args:
        rho: How far the weights are moved, above 0.
        epsilon: Keeps the division by the norm of the gradients finite, above 0.
        interval: It acts in every step whose number, from 1, is a multiple of this.

    Raises:
        ValueError: If an argument is out of range; at INIT, if there is a second one, an algorithm after it acts at
            AFTER_TRAIN_BATCH, where it would change gradients that are then computed again, or with
            ``precision="amp_fp16"``.
    """

    rho: float = 0.05
    epsilon: float = 1e-12
    interval: int = 1

    def __post_init__(self) -> None:
        check_number("rho", self.rho, gt=0)
        check_number("epsilon", self.epsilon, gt=0)
        check_int("interval", self.interval, ge=1)

    def check_state(self, state: State) -> None:
        """Refuse what it does not work with.

        Raises:
            ValueError: If there is something.
        """
        check_only_one(self, state, "the gradients are computed again once")
        if state.precision == "amp_fp16":
            raise ValueError("SAM needs precision='fp32' or 'amp_bf16', got 'amp_fp16', which scales gradients once")
        for algorithm in state.algorithms[state.algorithms.index(self) + 1 :]:
            # Those act before it, as the order is reversed at AFTER_TRAIN_BATCH. MixUp and CutMix change no gradients.
            if not isinstance(algorithm, Mixing) and algorithm.match(Event.AFTER_TRAIN_BATCH, state):
                name = type(algorithm).__name__
                raise ValueError(
                    f"SAM must come after {name} among the algorithms, or it computes the gradients again that {name} "
                    "has changed"
                )

    def match(self, event: Event, state: State) -> bool:
        """When the gradients of a step are complete, in every `interval`-th step."""
        return event is Event.AFTER_TRAIN_BATCH and (state.timestamp.batch.value + 1) % self.interval == 0

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Replace the gradients by those at the moved weights."""
        with sam_perturbation(state.model, self.rho, self.epsilon):
            state.recompute_gradients()


@torch.no_grad()
def _ascend(gradients: dict[nn.Parameter, Tensor], rho: float, epsilon: float) -> None:
    if not gradients:
        return
    norm = get_total_norm(gradients.values())
    if hasattr(norm, "full_tensor"):  # of sharded gradients
        norm = norm.full_tensor()
    for parameter, gradient in gradients.items():
        parameter.add_(gradient * (rho / (norm + epsilon)))
