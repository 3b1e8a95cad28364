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


def build_others(regularization: RegularizationOptions, optimization: OptimizationOptions) -> list[Algorithm]:
    """All algorithms but stochastic depth, in the order in which they act.

    Raises:
        ValueError: If an option is out of its range, or has no effect.
    """
    from ..algorithms import EMA, GradientClipping, LabelSmoothing

    found: list[Algorithm] = []
    if regularization.label_smoothing:
        found.append(LabelSmoothing(regularization.label_smoothing))
    if optimization.gradient_clipping is not None:
        found.append(GradientClipping(optimization.clipping_type, optimization.gradient_clipping))
    if regularization.ema_half_life is not None:
        found.append(EMA(regularization.ema_half_life, update_interval=regularization.ema_update_interval))
    elif regularization.ema_update_interval is not None:
        raise ValueError(
            f"ema_update_interval must come with ema_half_life to have an effect, got "
            f"{regularization.ema_update_interval!r}"
        )
    return found
