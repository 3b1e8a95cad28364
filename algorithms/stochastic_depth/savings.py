"""The cost of each block, and the share of it that stochastic depth saves."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .blocks import BlockType
from .standalone import remove_stochastic_depth
from .surgery import required_blocks, stochastic_blocks

Resource = Literal["macs", "gradient_bytes", "activation_bytes"]


@dataclass(frozen=True)
class BlockCost:
    """The cost of one residual branch, the part of a block that can be dropped.

    Args:
        name: The name of the block in the model, with the number of the branch if it has several.
        drop_rate: Its current rate, in [0, 1].
        macs: Multiply-accumulates of a forward pass, per sample.
        parameters: Number of trainable parameters.
        gradient_bytes: Bytes of their gradients.
        activation_bytes: Bytes that a forward pass saves for the backward pass, per sample.
    """

    name: str
    drop_rate: float
    macs: int
    parameters: int
    gradient_bytes: int
    activation_bytes: int


@dataclass(frozen=True)
class Savings:
    """The cost of a model, and what dropping blocks saves. All shares are in [0, 1].

    Args:
        blocks: The costs of what can be dropped, in forward order.
        macs: Multiply-accumulates of a forward pass of the whole model, per sample.
        gradient_bytes: Bytes of all gradients.
        activation_bytes: Bytes that a forward pass keeps for the backward pass, per sample.
    """

    blocks: tuple[BlockCost, ...]
    macs: int
    gradient_bytes: int
    activation_bytes: int

    @property
    def expected(self) -> float:
        """The share of the training compute that the current rates save on average."""
        return self.share("macs", self.rates)

    @property
    def maximal(self) -> float:
        """The share that would be saved if all blocks were dropped."""
        return self.share("macs", [1.0] * len(self.blocks))

    @property
    def rates(self) -> list[float]:
        """The current rates."""
        return [block.drop_rate for block in self.blocks]

    def share(self, resource: Resource, dropped: Sequence[float]) -> float:
        """The share of a resource that is saved if a given fraction of each block is dropped.

        In every layer a backward pass costs about twice a forward pass, so the share of the forward MACs is
        also that of training. Gradient bytes are only saved if a block is dropped for the whole batch.

        Args:
            resource: ``macs``, ``gradient_bytes`` or ``activation_bytes``.
            dropped: For each block a number in [0, 1].
        """
        saved = sum(getattr(block, resource) * part for block, part in zip(self.blocks, dropped, strict=True))
        return saved / getattr(self, resource)


def expected_savings(model: nn.Module, input_shape: Sequence[int] = (3, 224, 224)) -> Savings:
    """Compute the costs of the blocks of a model, and what its drop rates save.

    Runs on the meta device: no weights are copied and nothing is computed.

    Args:
        model: A model with stochastic depth.
        input_shape: Shape of one sample, ``(C, H, W)`` for images.

    Raises:
        ValueError: If the model has no stochastic depth, or cannot take a sample of that shape.
    """
    required_blocks(model, "save anything")
    shadow = _shadow(model).train()
    rates = {
        block: (block.block_type, [block.drop_plan.rates[index] for index in block.drop_indices])
        for block in stochastic_blocks(shadow)
    }
    remove_stochastic_depth(shadow)
    sample = torch.empty(_NUM_SAMPLES, *input_shape, dtype=next(model.parameters()).dtype, device="meta")
    batch = (sample, None) if hasattr(model, "loss") else sample
    inputs: dict[nn.Module, tuple[Any, Any]] = {}
    for block in rates:
        block.register_forward_pre_hook(partial(_keep_input, inputs), with_kwargs=True)
    names = {module: name for name, module in shadow.named_modules()}
    try:
        macs = _macs(lambda: shadow(batch))
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        shape = tuple(input_shape)
        raise ValueError(f"input_shape must be the shape of one sample of the model, got {shape}: {error}") from error
    costs = (_branch_costs(names[block], block, *rates[block], inputs[block]) for block in rates)
    return Savings(
        tuple(chain.from_iterable(costs)),
        macs,
        _gradient_bytes(shadow.parameters()),
        _activation_bytes(lambda: shadow(batch)),
    )


_NUM_SAMPLES = 2  # BatchNorm in training needs two


def _branch_costs(
    name: str,
    block: nn.Module,
    block_type: BlockType,
    rates: Sequence[float],
    arguments: tuple[tuple[Any, ...], dict[str, Any]],
) -> Iterator[BlockCost]:
    (x, *others), kwargs = arguments
    args = tuple(others)
    branches = block_type.branches_of(block, args, kwargs)
    for number, (branch, rate) in enumerate(zip(branches, rates, strict=True)):
        run = partial(branch.residual, block, branch.prepare(block, x), *args, **kwargs)
        parameters = _parameters_of(block, run)
        yield BlockCost(
            name=name if len(branches) == 1 else f"{name}[{number}]",
            drop_rate=rate,
            macs=_macs(run),
            parameters=sum(parameter.numel() for parameter in parameters),
            gradient_bytes=_gradient_bytes(parameters),
            activation_bytes=_activation_bytes(run),
        )
        with torch.no_grad():
            x = branch.run(block, x, 1.0, *args, **kwargs)


def _parameters_of(block: nn.Module, run: Callable[[], Tensor]) -> list[nn.Parameter]:
    """The parameters of a block that a branch computes with."""
    trainable = [parameter for parameter in block.parameters() if parameter.requires_grad]
    if not trainable:
        return []
    with torch.enable_grad():
        found = torch.autograd.grad(run().sum(), trainable, allow_unused=True)
    return [parameter for parameter, gradient in zip(trainable, found, strict=True) if gradient is not None]


def _gradient_bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)


def _activation_bytes(run: Callable[[], Tensor]) -> int:
    """Bytes per sample saved for the backward pass, each storage once, without parameters."""
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()  # the same object for all views
            saved[id(storage)] = storage
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = run()
    del output
    return sum(storage.nbytes() for storage in saved.values()) // _NUM_SAMPLES


def _keep_input(inputs: dict[nn.Module, Any], module: nn.Module, args: Any, kwargs: Any) -> None:
    inputs.setdefault(module, (args, kwargs))


def _shadow(model: nn.Module) -> nn.Module:
    """A copy of the model with its parameters and buffers on the meta device."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {id(tensor): _without_data(tensor) for tensor in tensors}
    return copy.deepcopy(model, memo)


def _without_data(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _macs(run: Callable[[], Tensor]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2 // _NUM_SAMPLES
