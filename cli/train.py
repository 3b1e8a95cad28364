"""``etude train``: the main job, a residual network with stochastic depth on real images."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from ..algorithms import StochasticDepth
    from ..models import ComposerClassifier
    from ..trainer import Trainer

from .options import DepthOptions, TrainerOptions
from .packages import check_packages

ModelName = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]


@dataclass(frozen=True)
class TrainOptions:
    """The options of ``etude train``.

    Args:
        model: Which ResNet.
        max_duration: How long to train, in epochs, batches or samples: 6ep, 270ba, 8622sp.
        batch_size: Images per optimizer step, of all processes together.
        image_size: Height and width of the images in pixels.
        lr: Peak learning rate of the one-cycle schedule (AdamW).
        weight_decay: Weight decay of AdamW.
        depth: Stochastic depth.
        label_smoothing: Weight of the uniform distribution in the targets, in [0, 1].
        channels_last: Keep the tensors in channels-last memory format, which is faster.
        num_workers: Processes that load the images.
        run_name: Name of the folder in runs/; by default the model and the time.
        resume: A run's folder, or one of its checkpoints, to resume from; or auto: the run of this name if there is
            one. Options that would make it a different training are refused.
        trainer: How the training runs.
    """

    model: ModelName = "resnet50"
    max_duration: str = "6ep"
    batch_size: int = 32
    image_size: int = 32
    lr: float = 2e-3
    weight_decay: float = 0.01
    depth: DepthOptions = field(default_factory=DepthOptions)
    label_smoothing: float = 0.0
    channels_last: bool = True
    num_workers: int = 0
    run_name: str | None = None
    resume: str | None = None
    trainer: TrainerOptions = field(default_factory=TrainerOptions)


def train(run: TrainOptions) -> None:
    """Train a ResNet with stochastic depth on the handwritten digits that scikit-learn ships.

    Ends with a table of the results. The folder runs/<run-name> then holds the same numbers
    (summary.json), the metrics of every batch (metrics.jsonl, metrics.csv), the settings
    (settings.json, options.json), the weights (weights.pt), a picture of the run (run.png) and its newest
    checkpoints. Ctrl-C and SIGTERM finish the running step and save; --resume continues from there, to a
    bit-identical end. On several processes: torchrun --nproc-per-node 2 -m etude train.
    """
    check_packages("train", "sklearn", "matplotlib")
    from ..trainer import TrainingInterrupted
    from .report import report
    from .resume import announce, continuing_command, keep_options
    from .weights import save_weights

    trainer, stochastic_depth, folder = build(run)
    keep_options(run, folder, trainer.state)
    announce(trainer.state, folder)
    try:
        trainer.fit()
    except TrainingInterrupted as stop:
        stop.add_note(f"continue it with: {continuing_command(run, folder)}")
        raise
    trainer.close()
    if trainer.state.rank == 0:
        network: Any = trainer.state.model
        save_weights(folder / "weights.pt", run.model, network.module, stochastic_depth, run.image_size)
        report(folder, network, stochastic_depth, run.image_size)


def build(options: TrainOptions) -> tuple[Trainer, StochasticDepth, Path]:
    """The Trainer of these options, its algorithm, and the folder of the run.

    Raises:
        ValueError: If an option is bad, or the run cannot be resumed with these options.
        FileExistsError: If there is a run of this name, and it is not to be resumed.
    """
    from torch.optim import AdamW
    from torch.optim.lr_scheduler import OneCycleLR

    from ..algorithms import LabelSmoothing
    from ..datasets import digits_dataloaders
    from ..engine.checks import check_number
    from ..trainer import Trainer, distributed
    from ..trainer.checks import check_device, check_run_name, check_timeout
    from .resume import CHECKPOINTS, locate

    check_number("lr", options.lr, gt=0)
    stochastic_depth = options.depth.build()
    smoothing = [LabelSmoothing(options.label_smoothing)] if options.label_smoothing else []
    device = check_device("device", options.trainer.device)
    distributed.join_process_group(device, check_timeout("dist_timeout", options.trainer.dist_timeout))
    digits = digits_dataloaders(options.batch_size, options.image_size, options.num_workers)
    num_batches = count_batches(options.max_duration, digits.train_dataloader)
    network = build_network(options)
    optimizer = AdamW(network.parameters(), lr=options.lr, weight_decay=options.weight_decay, fused=True)
    run_name, start = locate(options)
    folder = Path("runs").absolute() / check_run_name("run_name", run_name)
    trainer = Trainer(
        network,
        digits.train_dataloader,
        digits.eval_dataloader,
        options.max_duration,
        algorithms=[stochastic_depth, *smoothing],
        optimizers=optimizer,
        schedulers=OneCycleLR(optimizer, max_lr=options.lr, total_steps=num_batches),
        step_schedulers_every_batch=True,
        run_name=run_name,
        save_folder=folder / CHECKPOINTS,
        **asdict(options.trainer),
        **start,
    )
    return trainer, stochastic_depth, folder


def build_network(options: TrainOptions) -> ComposerClassifier:
    """The network with its initial weights, a function of the seed."""
    import torch

    from ..models import composer_resnet
    from ..trainer.checks import check_seed

    torch.manual_seed(check_seed("seed", options.trainer.seed))
    network = composer_resnet(options.model, num_classes=10)
    if options.channels_last:
        network.to(memory_format=torch.channels_last)
    return network


def count_batches(max_duration: str, dataloader: DataLoader[Any]) -> int:
    """The number of batches that a training of this duration takes."""
    from ..trainer.checks import check_duration

    duration = check_duration("max_duration", max_duration)
    if duration.unit.value == "ba":
        return int(duration)
    if duration.unit.value == "ep":
        return int(duration) * len(dataloader)
    epochs, samples = divmod(int(duration), len(dataloader.dataset))  # type: ignore[arg-type]  # the digits have a length
    return epochs * len(dataloader) + math.ceil(samples / (dataloader.batch_size or 1))
