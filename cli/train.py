"""``etude train``: the main job, a residual network with stochastic depth on real images."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

from .packages import check_packages

ModelName = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]


def train(
    model: ModelName = "resnet50",
    max_duration: str = "6ep",
    batch_size: int = 32,
    image_size: int = 32,
    lr: float = 2e-3,
    weight_decay: float = 0.01,
    drop_rate: float = 0.2,
    stochastic_method: Literal["block", "sample"] = "block",
    drop_distribution: Literal["linear", "uniform"] = "linear",
    drop_warmup: str = "0.0dur",
    start_late: str | None = None,
    stop_early: str | None = None,
    progressive_gamma: float | None = None,
    draws: Literal["independent", "balanced"] = "independent",
    scaling: Literal["evaluation", "training"] = "evaluation",
    use_same_gpu_seed: bool = True,
    protect_projections: bool = False,
    label_smoothing: float = 0.0,
    device: str | None = None,
    precision: Literal["fp32", "amp_bf16", "amp_fp16"] = "fp32",
    device_train_microbatch_size: int | Literal["auto"] | None = None,
    eval_interval: str = "1ep",
    seed: int = 0,
    deterministic_mode: bool = False,
    channels_last: bool = True,
    num_workers: int = 0,
    save_interval: str = "1ep",
    save_num_checkpoints_to_keep: int = 2,
    resume: str | None = None,
    max_nonfinite_steps: int = 0,
    dist_timeout: float = 300.0,
    run_name: str | None = None,
    progress_bar: bool = True,
) -> None:
    """Train a ResNet with stochastic depth on the handwritten digits that scikit-learn ships.

    Ends with a table of the results. The folder runs/<run-name> then holds the same numbers
    (summary.json), the metrics of every batch (metrics.jsonl, metrics.csv), the settings
    (settings.json), the weights (weights.pt), a picture of the run (run.png) and its newest checkpoints.
    Ctrl-C and SIGTERM finish the running step and save; --resume goes on from there, to the same end bit by
    bit. On several processes: torchrun --nproc-per-node 2 -m etude train.

    Args:
        model: Which ResNet.
        max_duration: How long to train, in epochs, batches or samples: 6ep, 270ba, 8622sp.
        batch_size: Images per optimizer step, of all processes together.
        image_size: Height and width of the images in pixels.
        lr: Peak learning rate of the one-cycle schedule (AdamW).
        weight_decay: Weight decay of AdamW.
        drop_rate: Probability in [0, 1] that the last block is dropped; 0 trains the plain network.
        stochastic_method: Drop a block for the whole batch, or for each sample by itself.
        drop_distribution: Rates that rise linearly with depth, or the same for every block.
        drop_warmup: How long the rates rise from 0, such as 0.2dur, 1ep or 50ba.
        start_late: No drops before this moment, such as 0.5dur or 10ep.
        stop_early: No drops from this moment on, such as 0.5dur or 10ep.
        progressive_gamma: Let the rates rise by 1 - exp(-gamma * batch), as progressive layer dropping does.
        draws: Decide for each block by itself, or balance how much is dropped from step to step.
        scaling: Multiply by 1 - rate in evaluation, or by 1 / (1 - rate) in training.
        use_same_gpu_seed: Drop the same blocks in all processes, so that none waits for another.
        protect_projections: Never drop a block whose shortcut is not the identity.
        label_smoothing: Weight of the uniform distribution in the targets, in [0, 1].
        device: cpu, gpu or a torch device; by default the GPU where there is one.
        precision: Full precision, or automatic mixed precision.
        device_train_microbatch_size: Images per forward and backward pass; by default the whole batch; auto
            halves it when memory runs out.
        eval_interval: How often to evaluate, in epochs or batches.
        seed: Of initialisation, data order and drop plans.
        deterministic_mode: Use only deterministic kernels.
        channels_last: Keep the tensors in channels-last memory format, which is faster.
        num_workers: Processes that load the images.
        save_interval: How often to save a checkpoint: 1ep, 500ba, 0.1dur, 10min.
        save_num_checkpoints_to_keep: How many of the newest checkpoints to keep; -1 keeps all.
        resume: A run's folder, or one of its checkpoints, to go on from; or auto: the run of this name if there
            is one. Settings that would make it a different training are refused.
        max_nonfinite_steps: Steps in a row that may be left out because their loss is NaN or infinite.
        dist_timeout: Seconds after which a process that does not answer is given up; more than a save takes.
        run_name: Name of the folder in runs/; by default the model and the time.
        progress_bar: Show progress on standard error.
    """
    check_packages("train", "sklearn", "matplotlib")
    import torch
    from torch.optim import AdamW
    from torch.optim.lr_scheduler import OneCycleLR

    from ..algorithms import LabelSmoothing, StochasticDepth
    from ..algorithms.stochastic_depth import ProgressiveLayerDrop, StartLate, StopEarly
    from ..datasets import digits_dataloaders
    from ..models import composer_resnet
    from ..trainer import Trainer, distributed
    from ..trainer.checks import check_device, check_seed, check_timeout
    from .report import report
    from .resume import CHECKPOINTS, locate
    from .weights import save_weights

    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be a positive number, got {lr}")
    stochastic_depth = StochasticDepth(
        stochastic_method=stochastic_method,
        drop_rate=drop_rate,
        drop_distribution=drop_distribution,
        drop_warmup=drop_warmup,
        drop_schedule=[
            *([StartLate(start_late)] if start_late is not None else []),
            *([StopEarly(stop_early)] if stop_early is not None else []),
            *([ProgressiveLayerDrop(progressive_gamma)] if progressive_gamma is not None else []),
        ],
        draws=draws,
        scaling=scaling,
        use_same_gpu_seed=use_same_gpu_seed,
        protect_projections=protect_projections,
    )
    smoothing = [LabelSmoothing(label_smoothing)] if label_smoothing else []
    distributed.join_process_group(check_device("device", device), check_timeout("dist_timeout", dist_timeout))
    digits = digits_dataloaders(batch_size, image_size, num_workers)
    train_dataloader, eval_dataloader = digits.train_dataloader, digits.eval_dataloader
    num_batches = count_batches(max_duration, train_dataloader)

    torch.manual_seed(check_seed("seed", seed))
    network = composer_resnet(model, num_classes=10)
    if channels_last:
        network.to(memory_format=torch.channels_last)
    optimizer = AdamW(network.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    run_name, going_on = locate(resume, run_name, model)
    folder = Path("runs") / run_name
    trainer = Trainer(
        network,
        train_dataloader,
        eval_dataloader,
        max_duration,
        algorithms=[stochastic_depth, *smoothing],
        optimizers=optimizer,
        schedulers=OneCycleLR(optimizer, max_lr=lr, total_steps=num_batches),
        step_schedulers_every_batch=True,
        device=device,
        precision=precision,
        device_train_microbatch_size=device_train_microbatch_size,
        eval_interval=eval_interval,
        seed=seed,
        deterministic_mode=deterministic_mode,
        run_name=run_name,
        progress_bar=progress_bar,
        save_folder=folder / CHECKPOINTS,
        save_interval=save_interval,
        save_num_checkpoints_to_keep=save_num_checkpoints_to_keep,
        max_nonfinite_steps=max_nonfinite_steps,
        dist_timeout=dist_timeout,
        **going_on,
    )
    trainer.fit()
    trainer.close()
    if trainer.state.rank != 0:
        return
    save_weights(folder / "weights.pt", model, network.module, stochastic_depth, image_size)
    report(folder, network, stochastic_depth, image_size)


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
