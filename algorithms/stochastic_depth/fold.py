"""Folds the evaluation factor of each branch into its weights, for inference without stochastic depth."""

from collections import Counter

import torch
from torch import Tensor, nn

from .last_layer import last_parameters
from .standalone import remove_stochastic_depth
from .surgery import required_blocks


def fold_stochastic_depth(model: nn.Module) -> nn.Module:
    """Move each branch's ``1 - rate`` into its last layer and undo the surgery, in place.

    Evaluation gives the same outputs as before, to rounding error, and the weights load into the plain
    network anywhere. The folded network is for inference: an optimizer's state no longer fits it. With scaling
    in training there is no factor, and only the surgery is undone.

    Args:
        model: A model with stochastic depth; its current rates are folded.

    Returns:
        `model` itself, with its original blocks.

    Raises:
        ValueError: If the model has no stochastic depth, or a branch with a factor ends in no layer of its own
            that could take it. The model is then unchanged.
    """
    blocks = required_blocks(model, "fold")
    names = {module: name for name, module in model.named_modules()}
    factors = [
        (last_parameters(block, number, f"model.{names[block]}"), factor)
        for block in blocks
        for number, index in enumerate(block.drop_indices)
        if (factor := block.drop_plan.evaluation_scale(index)) != 1
    ]
    _check_not_shared(model, [parameter for parameters, _ in factors for parameter in parameters])
    with torch.no_grad():
        for parameters, factor in factors:
            for parameter in parameters:
                parameter.mul_(factor)
    return remove_stochastic_depth(model)


def _check_not_shared(model: nn.Module, parameters: list[Tensor]) -> None:
    owners = Counter(
        id(parameter)
        for module in model.modules()
        for _, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
    )
    uses = Counter(map(id, parameters))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter in parameters:
        if owners[id(parameter)] > 1 or uses[id(parameter)] > 1:
            raise ValueError(f"a layer to fold into must not share its weights, model.{names[id(parameter)]} is shared")
