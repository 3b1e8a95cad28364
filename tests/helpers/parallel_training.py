"""Short trainings on several ranks."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD

import etude.functional as cf
from etude import Algorithm, Event, Trainer
from etude.algorithms import StochasticDepth
from etude.trainer import distributed
from helpers.networks import tiny_resnet
from helpers.resumable import differences


def make_model() -> nn.Module:
    torch.manual_seed(5)
    return tiny_resnet(num_blocks=6)


def freeze_batchnorm(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def sgd(model: nn.Module) -> SGD:
    return SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def train(model: nn.Module, data: Any, duration: str, *algorithms: Algorithm, **settings: Any) -> Trainer:
    trainer = Trainer(
        model, data, None, duration, algorithms, sgd(model), progress_bar=False, dist_timeout=60.0, **settings
    )
    trainer.fit()
    return trainer


def train_alone(model: nn.Module, data: Any, num_epochs: int) -> nn.Module:
    """The same training by one process on the joined batches, in a loop of its own."""
    cf.apply_stochastic_depth(model, drop_rate=0.5)
    optimizer = sgd(model)
    for _ in range(num_epochs):
        for batch in data:
            optimizer.zero_grad()
            model.loss(model(batch), batch).backward()
            optimizer.step()
    return model


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    return {name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for name, tensor in state.items()}


def largest_difference(one: nn.Module, other: nn.Module) -> float:
    pairs = list(zip(one.parameters(), other.parameters(), strict=True))
    assert pairs
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def assert_same_on_all_ranks(model: nn.Module) -> None:
    first, *others = distributed.gather(parameters(model))
    assert others
    for other in others:
        assert differences(first, other) == []


def refused(message: str) -> "pytest.RaisesExc[ValueError | RuntimeError]":
    """Expect an error of this rank or of another one that contains the message."""
    return pytest.raises((ValueError, RuntimeError), match=re.escape(message))


@contextmanager
def counted_calls(*names: str) -> Iterator[dict[str, int]]:
    """How often each of these functions of torch.distributed is called."""
    originals = {name: getattr(dist, name) for name in names}
    counts = dict.fromkeys(names, 0)

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return originals[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, counting(name))
    try:
        yield counts
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


@contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """The bytes of every all-reduce of gradients."""
    reduce, sizes = dist.all_reduce, []

    def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.dtype != torch.float64:  # what ranks tell each other is in double precision
            sizes.append(tensor.nbytes)
        return reduce(tensor, *args, **kwargs)

    dist.all_reduce = counting
    try:
        yield sizes
    finally:
        dist.all_reduce = reduce


class CompareBytes(Algorithm):
    """Compares the bytes of every step with those of the gradients of the blocks that were not dropped."""

    def __init__(self, depth: StochasticDepth, sizes: list[int]) -> None:
        self.depth, self.sizes = depth, sizes
        self.seen: list[tuple[int, int]] = []

    def match(self, event: Event, state: Any) -> bool:
        return event is Event.BATCH_END

    def apply(self, event: Event, state: Any, logger: Any) -> None:
        dropped = self.depth.plan.dropped_blocks
        expected = sum(parameter.nbytes for parameter in state.model.parameters())
        for block, is_dropped in zip(cf.stochastic_blocks(state.model), dropped, strict=True):
            if is_dropped:
                shortcut = getattr(block, "downsample", None)
                expected -= sum(p.nbytes for p in block.parameters())
                expected += sum(p.nbytes for p in shortcut.parameters()) if shortcut is not None else 0
        assert sum(self.sizes) == expected, (sum(self.sizes), expected)
        self.seen.append((sum(dropped), len(self.sizes)))
        self.sizes.clear()


class OnOneRank(Algorithm):
    """Does something on rank 1 at one step."""

    def __init__(self, event: Event, step: int, action: Callable[[Any], None]) -> None:
        self.event, self.step, self.action = event, step, action

    def match(self, event: Event, state: Any) -> bool:
        return event is self.event and state.timestamp.batch == self.step and state.rank == 1

    def apply(self, event: Event, state: Any, logger: Any) -> None:
        self.action(state)
