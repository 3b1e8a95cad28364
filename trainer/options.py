"""The options of the Trainer: how each is checked, whether ranks must agree on it, and whether a resume must match.

Names, defaults and documentation are in the signature of `Trainer`; a test compares the two.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..engine import Algorithm, Callback, Evaluator, LoggerDestination, State, Time
from ..engine.identity import describe as describe_value
from . import checks
from .compilation import check_compile_config
from .distributed.parallelism import Parallelism, check_parallelism
from .precision import Precision
from .settings import describe_dataloader

OnResume = Literal["must match", "may change"]


@dataclass(frozen=True)
class Rule:
    """The rule of one option.

    Args:
        check: Called with name and value; raises if the value is invalid, and returns the converted value.
        needs: The option without which this one has no effect.
        same_on_ranks: Whether the value must be the same on all ranks.
        on_resume: Whether the value must match that of the resumed run, or may change, which is logged. None for
            options that do not affect training and are not part of its settings.
        describe: Converts the value to plain values for comparison. None for options in the `State`, which algorithms
            may change at INIT: `settings.describe` describes them after that.
    """

    check: Callable[[str, Any], Any]
    needs: str | None = None
    same_on_ranks: bool = True
    on_resume: OnResume | None = None
    describe: Callable[[Any], Any] | None = lambda value: value


def _optional(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    return lambda name, value: None if value is None else check(name, value)


def _is_given(value: Any) -> bool:
    return value is not None


def _names(things: Sequence[Any]) -> list[str]:
    return [type(thing).__name__ for thing in things]


def _describe_evaluators(evaluators: Sequence[Evaluator]) -> dict[str, Any]:
    return {
        evaluator.label: {
            "dataloader": describe_dataloader(evaluator.dataloader),
            "metric_names": None if evaluator.metric_names is None else list(evaluator.metric_names),
        }
        for evaluator in evaluators
    }


def _each(kind: type) -> Callable[[str, Any], Any]:
    return partial(checks.as_sequence, kind=kind)


def _one_of(choices: Any) -> Callable[[str, Any], Any]:
    return partial(checks.check_choice, choices=get_args(choices))


@dataclass(frozen=True, kw_only=True)
class Options:
    """The checked options of a Trainer."""

    model: Annotated[nn.Module, Rule(checks.check_model, on_resume="must match", describe=None)]
    train_dataloader: Annotated[
        Iterable[Any] | None, Rule(_optional(checks.check_dataloader), on_resume="must match", describe=None)
    ]
    eval_dataloader: Annotated[tuple[Evaluator, ...], Rule(checks.as_evaluators, describe=_describe_evaluators)]
    max_duration: Annotated[Time | None, Rule(_optional(checks.check_duration), on_resume="may change", describe=None)]
    algorithms: Annotated[tuple[Algorithm, ...], Rule(_each(Algorithm), on_resume="must match", describe=None)]
    optimizers: Annotated[tuple[Optimizer, ...], Rule(_each(Optimizer), on_resume="must match", describe=None)]
    schedulers: Annotated[
        tuple[LRScheduler | Callable[[State], float], ...],
        Rule(checks.as_schedulers, on_resume="must match", describe=None),
    ]
    step_schedulers_every_batch: Annotated[bool, Rule(checks.check_bool, on_resume="must match")]
    callbacks: Annotated[tuple[Callback, ...], Rule(_each(Callback), describe=_names)]
    loggers: Annotated[tuple[LoggerDestination, ...], Rule(_each(LoggerDestination), same_on_ranks=False)]
    device: Annotated[torch.device, Rule(checks.check_device, on_resume="may change", describe=attrgetter("type"))]
    precision: Annotated[Precision, Rule(_one_of(Precision), on_resume="must match")]
    compile_config: Annotated[
        dict[str, Any] | None, Rule(_optional(check_compile_config), on_resume="may change", describe=describe_value)
    ]
    device_train_microbatch_size: Annotated[
        int | Literal["auto"] | None, Rule(checks.check_microbatch_size, on_resume="must match")
    ]
    eval_interval: Annotated[
        Time, Rule(checks.check_eval_interval, on_resume="may change", needs="eval_dataloader", describe=str)
    ]
    train_subset_num_batches: Annotated[int | None, Rule(checks.check_subset, on_resume="must match")]
    eval_subset_num_batches: Annotated[
        int | None, Rule(checks.check_subset, on_resume="may change", needs="eval_dataloader")
    ]
    seed: Annotated[int, Rule(checks.check_seed, on_resume="must match")]
    deterministic_mode: Annotated[bool, Rule(checks.check_bool, on_resume="may change")]
    run_name: Annotated[str | None, Rule(_optional(checks.check_run_name), same_on_ranks=False)]
    progress_bar: Annotated[bool, Rule(checks.check_bool, same_on_ranks=False)]
    save_folder: Annotated[Path | None, Rule(_optional(checks.check_folder), describe=_is_given)]
    save_interval: Annotated[Time, Rule(checks.check_save_interval, needs="save_folder", describe=str)]
    save_num_checkpoints_to_keep: Annotated[int, Rule(checks.check_num_to_keep, needs="save_folder")]
    load_path: Annotated[Path | None, Rule(_optional(checks.check_path), describe=str)]
    load_weights_only: Annotated[bool, Rule(checks.check_bool, needs="load_path")]
    autoresume: Annotated[bool, Rule(checks.check_bool)]
    max_nonfinite_steps: Annotated[int, Rule(checks.check_steps)]
    parallelism: Annotated[Parallelism, Rule(_one_of(Parallelism), on_resume="may change")]
    find_unused_parameters: Annotated[bool, Rule(checks.check_bool)]
    sync_batchnorm: Annotated[bool, Rule(checks.check_bool, on_resume="must match")]
    dist_timeout: Annotated[float, Rule(checks.check_timeout, same_on_ranks=False)]

    @property
    def torch_schedulers(self) -> tuple[LRScheduler, ...]:
        """The torch schedulers among `schedulers`."""
        return tuple(item for item in self.schedulers if isinstance(item, LRScheduler))

    @property
    def schedules(self) -> tuple[Callable[[State], float], ...]:
        """The functions of the state among `schedulers`."""
        return tuple(item for item in self.schedulers if not isinstance(item, LRScheduler))

    @property
    def halve_microbatches(self) -> bool:
        """Whether a step that runs out of memory is repeated with smaller microbatches."""
        return self.device_train_microbatch_size == "auto"

    def for_ranks(self) -> dict[str, Any]:
        """The options that all ranks must agree on, as plain values."""
        return self._described(lambda rule: rule.same_on_ranks)

    def for_settings(self) -> dict[str, Any]:
        """The options that are part of the settings of the run, as plain values."""
        return self._described(lambda rule: rule.on_resume is not None)

    def _described(self, is_asked_for: Callable[[Rule], bool]) -> dict[str, Any]:
        return {
            name: rule.describe(getattr(self, name))
            for name, rule in RULES.items()
            if rule.describe is not None and is_asked_for(rule)
        }


RULES: Mapping[str, Rule] = {
    name: annotation.__metadata__[0] for name, annotation in get_type_hints(Options, include_extras=True).items()
}
"""The rule of every option by its name."""

MAY_CHANGE = frozenset(name for name, rule in RULES.items() if rule.on_resume == "may change")
"""The options that may differ between a run and the one that resumes it."""


def check_options(given: Mapping[str, Any]) -> Options:
    """Check each option, then combinations of options.

    Args:
        given: All arguments of the Trainer by name.

    Raises:
        TypeError: If an option has the wrong type.
        ValueError: If its value is invalid, or it would have no effect.
    """
    for name, rule in RULES.items():
        if rule.needs is not None and given[rule.needs] is None and given[name] not in (None, False):
            article = "an" if rule.needs[0] in "aeiou" else "a"
            raise ValueError(
                f"{name} must come with {article} {rule.needs} to have an effect, got {_quoted(given[name])}"
            )
    options = Options(**{name: rule.check(name, given[name]) for name, rule in RULES.items()})
    checks.check_optimizers(options.optimizers, options.model)
    checks.check_schedulers(options.torch_schedulers, options.optimizers)
    check_parallelism(
        options.parallelism,
        halve_microbatches=options.halve_microbatches,
        sync_batchnorm=options.sync_batchnorm,
        find_unused_parameters=options.find_unused_parameters,
    )
    return options


def _quoted(value: Any) -> str:
    return f'"{value}"' if isinstance(value, (str, Time)) else repr(value)
