"""What MixUp and CutMix have in common: rows of a batch are mixed with other rows of it, and so are their targets."""

from abc import abstractmethod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..engine import Algorithm, Event, Logger, State
from ..engine.checks import check_number
from ..engine.generator import step_generator
from .label_smoothing import LabelSmoothing
from .targets import as_probabilities
from .tensors import logits_of, tensor_at


class Mixed(NamedTuple):
    """A batch whose rows are mixed.

    Args:
        inputs: The mixed inputs.
        targets: The targets of the rows themselves.
        partners: The targets of the rows that were mixed in; None where `targets` are mixed already.
        weight: Of the rows that were mixed in, in [0, 1].
    """

    inputs: Tensor
    targets: Tensor
    partners: Tensor | None
    weight: float


class Mixing(Algorithm):
    """Base class of algorithms that mix each row of a batch with another one.

    The inputs of the whole batch are mixed from BEFORE_TRAIN_BATCH to AFTER_TRAIN_BATCH, and the targets of each
    microbatch from AFTER_FORWARD, when the number of classes is known, to BEFORE_BACKWARD, so that other algorithms may
    change the targets of the loss in between. All random numbers are a function of the seed, the step and the rank.
    """

    interpolate_loss: bool
    input_key: Any
    target_key: Any

    def __post_init__(self) -> None:
        if not isinstance(self.interpolate_loss, bool):
            raise TypeError(f"interpolate_loss must be True or False, got {self.interpolate_loss!r}")
        self._batch: Any = None
        self._microbatch: Any = None
        self._partners: Tensor | None = None
        self._weight = 0.0

    @abstractmethod
    def mix(self, inputs: Tensor, targets: Tensor, generator: np.random.Generator) -> Mixed:
        """Mix the rows of a batch.

        Args:
            inputs: ``(N, ...)``.
            targets: ``(N, ...)``.
            generator: Of the random numbers of this step.
        """

    def check_state(self, state: State) -> None:
        """Refuse other algorithms that do not work with this one.

        Raises:
            ValueError: If a second algorithm mixes the batch, or targets are smoothed that the interpolated loss does
                not read.
        """
        name = type(self).__name__
        mixing = [type(algorithm).__name__ for algorithm in state.algorithms if isinstance(algorithm, Mixing)]
        if len(mixing) > 1:
            raise ValueError(f"a run must have at most one algorithm that mixes the batch, got {' and '.join(mixing)}")
        if self.interpolate_loss and any(isinstance(algorithm, LabelSmoothing) for algorithm in state.algorithms):
            raise ValueError(
                f"{name} must have interpolate_loss=False to be used with LabelSmoothing, whose smoothed targets an "
                "interpolated loss does not read"
            )

    def match(self, event: Event, state: State) -> bool:
        """Around the batch, and around the loss of each microbatch."""
        return event in _ACTIONS

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Mix the inputs, the targets or the loss, or restore the batch."""
        _ACTIONS[event](self, state)

    def _mix_inputs(self, state: State) -> None:
        inputs, targets = tensor_at(state, self, "input_key"), tensor_at(state, self, "target_key")
        generator = step_generator(state.seed, int(state.timestamp.batch), state.rank, stream=2)
        mixed = self.mix(inputs, targets, generator)
        self._batch, self._partners, self._weight = state.batch, mixed.partners, mixed.weight
        state.batch_set_item(self.input_key, mixed.inputs)
        if mixed.targets is not targets:
            state.batch_set_item(self.target_key, mixed.targets)

    def _restore_batch(self, state: State) -> None:
        state.batch, self._batch = self._batch, None  # the partners stay for passes that are repeated after it

    def _mix_targets(self, state: State) -> None:
        self._microbatch = state.batch
        if self._partners is None or self.interpolate_loss:
            return
        logits = logits_of(state, self)
        targets = as_probabilities(tensor_at(state, self, "target_key"), logits)
        partners = as_probabilities(self._partners_of(state), logits)
        state.batch_set_item(self.target_key, (1 - self._weight) * targets + self._weight * partners)

    def _mix_loss(self, state: State) -> None:
        """Interpolate the loss; what other algorithms have added to it stays as it is."""
        if self._partners is None or not self.interpolate_loss:
            return
        model: Any = state.model
        batch, state.batch = state.batch, self._microbatch
        state.batch_set_item(self.target_key, self._partners_of(state))
        loss, loss_of_partners = (model.loss(state.outputs, each) for each in (self._microbatch, state.batch))
        state.batch = batch
        if not isinstance(loss, Tensor) or not isinstance(loss_of_partners, Tensor):
            raise ValueError(
                f"{type(self).__name__} must have interpolate_loss=False for a loss of several parts, got a "
                f"{type(loss).__name__}"
            )
        assert state.loss is not None, "AFTER_LOSS follows the loss"
        state.loss = state.loss + self._weight * (loss_of_partners - loss)

    def _restore_targets(self, state: State) -> None:
        state.batch, self._microbatch = self._microbatch, None

    def _partners_of(self, state: State) -> Tensor:
        """The targets of the rows that were mixed into the current microbatch."""
        assert self._partners is not None, "only called where there are some"
        return self._partners[state.microbatch_start : state.microbatch_start + state.microbatch_num_samples]


_ACTIONS = {
    Event.BEFORE_TRAIN_BATCH: Mixing._mix_inputs,
    Event.AFTER_FORWARD: Mixing._mix_targets,
    Event.AFTER_LOSS: Mixing._mix_loss,
    Event.BEFORE_BACKWARD: Mixing._restore_targets,
    Event.AFTER_TRAIN_BATCH: Mixing._restore_batch,
}


def check_alpha(alpha: float) -> float:
    """Validate the parameter of a Beta distribution: above 0, where it would mix nothing."""
    return check_number("alpha", alpha, gt=0)


def check_rows(inputs: Tensor, targets: Tensor) -> None:
    """Check that there is a target for each row.

    Raises:
        ValueError: If there is not.
    """
    if inputs.dim() == 0 or targets.dim() == 0 or len(inputs) != len(targets):
        raise ValueError(
            f"inputs and targets must have the same number of rows to be mixed, got shapes {tuple(inputs.shape)} and "
            f"{tuple(targets.shape)}"
        )


def draw_partners(num_rows: int, device: torch.device, generator: np.random.Generator) -> Tensor:
    """For each row the index of the one that is mixed into it: a random permutation, ``(num_rows,)``."""
    indices = torch.from_numpy(generator.permutation(num_rows))
    if device.type == "cuda":
        indices = indices.pin_memory()  # so that the host does not wait for the copy
    return indices.to(device, non_blocking=True)


def generator_or_global(generator: np.random.Generator | None) -> np.random.Generator:
    """The generator, or a new one that is seeded from torch's global one."""
    if generator is not None:
        return generator
    return np.random.default_rng(int(torch.randint(2**63 - 1, ())))
