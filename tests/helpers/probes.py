"""Test algorithms, one for each kind of change that an algorithm may make."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from etude.engine import Algorithm, Event, Logger, State


@dataclass(eq=False, repr=False)
class AverageWeights(Algorithm):
    """Keeps an average of the weights, which is as large as the model, and is there from the first step on."""

    decay: float = 0.9

    def __post_init__(self) -> None:
        self._averages: dict[str, Tensor] = {}

    def match(self, event: Event, state: State) -> bool:
        return event is Event.BATCH_END

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        for name, parameter in state.model.named_parameters():
            average = self._averages.setdefault(name, parameter.detach().clone())
            average.mul_(self.decay).add_(parameter.detach(), alpha=1 - self.decay)

    def state_dict(self) -> dict[str, Any]:
        return {"averages": dict(self._averages)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._averages = dict(state["averages"])


@dataclass(eq=False, repr=False)
class ChangeBatch(Algorithm):
    """Changes inputs and targets for the whole step."""

    scale: float = 0.5

    def __post_init__(self) -> None:
        self._original_batch: Any = None

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.BATCH_START, Event.BATCH_END)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event is Event.BATCH_START:
            self._original_batch = state.batch
            inputs, targets = state.batch
            state.batch = (self.scale * inputs, 2 - targets if targets.dim() == 1 else targets.flip(1))
        else:
            state.batch, self._original_batch = self._original_batch, None


class ChangeLoss(Algorithm):
    """Adds a penalty to the loss. Not a dataclass: it is compared by its public attributes."""

    def __init__(self, weight: float = 0.01) -> None:
        self.weight = weight

    def match(self, event: Event, state: State) -> bool:
        return event is Event.AFTER_LOSS

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        assert state.loss is not None
        state.loss = state.loss + self.weight * state.outputs.pow(2).mean()


@dataclass(eq=False, repr=False)
class ReplaceParameters(Algorithm):
    """Gives every linear layer new parameters at INIT."""

    scale: float = 0.5

    def match(self, event: Event, state: State) -> bool:
        return event is Event.INIT

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        new: dict[nn.Parameter, nn.Parameter] = {}
        for module in state.model.modules():
            if isinstance(module, nn.Linear):
                for name, old in list(module.named_parameters(recurse=False)):
                    new[old] = nn.Parameter(self.scale * old.detach())
                    setattr(module, name, new[old])
        for optimizer in state.optimizers:
            for group in optimizer.param_groups:
                group["params"] = [new.get(parameter, parameter) for parameter in group["params"]]


@dataclass(eq=False, repr=False)
class CountRows(Algorithm):
    """Counts the rows of this rank, and the steps of all of them."""

    weight: float = 1.0

    def __post_init__(self) -> None:
        self._num_steps, self._rows = 0, torch.zeros(())

    def match(self, event: Event, state: State) -> bool:
        return event is Event.BATCH_END

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        self._num_steps += 1
        self._rows += self.weight * (state.batch_num_samples + 100 * state.rank)

    def state_dict(self) -> dict[str, Any]:
        return {"num_steps": self._num_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._num_steps = state["num_steps"]

    def rank_state_dict(self) -> dict[str, Any]:
        return {"rows": self._rows}

    def load_rank_state_dict(self, state: dict[str, Any]) -> None:
        self._rows = state["rows"]
