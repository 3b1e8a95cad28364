"""A plain PyTorch training loop, the reference for random situations."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from helpers.situations import NUM_CLASSES, Network, Situation, add_layer, replace_head


@dataclass
class Recorded:
    """What one step of the Trainer worked on.

    Args:
        x: Inputs of all rows of the step, those of rank 0 first.
        y: Targets.
        kept: Which block computes which row, of shape ``(blocks, rows)``.
        rows_of_ranks: How many rows each rank had.
    """

    x: Tensor
    y: Tensor
    kept: Tensor
    rows_of_ranks: list[int]


def train_by_hand(situation: Situation, steps: Sequence[Recorded]) -> tuple[Network, dict[str, Tensor]]:
    """Train on the recorded batches, with the recorded drops.

    Returns:
        The model, and the exponential moving average of its floating-point parameters and buffers.
    """
    model = situation.make_model()
    # torch's fused SGD fails where a parameter has no gradient in the first step.
    unfused = {"fused": False} if "fused" in situation.optimizer.name else {}
    optimizer, scheduler = situation.make_optimizer(model, **unfused)
    averages: dict[str, Tensor] = {}
    if situation.replaces_head:
        replace_head(model, optimizer)
    model.train()
    for number, step in enumerate(steps):
        if situation.grow_at == number:
            add_layer(model, optimizer)
        if situation.unfreeze_at is not None:
            model.stem.requires_grad_(number >= situation.unfreeze_at)
        for parameter in model.parameters():
            parameter.grad = None
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        is_finite = _compute_gradients(model, situation, step, number)
        if is_finite:
            edit_before_update(model, situation, number)
            optimizer.step()
        else:
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
            if scheduler is not None:
                optimizer._opt_called = True  # type: ignore[attr-defined]  # the scheduler steps all the same
        if scheduler is not None:
            scheduler.step()
        if situation.ema is not None and is_finite:
            _average(averages, model, situation.ema)
    return model, averages


def _average(averages: dict[str, Tensor], model: nn.Module, smoothing: float) -> None:
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            average = averages.get(name, value)
            averages[name] = smoothing * average + (1 - smoothing) * value


def _compute_gradients(model: Network, situation: Situation, step: Recorded, number: int) -> bool:
    """Whether loss and gradients are finite."""
    start, is_finite = 0, True
    for num_rows in step.rows_of_ranks:
        size = situation.microbatch_size or num_rows
        for begin in range(start, start + num_rows, size):
            rows = slice(begin, min(begin + size, start + num_rows))
            outputs = _forward(model, step.x[rows], step.kept[:, rows], situation)
            targets = _targets(step.y[rows], situation)
            loss = nn.functional.cross_entropy(outputs, targets)
            if situation.runs_twice:
                again = _forward(model, step.x[rows], step.kept[:, rows], situation)
                loss = loss + 0.5 * nn.functional.cross_entropy(again, targets)
            share = len(step.x[rows]) / num_rows * (num_rows / len(step.x))
            is_finite = is_finite and bool(loss.isfinite())
            if loss.requires_grad:
                (loss if share == 1.0 else loss * share).backward()
            if len(step.rows_of_ranks) == 1:
                edit_after_backward(model, situation)
        start += num_rows
    if len(step.rows_of_ranks) > 1:
        edit_after_backward(model, situation)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return is_finite and all(bool(gradient.isfinite().all()) for gradient in gradients)


def edit_before_update(model: nn.Module, situation: Situation, number: int) -> None:
    """Change gradients as an algorithm may at AFTER_TRAIN_BATCH."""
    if situation.edit == "clip":
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    elif situation.edit == "noise":
        generator = torch.Generator().manual_seed(number)
        for parameter in model.parameters():
            noise = 0.01 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            if parameter.grad is not None:
                parameter.grad += noise


def edit_after_backward(model: nn.Module, situation: Situation) -> None:
    """Change gradients as an algorithm may at AFTER_BACKWARD."""
    if situation.edit == "clip after backward":
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    for parameter in model.parameters():
        if parameter.grad is None:
            continue
        if situation.edit == "halve after backward":
            parameter.grad.mul_(0.5)
        elif situation.edit == "replace after backward":
            parameter.grad = parameter.grad * 1.1


def _targets(y: Tensor, situation: Situation) -> Tensor:
    if situation.smoothing is None:
        return y
    return (
        nn.functional.one_hot(y, NUM_CLASSES).double() * (1 - situation.smoothing) + situation.smoothing / NUM_CLASSES
    )


def _forward(model: Network, x: Tensor, kept: Tensor, situation: Situation) -> Tensor:
    x = model.begin(x)
    for number, block in enumerate(model.blocks):
        rate = situation.drop_rate * ((number + 1) / len(model.blocks))
        scale = 1 / (1 - rate) if situation.scaling == "training" and situation.method is not None else 1.0
        x = _run(block, x, kept[number], scale)
    return model.end(x)


def _run(block: Any, x: Tensor, kept: Tensor, scale: float) -> Tensor:
    if not kept.any():
        return x
    if kept.all():
        return _block(block, x, scale)
    rows = kept.nonzero().flatten()
    if len(rows) == 1 and any(isinstance(module, nn.BatchNorm2d) for module in block.modules()):
        # A single row is normalised together with the next one, whose result is not used.
        neighbour = x[(rows + 1) % len(x)].detach()
        return x.index_copy(0, rows, _block(block, torch.cat([x[rows], neighbour]), scale)[:1])
    return x.index_copy(0, rows, _block(block, x[rows], scale))


def _block(block: Any, x: Tensor, scale: float) -> Tensor:
    if scale == 1.0:
        return block(x)
    if isinstance(block, nn.TransformerEncoderLayer):
        x = torch.add(x, block._sa_block(block.norm1(x), None, None), alpha=scale)
        return torch.add(x, block._ff_block(block.norm2(x)), alpha=scale)
    residual = block.bn2(block.conv2(block.relu(block.bn1(block.conv1(x)))))
    return block.relu(torch.add(x, residual, alpha=scale))


def largest_difference(one: nn.Module, other: nn.Module) -> float:
    """Over all parameters and buffers."""
    found, expected = one.state_dict(), other.state_dict()
    assert list(found) == list(expected)
    return max(float((found[name].double() - expected[name].double()).abs().max()) for name in found)


def are_same(one: nn.Module, other: nn.Module) -> bool:
    """Whether all parameters and buffers agree to the bit."""
    found, expected = one.state_dict(), other.state_dict()
    return list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in found)
