"""The interface of everything that changes how training is done."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from .event import Event
    from .logger import Logger
    from .state import State


class Algorithm(ABC):
    """A change to training, applied at the events it asks for.

    A new algorithm is two methods::

        class HalveTheLoss(Algorithm):
            def match(self, event, state):
                return event is Event.AFTER_LOSS

            def apply(self, event, state, logger):
                state.loss = state.loss / 2
    """

    def __repr__(self) -> str:
        """The settings: a run is resumed only with algorithms whose texts are the same."""
        return f"{type(self).__name__}()"

    @property
    def find_unused_parameters(self) -> bool:
        """Whether a step may leave parameters without a gradient; by `ranks_may_differ` others on each rank."""
        return False

    @property
    def ranks_may_differ(self) -> bool:
        """Whether these parameters may be others on each rank (parallel training asks)."""
        return self.find_unused_parameters

    @property
    def depends_on_duration(self) -> bool:
        """Whether another `max_duration` changes what it does before the end (resuming asks)."""
        return False

    def gradient_units(self, state: State) -> Sequence[Sequence[nn.Module]]:
        """Groups of modules that run together or not at all (parallel training asks)."""
        return ()

    @abstractmethod
    def match(self, event: Event, state: State) -> bool:
        """Whether `apply` shall run at this event. Called at every event: keep it cheap."""

    @abstractmethod
    def apply(self, event: Event, state: State, logger: Logger) -> int | None:
        """Act on `state`.

        Returns:
            An optional exit code, kept in the `Trace` of this event.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep of this algorithm, in plain values and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave.

        Raises:
            ValueError: If there is something in `state` that this algorithm does not know.
        """
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, got {sorted(state)}")
