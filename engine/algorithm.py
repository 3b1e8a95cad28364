"""The interface of everything that changes training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from .identity import represent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from .evaluation_factor import EvaluationFactor
    from .event import Event
    from .logger import Logger
    from .state import State


class Algorithm(ABC):
    """A change to training, applied at the events that it matches.

    Its settings are the fields of a dataclass (``@dataclass(eq=False, repr=False)``), or its public attributes.
    They are logged, and a run can only be resumed with the same ones. What changes during training belongs in
    attributes with a leading underscore.

    A new algorithm is two methods::

        class HalveTheLoss(Algorithm):
            def match(self, event, state):
                return event is Event.AFTER_LOSS

            def apply(self, event, state, logger):
                state.loss = state.loss / 2
    """

    def __repr__(self) -> str:
        return represent(self)

    @property
    def find_unused_parameters(self) -> bool:
        """Whether some parameters may receive no gradient in a step."""
        return False

    @property
    def ranks_may_differ(self) -> bool:
        """Whether the set of parameters that receive a gradient in a step may differ between ranks.

        By default it may if there is such a set (`find_unused_parameters`). If it may not, each step communicates
        only the existing gradients; if it may, ranks send zeros for the missing ones.
        """
        return self.find_unused_parameters

    @property
    def depends_on_duration(self) -> bool:
        """Whether `max_duration` changes what the algorithm does before the end of training.

        If so, a run cannot be resumed with another `max_duration`.
        """
        return False

    @property
    def skips_nonfinite_steps(self) -> bool:
        """Whether the algorithm itself leaves its state as it is in a step whose update is skipped.

        It can do so without waiting for the device, by `State.found_nonfinite`. Otherwise the Trainer copies the state
        before every step, so `state_dict` and `rank_state_dict` should not read values from the device. The copy is
        loaded if loss or gradients are not finite and that ends the training.
        """
        return False

    def gradient_units(self, state: State) -> Sequence[Sequence[nn.Module]]:
        """Groups of modules that are executed or skipped together in a step.

        The gradients of each group are communicated together; with ``parallelism="fsdp"`` each group is sharded as
        one unit. Called after INIT.
        """
        return ()

    def evaluation_factors(self, state: State) -> Sequence[EvaluationFactor]:
        """By which factors an evaluation at this moment multiplies what parts of the model compute.

        A checkpoint keeps them, so that its weights can be evaluated without this algorithm. Called between two steps.
        """
        return ()

    def check_state(self, state: State) -> None:  # noqa: B027 - optional
        """Check that the algorithm can work with the run: its other algorithms, its optimizers, its length.

        Called for all algorithms before any of them acts at INIT, so that the model of a refused run is unchanged.

        Raises:
            ValueError: If it cannot. The message names this algorithm and what it does not work with.
        """

    @abstractmethod
    def match(self, event: Event, state: State) -> bool:
        """Whether `apply` is to run at this event. It is called at every event, so keep it cheap."""

    @abstractmethod
    def apply(self, event: Event, state: State, logger: Logger) -> int | None:
        """Change `state`.

        At AFTER_* and *_END events algorithms run in reverse order (see `Event`), so whatever this method changes
        at an event such as BEFORE_LOSS it can restore at AFTER_LOSS. At AFTER_TRAIN_BATCH it can have the gradients
        computed again at other weights, see `State.recompute_gradients`.

        Returns:
            An optional exit code, kept in the `Trace` of this event.
        """

    def close(self, state: State) -> None:  # noqa: B027  # most algorithms have nothing to do
        """Undo what must not outlast the run. Called once when the Trainer is closed, also after an error in a step."""

    def state_dict(self) -> dict[str, Any]:
        """The part of the algorithm's state that is the same on all ranks, as plain values and tensors.

        A checkpoint keeps it once. Tensors that are sharded over ranks, such as averages of sharded parameters,
        are saved by all ranks, each its shard.

        Averages of the weights, with which the model is evaluated, are kept under ``"averages"``, by the name of the
        parameter or buffer (those of this rank in `rank_state_dict`), so that `load_weights` finds them. A true
        ``"is_active"`` beside them tells that at the moment the model has the averages, and they are the weights.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned. Called after INIT, before FIT_START.

        A tensor arrives with the sharding of the tensor of the same key in `state_dict`, or, if there is none yet,
        of the model's parameter or buffer of that name.

        Raises:
            ValueError: If `state` does not fit this algorithm.
        """
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, got {sorted(state)}")

    def rank_state_dict(self) -> dict[str, Any]:
        """The part of the algorithm's state that may differ between ranks, as plain values and tensors.

        A checkpoint keeps it once per rank.
        """
        return {}

    def load_rank_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `rank_state_dict` returned on this rank, or on rank 0 if the run had fewer ranks.

        Raises:
            ValueError: If `state` does not fit this algorithm.
        """
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state per rank, got {sorted(state)}")
