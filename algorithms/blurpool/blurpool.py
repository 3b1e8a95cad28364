"""BlurPool: filters what strided layers downsample, so that small shifts of an image change the outputs less."""

import logging
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...engine import Algorithm, Event, Logger, State
from ...engine.checks import check_int
from ..exclusion import check_only_one
from .layers import BlurConv2d, BlurMaxPool2d

_log = logging.getLogger(__name__)

_MIN_CHANNELS = 16  # Composer's


def apply_blurpool(
    model: nn.Module,
    replace_convs: bool = True,
    replace_maxpools: bool = True,
    blur_first: bool = True,
    min_channels: int = _MIN_CHANNELS,
) -> nn.Module:
    """Add a low-pass filter to strided `Conv2d` and `MaxPool2d` layers (Zhang 2019, arXiv:1904.11486).

    Objects, parameters and their names stay the same, so that optimizers and weights of the plain network fit as
    before. The ``state_dict`` has one more entry for each converted layer, so that its weights do not load into a plain
    network, which computes something else. Layers of subclasses, which may compute something else, are left alone and
    named in a warning.

    Args:
        model: Changed in place.
        replace_convs: Whether to convert strided convolutions to `BlurConv2d`.
        replace_maxpools: Whether to convert strided max-poolings to `BlurMaxPool2d`.
        blur_first: Whether convolutions filter their input. Otherwise they compute all pixels and filter their output,
            as in the paper, which takes about as many times longer as they have pixels more.
        min_channels: Convolutions of fewer input channels are left alone, such as the first one of a network.

    Returns:
        `model` itself.

    Raises:
        TypeError: If a switch is not a bool.
        ValueError: If an argument has no effect or is out of range, or the model has no layer to convert. The model is
            then unchanged.
    """
    check_settings(replace_convs, replace_maxpools, blur_first, min_channels)
    convs, pools, others = [], [], []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d) and replace_convs and max(layer.stride) > 1:
            if type(layer) is not nn.Conv2d or (layer.padding_mode != "zeros" and not blur_first):
                others.append(name)
            elif layer.in_channels >= min_channels:
                convs.append(layer)
        elif isinstance(layer, nn.MaxPool2d) and replace_maxpools and _is_strided(layer):
            if type(layer) is not nn.MaxPool2d or layer.ceil_mode or layer.return_indices:
                others.append(name)
            else:
                pools.append(layer)
    if not convs and not pools:
        raise ValueError(f"model must have strided layers to convert, {type(model).__name__} has none{_named(others)}")
    for conv in convs:
        BlurConv2d.convert(conv, blur_first)
    for pool in pools:
        BlurMaxPool2d.convert(pool)
    _log.info("BlurPool filters %d convolutions and %d max-poolings", len(convs), len(pools))
    if others:
        _log.warning("BlurPool leaves %d strided layers alone%s", len(others), _named(others))
    return model


def check_settings(replace_convs: bool, replace_maxpools: bool, blur_first: bool, min_channels: int) -> None:
    """Validate the settings of BlurPool."""
    switches = {"replace_convs": replace_convs, "replace_maxpools": replace_maxpools, "blur_first": blur_first}
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")
    check_int("min_channels", min_channels, ge=1)
    if not replace_convs and not replace_maxpools:
        raise ValueError("one of replace_convs and replace_maxpools must be True, got False for both")
    if not replace_convs and (not blur_first or min_channels != _MIN_CHANNELS):
        raise ValueError(
            "blur_first and min_channels are settings of convolutions and must not be given with replace_convs=False, "
            f"got {blur_first} and {min_channels}"
        )


@dataclass(eq=False, repr=False)
class BlurPool(Algorithm):
    """Adds a low-pass filter to strided layers at INIT (Zhang 2019), see `apply_blurpool`.

    Args:
        replace_convs: Whether to convert strided convolutions.
        replace_maxpools: Whether to convert strided max-poolings.
        blur_first: Whether convolutions filter their input. Otherwise they compute all pixels and filter their output,
            as in the paper, which takes about as many times longer as they have pixels more.
        min_channels: Convolutions of fewer input channels are left alone, such as the first one of a network.

    Raises:
        TypeError: If a switch is not a bool.
        ValueError: If an argument has no effect or is out of range; at INIT, if there is a second one, or the model has
            no layer to convert.
    """

    replace_convs: bool = True
    replace_maxpools: bool = True
    blur_first: bool = True
    min_channels: int = _MIN_CHANNELS

    def __post_init__(self) -> None:
        check_settings(self.replace_convs, self.replace_maxpools, self.blur_first, self.min_channels)

    def check_state(self, state: State) -> None:
        """Refuse a second one.

        Raises:
            ValueError: If there is one.
        """
        check_only_one(self, state, "each layer is filtered once")

    def match(self, event: Event, state: State) -> bool:
        """At INIT."""
        return event is Event.INIT

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Convert the model."""
        apply_blurpool(state.model, self.replace_convs, self.replace_maxpools, self.blur_first, self.min_channels)


def _is_strided(pool: nn.MaxPool2d) -> bool:
    stride: Any = pool.stride
    return max(stride) > 1 if isinstance(stride, tuple) else stride > 1


def _named(names: list[str]) -> str:
    if not names:
        return ""
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"; these are of a subclass, or have settings that cannot be kept: {shown}"
