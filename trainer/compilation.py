"""torch.compile for a model whose blocks may be skipped."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

_OPTIONS = tuple(inspect.signature(torch.compile).parameters)[1:]


def check_compile_config(name: str, config: Any) -> dict[str, Any]:
    """Options of ``torch.compile`` by name.

    Raises:
        TypeError: If `config` is not a mapping.
        ValueError: If it has an unknown option.
    """
    if not isinstance(config, Mapping):
        raise TypeError(
            f"{name} must be a dictionary of options of torch.compile, {{}} for its defaults, got {config!r}"
        )
    for option in config:
        if option not in _OPTIONS:
            raise ValueError(f"{name} must have options of torch.compile ({', '.join(_OPTIONS)}), got {option!r}")
    return dict(config)


def compile_model(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Compile a model in place, so that no graph depends on which blocks a step skips.

    A module with a method ``compile_branches``, as a block with stochastic depth, is compiled by it; the rest of the
    model around these modules is compiled together.

    Args:
        model: Copies and pickles of it are not compiled.
        config: Options of ``torch.compile``.
    """
    parts: list[Any] = [module for module in model.modules() if hasattr(module, "compile_branches")]
    for part in parts:
        part.compile_branches(**config)
    model.compile(**config)
