"""The algorithms of a training."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from .options import DepthOptions, OptimizationOptions, RegularizationOptions

if TYPE_CHECKING:
    from ..algorithms import StochasticDepth
    from ..engine import Algorithm

_OVER_TIME = ("start_late", "stop_early", "progressive_gamma")


def build_stochastic_depth(options: DepthOptions, *, has_own_rates: bool = False) -> StochasticDepth | None:
    """Stochastic depth; None for a plain network.

    Args:
        options: The options.
        has_own_rates: Whether the network is built with drop paths of its own.

    Raises:
        ValueError: If an option is out of its range, or has no effect.
    """
    from ..algorithms import StochasticDepth
    from ..algorithms.stochastic_depth import ProgressiveLayerDrop, StartLate, StopEarly

    if has_own_rates and options.drop_rate is not None:
        raise ValueError(f"drop_rate must not come with drop_path_rate, which sets the rates, got {options.drop_rate}")
    if options.drop_rate == 0:
        for option in fields(options):
            if (value := getattr(options, option.name)) not in (option.default, 0):
                raise ValueError(f"{option.name} must come with a drop_rate above 0 to have an effect, got {value!r}")
        return None
    schedules: list[Any] = []
    if options.start_late is not None:
        schedules.append(StartLate(options.start_late))
    if options.stop_early is not None:
        schedules.append(StopEarly(options.stop_early))
    if options.progressive_gamma is not None:
        schedules.append(ProgressiveLayerDrop(options.progressive_gamma))
    settings = {name: value for name, value in asdict(options).items() if name not in _OVER_TIME}
    return StochasticDepth(**settings, drop_schedule=schedules or None)


def build_others(
    regularization: RegularizationOptions, optimization: OptimizationOptions, *, channels_last: bool
) -> list[Algorithm]:
    """All algorithms but stochastic depth, in the order in which they act.

    Raises:
        ValueError: If an option is out of its range, or has no effect.
    """
    from ..algorithms import EMA, BlurPool, ChannelsLast, CutMix, GradientClipping, LabelSmoothing, MixUp

    _check_together(regularization)
    found: list[Algorithm] = [BlurPool()] if regularization.blurpool else []
    if channels_last:
        found.append(ChannelsLast())
    if regularization.progressive_resizing is not None:
        found.append(_build_resizing(regularization))
    if regularization.mixup_alpha is not None:
        found.append(MixUp(regularization.mixup_alpha))
    if regularization.cutmix_alpha is not None:
        found.append(CutMix(regularization.cutmix_alpha))
    if regularization.label_smoothing:
        found.append(LabelSmoothing(regularization.label_smoothing))
    if optimization.gradient_clipping is not None:
        found.append(GradientClipping(optimization.clipping_type, optimization.gradient_clipping))
    if regularization.ema_half_life is not None:
        found.append(EMA(regularization.ema_half_life, update_interval=regularization.ema_update_interval))
    return found


def _check_together(options: RegularizationOptions) -> None:
    needs = {
        "ema_update_interval": "ema_half_life",
        "resizing_delay": "progressive_resizing",
        "resizing_finetune": "progressive_resizing",
    }
    for name, needed in needs.items():
        if (value := getattr(options, name)) is not None and getattr(options, needed) is None:
            raise ValueError(f"{name} must come with {needed} to have an effect, got {value!r}")
    if options.mixup_alpha is not None and options.cutmix_alpha is not None:
        raise ValueError(
            f"mixup_alpha must not come with cutmix_alpha, as a batch is mixed once, got {options.mixup_alpha} and "
            f"{options.cutmix_alpha}"
        )


def _build_resizing(options: RegularizationOptions) -> Algorithm:
    from ..algorithms import ProgressiveResizing

    assert options.progressive_resizing is not None, "the caller has checked it"
    fractions = {"delay_fraction": options.resizing_delay, "finetune_fraction": options.resizing_finetune}
    given: dict[str, Any] = {name: value for name, value in fractions.items() if value is not None}
    return ProgressiveResizing(initial_scale=options.progressive_resizing, **given)
