"""The options of ``etude train``, in groups. A recipe has the same names.

Nothing heavy is imported here, as ``etude --help`` reads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal


@dataclass(frozen=True)
class DataOptions:
    """Data.

    Args:
        data: A folder of images, with one folder per class, or with such folders in train/ and val/; or digits, which
            are bundled; cifar10 or cifar100 in the folder data, or cifar10:FOLDER; imagenet:FOLDER for ILSVRC 2012;
            synthetic for random images of 1000 classes, or synthetic:CLASSES.
        image_size: Height and width of the images in pixels; by default 32 for digits and CIFAR, otherwise 224.
        resize_size: Of the shorter side of evaluation images before their centre is cropped; by default 8/7 of the
            image size.
        augmentation: Of training images: none; crop_flip (the default for CIFAR); reference (random resized crop, flip,
            TrivialAugment and random erasing, the default for folders and ImageNet).
        normalization: By the mean and deviation of ImageNet, the default for folders and ImageNet, or of the data, the
            default for CIFAR.
        eval_fraction: Share of each class that is held out of a folder without val/; by default 0.2.
        split_seed: Of the choice of what is held out.
        on_corrupt: Stop at an image that cannot be read, or look for such images first and skip them.
        download: Download CIFAR to its folder if it is not there.
        num_workers: Processes that load the images; by default one per CPU and at most 8, none for digits and
            synthetic images.
    """

    data: str = "digits"
    image_size: int | None = None
    resize_size: int | None = None
    augmentation: Literal["none", "crop_flip", "reference"] | None = None
    normalization: Literal["imagenet", "data"] | None = None
    eval_fraction: float | None = None
    split_seed: int = 0
    on_corrupt: Literal["raise", "skip"] = "raise"
    download: bool = False
    num_workers: int | None = None


@dataclass(frozen=True)
class ModelOptions:
    """Model.

    Args:
        model: A network by name: of torchvision (resnet18, convnext_tiny), of timm (timm:convnext_atto), or a CIFAR
            ResNet (cifar_resnet56).
        weights: Weights to start from: a .safetensors or .pt file, a run's folder or one of its checkpoints. A last
            layer for other classes is left out.
        pretrained: Published weights to download and start from, such as IMAGENET1K_V2 of torchvision, a tag of timm,
            or DEFAULT.
        freeze: Parts that are not trained, by module name, such as conv1 layer1; backbone is everything but the
            last layer.
        drop_path_rate: Build a network of timm with drop paths of this rate, which are then skipped.
        channels_last: Keep the tensors in channels-last memory format, which is faster.
    """

    model: str = "resnet50"
    weights: str | None = None
    pretrained: str | None = None
    freeze: tuple[str, ...] = ()
    drop_path_rate: float | None = None
    channels_last: bool = True


@dataclass(frozen=True)
class OptimizationOptions:
    """Optimization.

    Args:
        max_duration: How long to train, in epochs, batches or samples: 6ep, 270ba, 8622sp.
        batch_size: Images per optimizer step, of all processes together.
        optimizer: AdamW, or SGD with momentum.
        lr: Peak learning rate.
        head_lr: Peak learning rate of the last layer; by default that of the others.
        momentum: Of SGD; by default 0.9.
        nesterov: Use Nesterov momentum in SGD.
        weight_decay: Decoupled in AdamW, L2 in SGD.
        decay_norm_and_bias: Decay the parameters of normalization layers and biases, too.
        lr_schedule: How the learning rate falls after its warmup.
        lr_warmup: How long the learning rate rises from 0, such as 0.3dur, 5ep or 500ba; 0ba for not at all.
        lr_milestones: When the multistep schedule multiplies the learning rate by lr_gamma, such as 30ep 60ep.
        lr_gamma: That factor; by default 0.1.
        lr_final: At which fraction of the peak the linear or cosine schedule ends; by default 0.
        gradient_clipping: Bound of the norm (or value) of the gradients.
        clipping_type: Clip the joint norm, each value, or each unit's norm relative to its weights (adaptive).
    """

    max_duration: str = "6ep"
    batch_size: int = 32
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 2e-3
    head_lr: float | None = None
    momentum: float | None = None
    nesterov: bool = False
    weight_decay: float = 0.01
    decay_norm_and_bias: bool = False
    lr_schedule: Literal["constant", "linear", "cosine", "multistep"] = "cosine"
    lr_warmup: str = "0.3dur"
    lr_milestones: tuple[str, ...] = ()
    lr_gamma: float | None = None
    lr_final: float | None = None
    gradient_clipping: float | None = None
    clipping_type: Literal["norm", "value", "adaptive"] = "norm"


@dataclass(frozen=True)
class RegularizationOptions:
    """Regularization.

    Args:
        label_smoothing: Weight of the uniform distribution in the targets, in [0, 1].
        mixup_alpha: Mix each image and its target with another one; the larger, the more equally.
        cutmix_alpha: Replace a box of each image by that of another one; the larger, the larger the boxes. Not with
            mixup_alpha.
        blurpool: Filter what strided layers downsample.
        progressive_resizing: Scale of height and width, in (0, 1), with which training begins.
        resizing_delay: Fraction of the training at that scale; by default 0.5.
        resizing_finetune: Fraction of the training with whole images at its end; by default 0.2.
        ema_half_life: Evaluate and keep an exponential moving average of the weights with this half-life, such as
            1000ba or 5ep.
        ema_update_interval: How often the average is updated, in the unit of its half-life.
    """

    label_smoothing: float = 0.0
    mixup_alpha: float | None = None
    cutmix_alpha: float | None = None
    blurpool: bool = False
    progressive_resizing: float | None = None
    resizing_delay: float | None = None
    resizing_finetune: float | None = None
    ema_half_life: str | None = None
    ema_update_interval: str | None = None


@dataclass(frozen=True)
class DepthOptions:
    """Stochastic depth.

    Args:
        drop_rate: Probability in [0, 1] that the last block is dropped; 0 trains the plain network. By default 0.2,
            or the rates of the network's own drop paths.
        stochastic_method: Drop a block for the whole batch, or for each sample by itself.
        drop_distribution: Rates that rise linearly with depth, or the same for every block.
        drop_unit: Drop the blocks of a transformer, or their branches separately.
        drop_warmup: How long the rates rise from 0, such as 0.2dur, 1ep or 50ba.
        start_late: No drops before this moment, such as 0.5dur or 10ep.
        stop_early: No drops from this moment on, such as 0.5dur or 10ep.
        progressive_gamma: Let the rates rise by 1 - exp(-gamma * batch), as progressive layer dropping does.
        draws: Decide for each block by itself, or balance how much is dropped from step to step.
        scaling: Multiply by 1 - rate in evaluation, the default, or by 1 / (1 - rate) in training, the default for a
            network's own drop paths.
        use_same_gpu_seed: Drop the same blocks in all processes, so that none waits for another.
        protect_projections: Never drop a block whose shortcut is not the identity.
    """

    drop_rate: float | None = None
    stochastic_method: Literal["block", "sample"] = "block"
    drop_distribution: Literal["linear", "uniform"] = "linear"
    drop_unit: Literal["block", "branch"] = "block"
    drop_warmup: str = "0.0dur"
    start_late: str | None = None
    stop_early: str | None = None
    progressive_gamma: float | None = None
    draws: Literal["independent", "balanced"] = "independent"
    scaling: Literal["evaluation", "training"] | None = None
    use_same_gpu_seed: bool = True
    protect_projections: bool = False


@dataclass(frozen=True)
class TrainerOptions:
    """How the training runs.

    Args:
        device: cpu, gpu or a torch device; by default the GPU where there is one.
        precision: Full precision, or automatic mixed precision.
        device_train_microbatch_size: Images per forward and backward pass; by default the whole batch; auto
            halves it when memory runs out.
        train_subset_num_batches: End every epoch after so many batches.
        eval_subset_num_batches: End every evaluation after so many batches.
        eval_interval: How often to evaluate, such as 1ep, 500ba or 0.1dur; 0ep for never.
        seed: Of initialisation, data order and drop plans.
        deterministic_mode: Use only deterministic kernels.
        save_interval: How often to save a checkpoint: 1ep, 500ba, 0.1dur, 10min.
        save_num_checkpoints_to_keep: How many of the newest checkpoints to keep, besides the best; -1 keeps all.
        max_nonfinite_steps: Steps in a row that may be skipped because their loss or gradients are not finite.
        parallelism: Copy the model to every process, or shard it over them.
        sync_batchnorm: Let BatchNorm see the images of all processes.
        dist_timeout: Seconds after which a process that does not answer is given up; more than a save takes.
        progress_bar: Show progress on standard error.
    """

    device: str | None = None
    precision: Literal["fp32", "amp_bf16", "amp_fp16"] = "fp32"
    device_train_microbatch_size: int | Literal["auto"] | None = None
    train_subset_num_batches: int | None = None
    eval_subset_num_batches: int | None = None
    eval_interval: str = "1ep"
    seed: int = 0
    deterministic_mode: bool = False
    save_interval: str = "1ep"
    save_num_checkpoints_to_keep: int = 2
    max_nonfinite_steps: int = 0
    parallelism: Literal["ddp", "fsdp"] = "ddp"
    sync_batchnorm: bool = False
    dist_timeout: float = 300.0
    progress_bar: bool = True


@dataclass(frozen=True)
class TrainOptions:
    """Run.

    Args:
        recipe: A recipe to start from, by name or as a file; options that are given besides replace its own.
        run_name: Name of the folder in runs/; by default the model and the time.
        resume: A run's folder, or one of its checkpoints, to resume from with the options of the run; or auto: the run
            of this name if there is one.
        dry_run: Try two batches of everything, estimate time and memory, and write nothing.
        data: Data.
        model: Model.
        optimization: Optimization.
        regularization: Regularization.
        depth: Stochastic depth.
        trainer: How the training runs.
    """

    recipe: str | None = None
    run_name: str | None = None
    resume: str | None = None
    dry_run: bool = False
    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    optimization: OptimizationOptions = field(default_factory=OptimizationOptions)
    regularization: RegularizationOptions = field(default_factory=RegularizationOptions)
    depth: DepthOptions = field(default_factory=DepthOptions)
    trainer: TrainerOptions = field(default_factory=TrainerOptions)

    def groups(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The title and the options of each group that a recipe can set."""
        for group in (self.data, self.model, self.optimization, self.regularization, self.depth, self.trainer):
            title = (type(group).__doc__ or "").partition("\n")[0]
            yield title, {option.name: getattr(group, option.name) for option in fields(group)}

    def as_dict(self) -> dict[str, Any]:
        """All options that a recipe can set, by name."""
        return {name: value for _, options in self.groups() for name, value in options.items()}

    def with_values(self, **values: Any) -> TrainOptions:
        """A copy in which options of any group are replaced."""
        changed: dict[str, Any] = {}
        for part in fields(self):
            value = getattr(self, part.name)
            if part.name in values and not hasattr(value, "__dataclass_fields__"):
                changed[part.name] = values[part.name]
            elif hasattr(value, "__dataclass_fields__"):
                names = {option.name for option in fields(value)} & values.keys()
                changed[part.name] = replace(value, **{name: values[name] for name in names})
        return replace(self, **changed)
