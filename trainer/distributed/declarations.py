"""What algorithms and modules declare for parallel training.

An algorithm declares it with `Algorithm.ranks_may_differ` and `Algorithm.gradient_units`, a module of the model with
attributes of the same names: ``ranks_may_differ`` (bool) and
``gradient_units()``, which returns groups of modules that run together or not at all. A module that knows before its
forward which of them run also has ``running_units()``.
"""

from typing import Any

from torch import nn

from ...engine import State


def find_difference_over_ranks(state: State) -> str | None:
    """The first algorithm or module that may compute something else on each rank, as a text; None if none does."""
    for algorithm in state.algorithms:
        if algorithm.ranks_may_differ:
            return type(algorithm).__name__
    for name, module in state.model.named_modules():
        if getattr(module, "ranks_may_differ", False):
            return f"{type(module).__name__} (model.{name})"
    return None


def gradient_units(state: State) -> list[list[nn.Module]]:
    """Groups of modules that run together or not at all, of all algorithms and modules."""
    of_algorithms = (unit for algorithm in state.algorithms for unit in algorithm.gradient_units(state))
    of_modules = (unit for module in skippable_modules(state.model) for unit in module.gradient_units())
    units: dict[tuple[int, ...], list[nn.Module]] = {}
    for unit in (*of_modules, *of_algorithms):
        units.setdefault(tuple(map(id, unit)), list(unit))
    return list(units.values())


def running_units(model: nn.Module) -> list[list[Any]]:
    """The groups of modules of which it is known that the next forward runs them, in the order of the modules."""
    modules = [module for module in skippable_modules(model) if hasattr(module, "running_units")]
    return [unit for module in modules for unit in module.running_units()]


def skippable_modules(model: nn.Module) -> list[Any]:
    """The modules of the model that may be skipped in a step, wholly or in part."""
    return [module for module in model.modules() if hasattr(module, "gradient_units")]
