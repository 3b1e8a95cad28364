"""What a checkpoint keeps of the factors by which evaluation multiplies parts of the model, so that its weights can be
evaluated without the algorithms that trained them."""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ...engine import Algorithm, EvaluationFactor, State


def describe_factors(state: State) -> list[dict[str, Any]]:
    """The factors that algorithms declare, as plain values: names in the place of modules and parameters."""
    factors = [factor for algorithm in state.algorithms for factor in algorithm.evaluation_factors(state)]
    return _with_names(factors, state.model) if factors else []


def may_have_factors(state: State) -> bool:
    """Whether an algorithm of the run declares factors at some moment of the training."""
    return any(type(each).evaluation_factors is not Algorithm.evaluation_factors for each in state.algorithms)


def factors_of(contents: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The factors in a checkpoint.

    Raises:
        ValueError: If they are not what `describe_factors` returned for its model.
    """
    factors, names = contents.get("evaluation_factors"), contents.get("model", {})
    if not isinstance(factors, list) or not all(_is_factor(item, names) for item in factors):
        raise ValueError(f"the evaluation factors of a checkpoint must be those of its weights, got {factors!r:.100}")
    return factors


def apply_factors(weights: Mapping[str, Tensor], factors: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """The weights of a model that evaluates without the factors as it did with them.

    Raises:
        ValueError: If a factor has no weights to be applied to.
    """
    scaled = dict(weights)
    for factor in factors:
        if factor["obstacle"] is not None:
            raise ValueError(factor["obstacle"])
        for name in factor["parameters"]:
            scaled[name] = scaled[name] * factor["factor"]
    return scaled


def _with_names(factors: Sequence[EvaluationFactor], model: nn.Module) -> list[dict[str, Any]]:
    modules = {id(module): name for name, module in model.named_modules()}
    tensors = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    names = {id(tensor): name for name, tensor in tensors}
    owners = Counter(id(tensor) for _, tensor in tensors)
    uses = Counter(id(tensor) for factor in factors for tensor in factor.parameters)
    described = []
    for factor in factors:
        obstacle = factor.obstacle
        if shared := [names[id(t)] for t in factor.parameters if owners[id(t)] > 1 or uses[id(t)] > 1]:
            obstacle = f"a layer to fold into must not share its weights, {shared[0]} is shared"
        described.append(
            {
                "module": modules[id(factor.module)],
                "factor": float(factor.factor),
                "parameters": [] if obstacle is not None else [names[id(tensor)] for tensor in factor.parameters],
                "obstacle": obstacle,
            }
        )
    return described


def _is_factor(item: Any, names: Collection[str]) -> bool:
    return (
        isinstance(item, dict)
        and item.keys() == {"module", "factor", "parameters", "obstacle"}
        and isinstance(item["module"], str)
        and isinstance(item["factor"], float)
        and math.isfinite(item["factor"])
        and isinstance(item["parameters"], list)
        and all(isinstance(name, str) and name in names for name in item["parameters"])
        and (item["obstacle"] is None or isinstance(item["obstacle"], str))
    )
