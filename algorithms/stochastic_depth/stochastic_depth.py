"""Stochastic depth as an algorithm: surgery at INIT, rates and drop plan at BATCH_START."""

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import Any

import numpy as np
from torch import nn

from ...engine import Algorithm, EvaluationFactor, Event, Logger, State, Time, attach
from .draws import Draws
from .plan import DropPlan, Scaling, StochasticMethod
from .ranks import check_same_plan
from .rates import DropDistribution, multipliers_over_depth
from .schedules import DropSchedule, Schedule, Warmup, as_schedules
from .settings import DropUnit, Settings
from .surgery import convert, stochastic_blocks


@dataclass(eq=False, repr=False)
class StochasticDepth(Algorithm):
    """Train a residual network whose blocks are dropped at random (Huang et al. 2016, arXiv:1603.09382).

    The blocks are converted at INIT. At each BATCH_START the current rates are set and one drop plan is
    drawn for the whole batch, as a function of the seed and the number of the step. All forwards in training mode of
    the step use it, also those of a loss that runs the model again. Evaluation uses the current rates.

    Logs ``stochastic_depth/drop_rate`` (the highest current rate),
    ``stochastic_depth/num_stochastic_layers`` and ``stochastic_depth/num_dropped_layers`` (blocks dropped
    in the step; with the ``sample`` method the sum over blocks of the fraction of dropped rows).

    The settings that are not listed here are documented in `Settings`.

    Args:
        drop_warmup: How long all rates rise linearly from 0: a fraction of the training, a time
            string in any unit, or a `Time`. The first batch after it has exactly the full rates.
        drop_schedule: Further factors on all rates over time: `StartLate`, `StopEarly`,
            `ProgressiveLayerDrop`, a function of the elapsed fraction of training that returns a number
            in [0, 1], or several of these, which are multiplied.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of its range; at INIT, if no block matches, the model has
            stochastic depth already, or a schedule does not fit the training.
    """

    target_layer_name: str | type[nn.Module] | None = None
    stochastic_method: StochasticMethod = "block"
    drop_rate: float | None = None
    drop_distribution: DropDistribution = "linear"
    drop_warmup: float | str | Time = 0.0
    use_same_gpu_seed: bool = True
    _: KW_ONLY
    drop_schedule: DropSchedule = None
    draws: Draws = "independent"
    scaling: Scaling | None = None
    drop_unit: DropUnit = "block"
    protect_projections: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        self._settings = Settings(**{field.name: getattr(self, field.name) for field in fields(Settings)})
        warmup = Warmup(self.drop_warmup)
        self.drop_warmup = warmup.span
        self.schedules: tuple[Schedule, ...] = (warmup, *as_schedules(self.drop_schedule))
        self._plan: DropPlan | None = None
        self._is_attached = False
        self._rates_of_last_step: list[float] = []
        self._full_rates = np.zeros(0)
        self._num_steps = 0
        self._sum_of_rates = np.zeros(0)
        self._sum_of_drops = np.zeros(0)

    @property
    def find_unused_parameters(self) -> bool:
        """True: the parameters of a dropped block get no gradient in that step."""
        return True

    @property
    def ranks_may_differ(self) -> bool:
        """Whether a rank may drop a block that another one keeps."""
        return not self.plan.same_on_all_ranks

    @property
    def depends_on_duration(self) -> bool:
        """Whether a schedule depends on a fraction of the training."""
        return any(schedule.depends_on_duration for schedule in self.schedules)

    def gradient_units(self, state: State) -> Sequence[Sequence[nn.Module]]:
        """The layers of each residual branch, which has no gradients in a step in which it is dropped."""
        return [unit for block in stochastic_blocks(state.model) for unit in block.gradient_units()]

    def evaluation_factors(self, state: State) -> Sequence[EvaluationFactor]:
        """One minus the current rate of each residual branch, unless training is scaled."""
        self._update_rates(state)
        return [factor for block in stochastic_blocks(state.model) for factor in block.evaluation_factors()]

    @property
    def expected_drop_rates(self) -> list[float]:
        """For each block the mean of its rate over the steps so far; the full rate before the first step."""
        return (self._sum_of_rates / self._num_steps if self._num_steps else self._full_rates).tolist()

    @property
    def realized_drop_rates(self) -> list[float]:
        """For each block the fraction that was dropped in the steps so far."""
        return (self._sum_of_drops / max(self._num_steps, 1)).tolist()

    def attach(self, model: nn.Module) -> DropPlan:
        """Convert a model now, and attach this algorithm to it: a Trainer of the model then uses it.

        Returns:
            The drop plan, to be drawn where there is no Trainer.

        Raises:
            TypeError, ValueError: As `convert`. The model is then unchanged.
        """
        plan = self._plan = convert(model, self._settings, seed=self.seed or 0)
        if callable(self.drop_distribution):  # a function could keep the model from being pickled
            self.drop_distribution = multipliers_over_depth(self.drop_distribution, len(plan.rates))
            self._settings = replace(self._settings, drop_distribution=self.drop_distribution)
        self._is_attached = True
        attach(model, self)
        return plan

    def check_state(self, state: State) -> None:
        """Refuse a second StochasticDepth, and schedules that do not fit the training.

        Raises:
            ValueError: If there is one.
        """
        if sum(isinstance(algorithm, StochasticDepth) for algorithm in state.algorithms) > 1:
            raise ValueError(
                "a run must have at most one StochasticDepth, whether among its algorithms or by "
                "cf.apply_stochastic_depth: a block has one drop rate"
            )
        for schedule in self.schedules:
            schedule.check(state)

    def match(self, event: Event, state: State) -> bool:
        """Whether the algorithm acts at this event."""
        return event in _ACTIONS

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Convert the model, draw the plan or log, depending on the event."""
        _ACTIONS[event](self, state, logger)

    def state_dict(self) -> dict[str, Any]:
        """The full rates, to be compared, and the sums of the rates so far. Plans follow from timestamp and seed."""
        return {
            "rates": self._full_rates.tolist(),
            "num_steps": self._num_steps,
            "sum_of_rates": self._sum_of_rates.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned, after INIT.

        Raises:
            ValueError: If the number of blocks or their full rates differ, as where a model has other rates of its own.
        """
        for number, (saved, own) in enumerate(zip(self._one_per_block(state["rates"]), self._full_rates, strict=True)):
            if saved != own:
                raise ValueError(
                    f"the drop rates must be those of the run that is resumed, that of block {number} was {saved:g}, "
                    f"got {own:g}"
                )
        self._sum_of_rates = self._one_per_block(state["sum_of_rates"])
        self._num_steps = int(state["num_steps"])

    def rank_state_dict(self) -> dict[str, Any]:
        """The sums of what this rank has dropped so far."""
        return {"sum_of_drops": self._sum_of_drops.tolist()}

    def load_rank_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `rank_state_dict` returned, after INIT.

        Raises:
            ValueError: If the number of blocks differs.
        """
        self._sum_of_drops = self._one_per_block(state["sum_of_drops"])

    def _one_per_block(self, values: list[float]) -> np.ndarray[Any, Any]:
        array = np.array(values, dtype=float)
        if array.shape != self._full_rates.shape:
            raise ValueError(
                f"the state of StochasticDepth must have {len(self._full_rates)} blocks, got shape {array.shape}"
            )
        return array

    def _convert(self, state: State, logger: Logger) -> None:
        if not self._is_attached:
            self._plan = convert(state.model, self._settings, seed=state.seed)
        assert self._plan is not None, "attach() has made it"
        self._full_rates = np.array(self._plan.rates)
        self._num_steps = 0
        self._sum_of_rates = np.zeros(len(self._full_rates))
        self._sum_of_drops = np.zeros(len(self._full_rates))
        self._update_rates(state)

    def _set_rates(self, state: State, logger: Logger) -> None:
        self._update_rates(state)

    def _update_rates(self, state: State) -> None:
        factor = math.prod(schedule(state) for schedule in self.schedules)
        self._rates_of_last_step = (self._full_rates * factor).tolist()
        self.plan.set_rates(self._rates_of_last_step)

    def _begin_fit(self, state: State, logger: Logger) -> None:
        if not any(block.drop_plan is self.plan for block in stochastic_blocks(state.model)):
            raise RuntimeError(
                "state.model must hold the blocks that StochasticDepth converted at INIT, got none of them: an "
                "algorithm that replaces the model must come before it"
            )
        if self.plan.rates != self._rates_of_last_step:
            raise RuntimeError(
                f"drop_rate of a block must be set before the Trainer is built, which had {self._rates_of_last_step}, "
                f"got {self.plan.rates}"
            )
        self.plan.seed = state.seed if self.seed is None else self.seed
        self.plan.follow_trainer()

    def _end_fit(self, state: State, logger: Logger) -> None:
        self._update_rates(state)
        self.plan.release()

    def _draw(self, state: State, logger: Logger) -> None:
        self._update_rates(state)
        self.plan.draw(state.timestamp.batch, rank=state.rank, num_rows=state.batch_num_samples)
        check_same_plan(self.plan, state.timestamp.batch)

    def _begin_forward(self, state: State, logger: Logger) -> None:
        self.plan.set_microbatch(state.microbatch_start, state.microbatch_num_samples)
        self.plan.open()

    def _end_forward(self, state: State, logger: Logger) -> None:
        self.plan.close()

    def _log(self, state: State, logger: Logger) -> None:
        dropped = self.plan.dropped_fractions()
        self._num_steps += 1
        self._sum_of_rates += self.plan.rates
        self._sum_of_drops += dropped
        logger.log_metrics(
            {
                "stochastic_depth/drop_rate": max(self.plan.rates),
                "stochastic_depth/num_stochastic_layers": len(self.plan.rates),
                "stochastic_depth/num_dropped_layers": sum(dropped),
            }
        )

    def close(self, state: State) -> None:
        """Let no later forward use the plan of a step that failed."""
        if self._plan is not None:
            self._plan.release()

    @property
    def plan(self) -> DropPlan:
        """The current rates and the decisions of the step.

        Raises:
            RuntimeError: Before INIT.
        """
        if self._plan is None:
            raise RuntimeError("StochasticDepth has no drop plan before INIT: give it to a Trainer")
        return self._plan


_ACTIONS = {
    Event.INIT: StochasticDepth._convert,
    Event.FIT_START: StochasticDepth._begin_fit,
    Event.BATCH_START: StochasticDepth._draw,
    Event.BEFORE_FORWARD: StochasticDepth._begin_forward,
    Event.BEFORE_BACKWARD: StochasticDepth._end_forward,  # the loss may run the model again
    Event.BATCH_END: StochasticDepth._log,
    Event.EVAL_START: StochasticDepth._set_rates,
    Event.FIT_END: StochasticDepth._end_fit,
}
