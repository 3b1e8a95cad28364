"""What was probably meant by an option that does not exist."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from inspect import signature
from typing import Any, get_type_hints

# Names that other tools have for these options.
_FOREIGN = {
    "epochs": "max-duration",
    "max-epochs": "max-duration",
    "num-epochs": "max-duration",
    "steps": "max-duration",
    "learning-rate": "lr",
    "lr0": "lr",
    "wd": "weight-decay",
    "opt": "optimizer",
    "sched": "lr-schedule",
    "scheduler": "lr-schedule",
    "lr-scheduler": "lr-schedule",
    "warmup": "lr-warmup",
    "warmup-epochs": "lr-warmup",
    "lr-warmup-epochs": "lr-warmup",
    "min-lr": "lr-final",
    "clip-grad": "gradient-clipping",
    "clip-grad-norm": "gradient-clipping",
    "drop": "drop-rate",
    "drop-path": "drop-path-rate",
    "stochastic-depth-prob": "drop-path-rate",
    "arch": "model",
    "a": "model",
    "net": "model",
    "b": "batch-size",
    "batch": "batch-size",
    "bs": "batch-size",
    "grad-accum-steps": "device-train-microbatch-size",
    "d": "data",
    "data-dir": "data",
    "data-path": "data",
    "dataset": "data",
    "root": "data",
    "j": "num-workers",
    "workers": "num-workers",
    "img-size": "image-size",
    "imgsz": "image-size",
    "input-size": "image-size",
    "train-crop-size": "image-size",
    "val-resize-size": "resize-size",
    "aa": "augmentation",
    "auto-augment": "augmentation",
    "val-split": "eval-fraction",
    "smoothing": "label-smoothing",
    "mixup": "mixup-alpha",
    "cutmix": "cutmix-alpha",
    "model-ema": "ema-half-life",
    "ema": "ema-half-life",
    "model-ema-decay": "ema-half-life",
    "output": "run-name",
    "output-dir": "run-name",
    "experiment": "run-name",
    "exp": "run-name",
    "name": "run-name",
    "config": "recipe",
    "c": "recipe",
    "amp": "precision",
    "amp-dtype": "precision",
    "fp16": "precision",
    "bf16": "precision",
    "gpu": "device",
    "gpus": "device",
    "initial-checkpoint": "weights",
    "finetune": "weights",
    "checkpoint": "weights",
    "ckpt-path": "resume",
    "sync-bn": "sync-batchnorm",
    "use-deterministic-algorithms": "deterministic-mode",
    "limit-train-batches": "train-subset-num-batches",
    "fast-dev-run": "dry-run",
    "topk": "top-k",
    "k": "top-k",
}


def nearest_option(name: str, known: list[str]) -> str | None:
    """The option that was probably meant.

    Args:
        name: A name without leading dashes.
        known: The names that exist, with hyphens.
    """
    name = name.replace("_", "-").lower()
    if name in known or (foreign := _FOREIGN.get(name)) is None or foreign not in known:
        close = get_close_matches(name, known, n=1)
        return close[0] if close else None
    return foreign


def option_types(thing: Any) -> dict[str, Any]:
    """The name, with hyphens, and the type of each option of a function or of a dataclass and its groups."""
    return dict(_options(thing))


def _options(thing: Any) -> Iterator[tuple[str, Any]]:
    hints = get_type_hints(thing)
    names = [option.name for option in fields(thing)] if is_dataclass(thing) else list(signature(thing).parameters)
    for name in names:
        if is_dataclass(hints[name]):
            yield from _options(hints[name])
        else:
            yield name.replace("_", "-"), hints[name]
