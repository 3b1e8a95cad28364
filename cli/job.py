"""A training as the options of ``etude train`` describe it: data, network and Trainer, ready to run."""

from __future__ import annotations

import copy
from collections.abc import Sized
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ..algorithms import EMA, StochasticDepth
from ..callbacks import SpeedMonitor
from ..datasets import ImageDataloaders
from ..engine import Algorithm
from ..models import ComposerClassifier, find_head
from ..trainer import CheckpointSaver, Trainer, distributed
from ..trainer.checks import (
    check_device,
    check_duration,
    check_eval_interval,
    check_run_name,
    check_seed,
    check_timeout,
)
from .algorithms import build_others, build_stochastic_depth
from .data import eval_resize_size, load_data, resolve
from .network import as_classifier, build_network, check_images_fit, freeze, start_from_weights
from .optimization import build_optimizer, build_schedule, check_optimization
from .options import TrainOptions
from .resume import check_folder, check_same_classes, locate
from .start import CHECKPOINTS
from .two_batches import TwoBatches

BEST = "max:metrics/eval/MulticlassAccuracy"

# Arguments of the Trainer that do not have the name of an option.
_FOR_SAVER = ("save_interval", "save_num_checkpoints_to_keep")


@dataclass(frozen=True)
class Job:
    """A training that can start.

    Args:
        options: With nothing left to be decided.
        data: The dataloaders, and what is known of them.
        resize_size: Of the shorter side of an evaluation image, before its centre is cropped.
        trainer: Built, and loaded if the run is resumed.
        stochastic_depth: None for a plain network.
        folder: Of the run.
    """

    options: TrainOptions
    data: ImageDataloaders
    resize_size: int
    trainer: Trainer
    stochastic_depth: StochasticDepth | None
    folder: Path

    @property
    def network(self) -> nn.Module:
        """The network without its wrapper."""
        return cast(ComposerClassifier, self.trainer.state.model).module

    def averaged_network(self) -> nn.Module:
        """A copy of the network with the averages of its weights, or the network itself where there are none."""
        ema = next((algorithm for algorithm in self.trainer.state.algorithms if isinstance(algorithm, EMA)), None)
        if ema is None:
            return self.network
        return cast(ComposerClassifier, ema.get_ema_model(copy.deepcopy(self.trainer.state.model))).module


def build(options: TrainOptions) -> Job:
    """Build a training. Bad options are refused before anything is written.

    Raises:
        ValueError: If an option is bad, or the run cannot be resumed with these options.
        OSError: If the data are not there, there is a run of this name, or its folder cannot be written.
    """
    options = resolve_options(options)
    optimization, depth = options.optimization, options.depth
    stochastic_depth = build_stochastic_depth(depth, has_own_rates=options.model.drop_path_rate is not None)
    algorithms = build_others(options.regularization, optimization, channels_last=options.model.channels_last)
    check_duration("max_duration", optimization.max_duration)
    check_seed("seed", options.trainer.seed)
    device = check_device("device", options.trainer.device)
    distributed.join_process_group(device, check_timeout("dist_timeout", options.trainer.dist_timeout))
    run_name, start = locate(options)
    folder = Path("runs").absolute() / check_run_name("run_name", run_name)
    check_folder(folder)
    data = load_data(options.data, optimization.batch_size)
    if start:
        check_same_classes(folder, data.class_names)
    classifier = _build_classifier(options, data, is_new=not start)
    trainer = _build_trainer(
        options,
        data,
        classifier,
        algorithms if stochastic_depth is None else [stochastic_depth, *algorithms],
        folder,
        start,
    )
    return Job(options, data, eval_resize_size(options.data), trainer, stochastic_depth, folder)


def resolve_options(options: TrainOptions) -> TrainOptions:
    """The options with their defaults for the data, and with absolute paths.

    Raises:
        ValueError: If an option is out of its range, or has no effect with the others.
    """
    check_optimization(options.optimization)
    if options.resume is not None and options.dry_run:
        raise ValueError("dry_run must be without resume: it starts no run, and resumes none")
    options = replace(options, data=resolve(options.data))
    if options.model.weights is not None:
        weights = str(Path(options.model.weights).absolute())
        options = replace(options, model=replace(options.model, weights=weights))
    return options


def _build_classifier(options: TrainOptions, data: ImageDataloaders, *, is_new: bool) -> ComposerClassifier:
    """The network with its initial weights, which are a function of the seed."""
    torch.manual_seed(options.trainer.seed)
    network = build_network(options.model, data.num_classes, data.image_size)
    if options.model.weights is not None and is_new:
        is_quiet = distributed.rank() != 0
        start_from_weights(network, options.model.weights, data.num_classes, is_quiet=is_quiet)
    check_images_fit(network, data.image_size, _fewest_rows(options, data))
    freeze(network, options.model.freeze, data.num_classes)
    return as_classifier(network, data.num_classes)


def _fewest_rows(options: TrainOptions, data: ImageDataloaders) -> int:
    """The smallest number of images in a forward pass of the training."""
    loader, size = data.train_dataloader, options.optimization.batch_size
    last = len(cast(Sized, loader.dataset)) % size
    batches = [size] if loader.drop_last or last == 0 else [size, last]
    if len(cast(Sized, loader.dataset)) < size:
        batches = [last]
    rows = [batch // distributed.world_size() for batch in batches]
    if isinstance(part := options.trainer.device_train_microbatch_size, int) and part > 0:
        rows = [min(part, count, count % part or part) for count in rows]
    return max(1, min(rows))


def _build_trainer(
    options: TrainOptions,
    data: ImageDataloaders,
    classifier: ComposerClassifier,
    algorithms: list[Algorithm],
    folder: Path,
    start: dict[str, Any],
) -> Trainer:
    settings = options.trainer
    head = find_head(classifier.module, data.num_classes)
    if options.dry_run:
        start = {"progress_bar": False, "eval_subset_num_batches": 2}
    evaluates = check_eval_interval("eval_interval", settings.eval_interval).value > 0
    saver = CheckpointSaver(
        folder / CHECKPOINTS,
        settings.save_interval,
        num_to_keep=settings.save_num_checkpoints_to_keep,
        best=BEST if evaluates else None,
    )
    arguments = {name: value for name, value in asdict(settings).items() if name not in _FOR_SAVER}
    return Trainer(
        classifier,
        data.train_dataloader,
        data.eval_dataloader,
        options.optimization.max_duration,
        algorithms=algorithms,
        optimizers=build_optimizer(options.optimization, classifier.module, head),
        schedulers=build_schedule(options.optimization),
        callbacks=[SpeedMonitor(), TwoBatches() if options.dry_run else saver],
        run_name=None if options.dry_run else folder.name,
        **{**arguments, **start},
    )
