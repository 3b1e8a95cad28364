"""Folds the evaluation factor of each branch into its weights, for inference without stochastic depth."""

from collections import Counter
from typing import Any

import torch
from torch import nn

from .standalone import remove_stochastic_depth
from .stochastic_block import StochasticBlock
from .surgery import required_blocks


def fold_stochastic_depth(model: nn.Module) -> nn.Module:
    """Move each branch's ``1 - rate`` into its last layer and undo the surgery, in place.

    Evaluation gives the same outputs up to rounding, and the weights can be loaded into the plain network. The
    folded network is for inference: the state of an optimizer no longer fits it.

    Args:
        model: A model with stochastic depth; its current rates are folded.

    Returns:
        `model` itself, with its original blocks.

    Raises:
        ValueError: If the model has no stochastic depth, or a branch does not end in a layer with its
            own weights. The model is then unchanged.
    """
    blocks = required_blocks(model, "fold")
    names = {module: name for name, module in model.named_modules()}
    factors = [
        (_last_layer(block, number, names[block]), block.drop_plan.evaluation_scale(index))
        for block in blocks
        for number, index in enumerate(block.drop_indices)
    ]
    _check_not_shared(model, [layer for layer, _ in factors], names)
    with torch.no_grad():
        for layer, factor in factors:
            for parameter in (layer.weight, layer.bias):
                if parameter is not None:
                    parameter.mul_(factor)
    return remove_stochastic_depth(model)


def _last_layer(block: StochasticBlock, number: int, name: str) -> Any:
    layer: Any = block.block_type.branches[number].last_layer(block)
    # A weight that is computed from others (a parametrization) would be recomputed without the factor.
    held = [] if layer is None else [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]
    if "weight" not in dict(held):
        raise ValueError(
            f"every branch must end in a normalisation or linear layer with weights to fold into, model.{name} "
            f"({block.plain_class.__qualname__}) does not"
        )
    return layer


def _check_not_shared(model: nn.Module, layers: list[Any], names: dict[nn.Module, str]) -> None:
    owners = Counter(
        id(parameter)
        for module in model.modules()
        for _, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
    )
    uses = Counter(map(id, layers))
    for layer in layers:
        if owners[id(layer.weight)] > 1 or uses[id(layer)] > 1:
            raise ValueError(f"a layer to fold into must not share its weights, model.{names[layer]} does")
