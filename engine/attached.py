"""Algorithms that are attached to a model and join the run of every Trainer that trains it.

A functional form that acts in every step of training, such as ``cf.apply_stochastic_depth``, attaches its algorithm.
Under a Trainer the algorithm then does the work, as if it had been given among `algorithms`: it follows the steps of
the Trainer, and is part of the settings and the checkpoints.
"""

from torch import nn

from .algorithm import Algorithm

_NAME = "attached_algorithms"


def attach(module: nn.Module, algorithm: Algorithm) -> None:
    """Attach an algorithm to a module. Copies and pickles of the module hold a copy of it."""
    module.__dict__.setdefault(_NAME, []).append(algorithm)


def detach(module: nn.Module, kind: type[Algorithm]) -> None:
    """Remove the algorithms of a class that are attached to a module itself."""
    if kept := [algorithm for algorithm in module.__dict__.pop(_NAME, ()) if not isinstance(algorithm, kind)]:
        module.__dict__[_NAME] = kept


def attached_algorithms(model: nn.Module) -> list[Algorithm]:
    """The algorithms that are attached to a model and to the modules in it."""
    return [algorithm for module in model.modules() for algorithm in module.__dict__.get(_NAME, ())]
