"""The algorithms in the contract tests, with what the tests must know about each.

A new algorithm joins by one line in `BATTERY`.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer

import etude.functional as cf
from etude import Algorithm, Trainer
from etude.algorithms import (
    EMA,
    SAM,
    ActivationCheckpointing,
    BlurPool,
    ChannelsLast,
    CutMix,
    GradientClipping,
    LabelSmoothing,
    MixUp,
    ProgressiveResizing,
    StartLate,
    StochasticDepth,
)
from etude.engine.generator import step_generator
from helpers.networks import images, tiny_resnet
from helpers.parallel_training import freeze_batchnorm
from helpers.probes import AverageWeights, ChangeBatch, ChangeLoss, CountRows, ReplaceParameters

Batch = tuple[Tensor, Tensor]
OwnLoop = Callable[[Any, Optimizer, Iterable[Batch]], None]


class Together(dict[str, Any]):
    """Settings that can only be changed together."""


@dataclass(frozen=True)
class Entry:
    """One algorithm in the battery.

    Args:
        make: Builds it; takes every setting by name.
        changes: Another value for every setting, or `Together` with those that it needs.
        by_hand: Trains a model with the functional form; None if there is none.
        equal_on_ranks: Whether two ranks give the same weights as one on the joined batches.
        only_once: Whether a second one in the same run is refused.
        shards: Whether it works with ``parallelism="fsdp"``.
        shards_to_the_bit: Whether shards then give the same bits as copies; a norm over all weights rounds differently.
        num_passes: How often it has each step run forward and backward.
        excludes: Other algorithms with which it is refused in one run.
        follows: Other algorithms that must not come after it.
    """

    make: Callable[..., Algorithm]
    changes: dict[str, Any]
    by_hand: OwnLoop | None = None
    equal_on_ranks: bool = True
    only_once: bool = False
    shards: bool = True
    shards_to_the_bit: bool = True
    num_passes: int = 1
    excludes: tuple[str, ...] = ()
    follows: tuple[str, ...] = ()
    kind: type[Algorithm] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", type(self.make()))


def train_by_hand(
    model: Any,
    optimizer: Optimizer,
    batches: Iterable[Batch],
    change: Callable[[int, Tensor, Batch], Batch] = lambda step, outputs, batch: batch,
) -> None:
    """A loop without a Trainer; `change` may replace the batch for the loss."""
    for step, batch in enumerate(batches):
        optimizer.zero_grad()
        outputs = model(batch)
        model.loss(outputs, change(step, outputs, batch)).backward()
        optimizer.step()


def smooth_by_hand(model: Any, optimizer: Optimizer, batches: Iterable[Batch]) -> None:
    train_by_hand(model, optimizer, batches, lambda _, outputs, batch: (batch[0], cf.smooth_labels(outputs, batch[1])))


def clip_by_hand(model: Any, optimizer: Optimizer, batches: Iterable[Batch]) -> None:
    for batch in batches:
        optimizer.zero_grad()
        model.loss(model(batch), batch).backward()
        cf.apply_gradient_clipping(model, "value", 0.01)
        optimizer.step()


def average_by_hand(model: Any, optimizer: Optimizer, batches: Iterable[Batch]) -> None:
    """The average does not change the training; tests of its own compare it."""
    ema_model = copy.deepcopy(model)
    for batch in batches:
        optimizer.zero_grad()
        model.loss(model(batch), batch).backward()
        optimizer.step()
        cf.compute_ema(model, ema_model, smoothing=0.75)


def checkpoint_by_hand(model: Any, optimizer: Optimizer, batches: Iterable[Batch]) -> None:
    train_by_hand(cf.apply_activation_checkpointing(model), optimizer, batches)


def is_sequential(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential)


def mix_by_hand(
    draw: Callable[..., tuple[Tensor, Tensor, float]], model: Any, optimizer: Optimizer, batches: Iterable[Batch]
) -> None:
    """A loop with mixed targets; `draw` gives inputs, targets of the partners and their weight."""
    for step, (inputs, targets) in enumerate(batches):
        mixed, partners, weight = draw(inputs, targets, generator=step_generator(0, step, stream=2))
        one_hot, one_hot_partners = (F.one_hot(each, 3).float() for each in (targets, partners))
        optimizer.zero_grad()
        outputs = model((mixed, targets))
        model.loss(outputs, (mixed, (1 - weight) * one_hot + weight * one_hot_partners)).backward()
        optimizer.step()


def draw_cutmix(inputs: Tensor, targets: Tensor, **settings: Any) -> tuple[Tensor, Tensor, float]:
    mixed, partners, area, _ = cf.cutmix_batch(inputs, targets, **settings)
    return mixed, partners, 1 - area


def blur_by_hand(model: Any, optimizer: Optimizer, batches: Iterable[Batch]) -> None:
    train_by_hand(cf.apply_blurpool(model, min_channels=4), optimizer, batches)


def channels_last_by_hand(model: Any, optimizer: Optimizer, batches: Iterable[Batch]) -> None:
    train_by_hand(cf.apply_channels_last(model), optimizer, batches)


def resize_by_hand(model: Any, optimizer: Optimizer, batches: Iterable[Batch]) -> None:
    """Images of 8 pixels in six steps: at half the size until the scale is nearer to 8 than to 4."""
    for step, (inputs, targets) in enumerate(batches):
        batch = cf.resize_batch(inputs, targets, 0.5 if step < 4 else 1.0)
        optimizer.zero_grad()
        model.loss(model(batch), batch).backward()
        optimizer.step()


def sharpen_by_hand(model: Any, optimizer: Optimizer, batches: Iterable[Batch]) -> None:
    for batch in batches:
        optimizer.zero_grad()
        model.loss(model(batch), batch).backward()
        with cf.sam_perturbation(model, rho=0.5):
            optimizer.zero_grad()
            model.loss(model(batch), batch).backward()
        optimizer.step()


def drop_by_hand(model: Any, optimizer: Optimizer, batches: Iterable[Batch]) -> None:
    train_by_hand(cf.apply_stochastic_depth(model, drop_rate=0.5), optimizer, batches)


DEPTH_CHANGES: dict[str, Any] = {
    "target_layer_name": "ResNetBottleneck",
    "stochastic_method": "sample",
    "drop_rate": 0.25,
    "drop_distribution": lambda number, count: number / count,
    "drop_warmup": "2ba",
    "use_same_gpu_seed": False,
    "drop_schedule": StartLate("2ba"),
    "draws": "balanced",
    "scaling": "training",
    "drop_unit": "branch",
    "protect_projections": True,
    "seed": 7,
}

EMA_CHANGES = {
    "half_life": "3ba",
    "smoothing": Together(half_life=None, smoothing=0.75),
    "ema_start": "2ba",
    "update_interval": "2ba",
}
CLIPPING = {"clipping_type": "value", "clipping_threshold": 0.01}
CLIPPING_CHANGES = {"clipping_type": "norm", "clipping_threshold": 0.1}

MIXING_CHANGES = {"alpha": 0.5, "interpolate_loss": True, "input_key": "x", "target_key": "y"}
MIXUP = partial(mix_by_hand, cf.mixup_batch)
CUTMIX = partial(mix_by_hand, draw_cutmix)
BLUR_CHANGES = {
    "replace_convs": Together(replace_convs=False, min_channels=16),
    "replace_maxpools": False,
    "blur_first": False,
    "min_channels": 8,
}
SAM_CHANGES = {"rho": 0.1, "epsilon": 1e-6, "interval": 2}
RESIZING_CHANGES = {
    "mode": "crop",
    "initial_scale": 0.25,
    "finetune_fraction": 0.1,
    "delay_fraction": 0.25,
    "size_increment": 2,
    "resize_targets": True,
    "input_key": "x",
    "target_key": "y",
}

BATTERY: dict[str, Entry] = {
    "ActivationCheckpointing": Entry(
        ActivationCheckpointing, {"checkpoint_fn": is_sequential}, checkpoint_by_hand, only_once=True
    ),
    "BlurPool": Entry(partial(BlurPool, min_channels=4), BLUR_CHANGES, blur_by_hand, only_once=True),
    "ChannelsLast": Entry(ChannelsLast, {}, channels_last_by_hand, shards=False),
    "CutMix": Entry(CutMix, {**MIXING_CHANGES, "uniform_sampling": True}, CUTMIX, equal_on_ranks=False, only_once=True),
    "EMA": Entry(partial(EMA, half_life="2ba"), EMA_CHANGES, average_by_hand),
    "GradientClipping": Entry(partial(GradientClipping, **CLIPPING), CLIPPING_CHANGES, clip_by_hand),
    "LabelSmoothing": Entry(LabelSmoothing, {"smoothing": 0.2, "target_key": "y"}, smooth_by_hand),
    "MixUp": Entry(MixUp, MIXING_CHANGES, MIXUP, equal_on_ranks=False, only_once=True, excludes=("CutMix",)),
    "ProgressiveResizing": Entry(ProgressiveResizing, RESIZING_CHANGES, resize_by_hand, only_once=True),
    "SAM": Entry(
        partial(SAM, rho=0.5),
        SAM_CHANGES,
        sharpen_by_hand,
        only_once=True,
        shards_to_the_bit=False,
        num_passes=2,
        follows=("GradientClipping",),
    ),
    "StochasticDepth": Entry(partial(StochasticDepth, drop_rate=0.5), DEPTH_CHANGES, drop_by_hand, only_once=True),
    "AverageWeights": Entry(AverageWeights, {"decay": 0.5}),
    "ChangeBatch": Entry(ChangeBatch, {"scale": 0.25}),
    "ChangeLoss": Entry(ChangeLoss, {"weight": 0.5}),
    "ReplaceParameters": Entry(ReplaceParameters, {"scale": 0.25}),
    "CountRows": Entry(CountRows, {"weight": 2.0}),
}


def make_model(frozen_batchnorm: bool = False) -> Any:
    """A small residual network; with frozen BatchNorm no row depends on the others of its batch."""
    torch.manual_seed(5)
    model: nn.Module = tiny_resnet(num_blocks=3, stride=2)
    return freeze_batchnorm(model) if frozen_batchnorm else model


def sgd(model: nn.Module) -> SGD:
    return SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def make_trainer(algorithms: Any, model: Any = None, duration: str = "2ep", **settings: Any) -> Trainer:
    """A training of up to two epochs of three batches, in shuffled order."""
    model = make_model() if model is None else model
    return Trainer(
        model,
        images(num_samples=12, batch_size=4, shuffle=True),
        settings.pop("eval_dataloader", images(num_samples=4)),
        duration,
        algorithms,
        sgd(model),
        device="cpu",
        progress_bar=False,
        **settings,
    )


def result_of(trainer: Trainer) -> dict[str, Any]:
    """Everything that the rest of the training depends on; sharded tensors gathered."""
    state = trainer.state
    return {
        "model": _full(dict(state.model.state_dict())),
        "optimizers": _full([optimizer.state_dict() for optimizer in state.optimizers]),
        "algorithms": _full([(a.state_dict(), a.rank_state_dict()) for a in state.algorithms]),
        "generator": torch.get_rng_state(),
        "eval_metrics": dict(state.eval_metrics),
        "timestamp": state.timestamp,
    }


def _full(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.full_tensor() if hasattr(value, "full_tensor") else value.detach().clone()
    if isinstance(value, dict):
        return {key: _full(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_full(item) for item in value)
    return value
