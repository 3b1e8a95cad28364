"""The construction of a Trainer, in stages: `assemble` names them in order."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from ..engine import Engine, Evaluator, Event, Logger, LoggerDestination, State, attached_algorithms
from ..loggers import FileLogger, ProgressBar
from . import checks, distributed
from .checkpoint.contents import restore, restore_for_evaluation, restore_weights
from .checkpoint.loading import Found, find_checkpoint
from .checkpoint.saver import CheckpointSaver
from .compilation import compile_model
from .data.reader import EpochReader
from .distributed.batchnorm import convert_batchnorm
from .distributed.parallelism import Synchronizer, parallelize
from .evaluation import check_metric_names
from .learning_rate import check_schedules, keep_initial_learning_rates
from .options import Options, check_options
from .precision import grad_scaler
from .reproducibility import seed_all
from .settings import check_same_on_all_ranks, describe
from .step import TrainStep
from .train_metrics import find_train_metrics
from .training_loop import TrainingLoop

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Assembly:
    """The parts of a Trainer.

    Args:
        options: Options of the Trainer, checked.
        engine: The engine, with state and logger.
        loop: The training loop.
        saver: The callback that saves checkpoints; None without one.
    """

    options: Options
    engine: Engine
    loop: TrainingLoop
    saver: CheckpointSaver | None


def assemble(arguments: Mapping[str, Any]) -> Assembly:
    """Build all parts of a Trainer, and load the checkpoint that it starts from.

    Invalid arguments raise before INIT, so that the model and all files are unchanged.

    Args:
        arguments: All arguments of the Trainer by name.
    """
    device = join_ranks(arguments)
    with distributed.all_or_none():
        options = check_options(arguments)
        saver = find_saver(options)
        state = build_state(options, saver, device)
        open_readers(state, options)
        check_schedules(state)
    check_same_on_all_ranks(options.for_ranks())  # before any other collective
    found = find_start(options, saver)
    with distributed.all_or_none():
        logger = open_loggers(options, state, found)
    engine = Engine(state, logger)
    with distributed.all_or_none():
        initialize(engine, options)
        train_reader, eval_readers = open_readers(state, options)  # again: an algorithm may have replaced the data
    state.settings = describe(state, options.for_settings())
    check_same_on_all_ranks(state.settings)
    synchronizer = parallelize(state, options.parallelism, find_unused_parameters=options.find_unused_parameters)
    load(engine, found)
    if options.compile_config is not None:
        compile_model(state.model, options.compile_config)
    is_resume = found is not None and not found.weights_only and bool(state.optimizers)
    loop = TrainingLoop(
        engine,
        build_step(engine, options, synchronizer),
        options,
        train_reader=train_reader,
        eval_readers=eval_readers,
        saver=saver,
        resumed={"ranks": found.contents["ranks"]} if found is not None and is_resume else None,
    )
    return Assembly(options, engine, loop, saver)


def join_ranks(arguments: Mapping[str, Any]) -> torch.device:
    """Initialize the process group under torchrun. Returns the device of this rank."""
    device = checks.check_device("device", arguments["device"])
    return distributed.join_process_group(device, checks.check_timeout("dist_timeout", arguments["dist_timeout"]))


def find_saver(options: Options) -> CheckpointSaver | None:
    """The `CheckpointSaver` of the run, from `save_folder` or from the callbacks."""
    savers = [callback for callback in options.callbacks if isinstance(callback, CheckpointSaver)]
    if options.save_folder is not None:
        interval, num_to_keep = options.save_interval, options.save_num_checkpoints_to_keep
        savers.append(CheckpointSaver(options.save_folder, interval, num_to_keep=num_to_keep))
    if len(savers) > 1:
        raise ValueError("save_folder and callbacks must give at most one CheckpointSaver, got several")
    return savers[0] if savers else None


def build_state(options: Options, saver: CheckpointSaver | None, device: torch.device) -> State:
    """Build the state. The saver becomes the last callback, so that it saves the states of the others."""
    others = [callback for callback in options.callbacks if callback is not saver]
    train_metrics = None if options.train_dataloader is None else find_train_metrics(options.model, device)
    callbacks = [callback for callback in (train_metrics, *others, saver) if callback is not None]
    size = options.device_train_microbatch_size
    return State(
        model=options.model,
        max_duration=options.max_duration,
        train_dataloader=options.train_dataloader,
        eval_dataloader=options.eval_dataloader[0].dataloader if options.eval_dataloader else None,
        evaluators=options.eval_dataloader,
        optimizers=options.optimizers,
        schedulers=options.torch_schedulers,
        schedules=options.schedules,
        algorithms=options.algorithms,
        callbacks=callbacks,
        device=device,
        precision=options.precision,
        scaler=grad_scaler(options.precision, device),
        device_train_microbatch_size=None if size == "auto" else size,
        train_subset_num_batches=options.train_subset_num_batches,
        eval_subset_num_batches=options.eval_subset_num_batches,
        seed=options.seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )


def open_readers(state: State, options: Options) -> tuple[EpochReader | None, list[tuple[Evaluator, EpochReader]]]:
    """Open the readers of the training and evaluation data; raise for a dataloader that cannot be read."""
    if state.eval_dataloader is None:
        state.evaluators = []
    elif len(state.evaluators) <= 1:  # an algorithm may have replaced state.eval_dataloader
        (evaluator,) = state.evaluators or [Evaluator(label="eval", dataloader=state.eval_dataloader)]
        state.evaluators = [replace(evaluator, dataloader=state.eval_dataloader)]
    eval_readers = [(evaluator, open_eval_reader(state, evaluator)) for evaluator in state.evaluators]
    return open_train_reader(state, options), eval_readers


def open_eval_reader(state: State, evaluator: Evaluator) -> EpochReader:
    """Open the reader of one set of evaluation data."""
    name = "eval_dataloader" if evaluator.label == "eval" else f"eval_dataloader {evaluator.label!r}"
    return _open_reader(state, evaluator.dataloader, name, for_training=False)


def open_train_reader(state: State, options: Options) -> EpochReader | None:
    """Open the reader of the training data; None without any."""
    has_equal_steps = options.parallelism == "fsdp" or options.sync_batchnorm
    equal_shares = has_equal_steps and state.device_train_microbatch_size is not None
    if state.train_dataloader is None:
        return None
    return _open_reader(state, state.train_dataloader, "train_dataloader", for_training=True, equal_shares=equal_shares)


def open_predict_reader(state: State, dataloader: Iterable[Any]) -> EpochReader:
    """Open the reader of data to predict on."""
    return _open_reader(state, dataloader, "dataloader", for_training=False)


def find_start(options: Options, saver: CheckpointSaver | None) -> Found | None:
    """Find the checkpoint to start from, the same on all ranks; None for a new training."""
    return find_checkpoint(
        None if saver is None else saver.folder,
        options.load_path,
        load_weights_only=options.load_weights_only,
        autoresume=options.autoresume,
    )


def open_loggers(options: Options, state: State, found: Found | None) -> Logger:
    """Create the logger; only that of rank 0 has destinations."""
    destinations: list[LoggerDestination] = list(options.loggers)
    if options.run_name is not None:
        is_resume = found is not None and not found.weights_only
        folder = Path("runs").absolute() / options.run_name
        destinations.append(FileLogger(folder, append=options.autoresume or is_resume))
    if options.progress_bar:
        destinations.append(ProgressBar())
    return Logger(state, destinations if state.rank == 0 else ())


def initialize(engine: Engine, options: Options) -> None:
    """Seed all generators, run INIT on the unwrapped model, and check the state that algorithms leave."""
    state = engine.state
    seed_all(options.seed, options.deterministic_mode, state.rank)
    if isinstance(getattr(state.model, "logger", 0), (Logger, NoneType)):
        state.model.logger = engine.logger  # type: ignore[assignment]  # no module: a ComposerModel has it
    engine.run_event(Event.INIT)
    join_attached_algorithms(engine)
    if options.sync_batchnorm:
        convert_batchnorm(state)
    checks.check_model("state.model", state.model)
    checks.check_optimizers(state.optimizers, state.model)
    for name in ("train_dataloader", "eval_dataloader"):
        if getattr(state, name) is not None:
            checks.check_dataloader(name, getattr(state, name))
    check_metric_names(state.model, state.evaluators)
    if state.train_dataloader is not None and not state.optimizers:
        state.optimizers = (default_optimizer(state.model),)
    keep_initial_learning_rates(state)


def join_attached_algorithms(engine: Engine) -> None:
    """Let the algorithms that are attached to the model, also those attached at INIT, act before all others."""
    state = engine.state
    attached = attached_algorithms(state.model)
    state.algorithms = (*attached, *state.algorithms)
    for algorithm in attached:
        algorithm.check_state(state)
    for algorithm in attached:
        if algorithm.match(Event.INIT, state):
            algorithm.apply(Event.INIT, state, engine.logger)


def load(engine: Engine, found: Found | None) -> None:
    """Load the checkpoint, if there is one, between BEFORE_LOAD and AFTER_LOAD."""
    engine.run_event(Event.BEFORE_LOAD)
    if found is not None:
        try:
            if found.weights_only:
                restore_weights(found.contents, engine.state, found.path.parent)
            elif not engine.state.optimizers:
                restore_for_evaluation(found.contents, engine.state, found.path.parent)
            else:
                restore(found.contents, engine.state, engine.logger, found.path.parent)
        except ValueError as error:
            error.add_note(f"while loading {found.path}")
            raise
    engine.run_event(Event.AFTER_LOAD)


def build_step(engine: Engine, options: Options, synchronizer: Synchronizer | None) -> TrainStep:
    """Build the optimizer step from the options."""
    return TrainStep(
        engine,
        precision=options.precision,
        halve_microbatches=options.halve_microbatches,
        max_nonfinite_steps=options.max_nonfinite_steps,
        step_schedulers=options.step_schedulers_every_batch,
        synchronizer=synchronizer,
    )


def default_optimizer(model: nn.Module) -> Optimizer:
    """AdamW with torch's defaults; logs a warning.

    Raises:
        ValueError: If the model has no parameters.
    """
    parameters = list(model.parameters())
    if not parameters:
        raise ValueError(f"model must have parameters to train, {type(model).__name__} has none")
    optimizer = AdamW(parameters)
    lr, weight_decay = optimizer.defaults["lr"], optimizer.defaults["weight_decay"]
    _log.warning("no optimizers were given: training with AdamW(lr=%g, weight_decay=%g)", lr, weight_decay)
    return optimizer


def _open_reader(
    state: State, dataloader: Iterable[Any], name: str, *, for_training: bool, equal_shares: bool = False
) -> EpochReader:
    return EpochReader(
        dataloader,
        name=name,
        seed=state.seed,
        rank=state.rank,
        world_size=state.world_size,
        for_training=for_training,
        equal_shares=equal_shares,
    )
