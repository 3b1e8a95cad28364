"""A residual block with stochastic depth: what `forward` does once a block is converted."""

import copyreg
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import count
from types import FunctionType
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ...engine import EvaluationFactor
from .blocks import BlockType, Branch, block_type_of, traced_type
from .blocks.checking import check_split
from .last_layer import last_parameters
from .plan import DropPlan
from .rates import check_rate
from .rows import add_to_rows, take_rows
from .torch_internals import is_in_backward, is_tracing, maybe_mark_dynamic

BATCHNORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

F = TypeVar("F", bound=Callable[..., Any])

outside_of_graphs: Callable[[F], F] = torch.compiler.disable(
    reason="stochastic depth decides at every step which blocks run, so no single graph holds the model; compile the "
    "blocks with cf.compile_stochastic_blocks(model), or the model without fullgraph=True"
)
"""Decorator for what torch.compile must leave to Python."""

TRANSIENT = ("_compiled", "traced_branches", "_is_checked", "_input_is_relu")
"""Attributes of converted blocks that copies and pickles do without."""


class StochasticBlock(nn.Module):
    """Base class of converted blocks, placed before the original class of the block in the method resolution order.

    A block is converted by assigning the class that `stochastic_class` returns: the object, its parameters and their
    names stay the same.
    """

    plain_class: ClassVar[type[nn.Module]]
    block_type: ClassVar[BlockType]
    input_name: ClassVar[str]  # what the plain class calls its first argument
    block_name: str
    drop_plan: DropPlan
    drop_indices: tuple[int, ...]  # for each branch its index in the plan
    own_drop_rates: dict[str, float]  # what the block's own drop paths had, by name; they are set to 0

    @property
    def drop_rate(self) -> float:
        """The current rate, in [0, 1]; that of the last branch if the branches have separate rates.

        It may be set before a Trainer is built, and in your own loop.

        Raises:
            RuntimeError: If it is set during ``Trainer.fit``, which sets it for every batch.
        """
        return self.drop_plan.rates[self.drop_indices[-1]]

    @drop_rate.setter
    def drop_rate(self, rate: float) -> None:
        if self.drop_plan.follows_trainer:
            raise RuntimeError(
                f"drop_rate must not be set during Trainer.fit, which sets it for every batch, got {rate!r}: pass a "
                "drop_schedule to StochasticDepth"
            )
        rates = list(self.drop_plan.rates)
        for index in self.drop_indices:
            rates[index] = check_rate(rate)
        self.drop_plan.set_rates(rates)

    @outside_of_graphs
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute what the drop plan keeps; in evaluation all branches, each multiplied by 1 - rate.

        Huang et al. 2016, equations 2 and 5, arXiv:1603.09382.
        """
        x, *others = args or (kwargs.pop(self.input_name),)
        args = tuple(others)
        if self.training:
            args, kwargs = self.block_type.without_state(self, args, kwargs)
        self._check_at_first_use(x, args, kwargs)
        plan = self.drop_plan
        if not self.training:
            return self._run(x, [plan.evaluation_scale(index) for index in self.drop_indices], args, kwargs)
        if plan.is_open or plan.draw_for_part is None or plan.follows_trainer or is_in_backward():
            plan.check_open()
            return self._run_training(x, args, kwargs)
        plan.draw_for_part(self.drop_indices[0], x.shape[self.block_type.get_batch_dim(self)])
        y = self._run_training(x, args, kwargs)
        if y.requires_grad:
            y.register_hook(lambda grad: plan.begin_backward())
        return y

    @property
    def ranks_may_differ(self) -> bool:
        """Whether a rank may drop a block that another one keeps; parallel training reads it from every module."""
        return not self.drop_plan.same_on_all_ranks

    def gradient_units(self) -> list[list[nn.Module]]:
        """The layers that run together or not at all, in groups: of each branch, or each by itself if unknown."""
        branches = self.block_type.branches_of(self)
        groups = [branch.layers(self) for branch in branches if branch.layers is not None]
        if len(groups) < len(branches):
            groups = [[layer] for layer in self.children()]
        return _with_parameters(groups)

    def running_units(self) -> list[list[nn.Module]]:
        """Those of `gradient_units` that the next forward runs, where the layers of each branch are known."""
        branches = self.block_type.branches_of(self)
        running = [branch for branch, index in zip(branches, self.drop_indices, strict=True) if self._runs(index)]
        return _with_parameters(branch.layers(self) for branch in running if branch.layers is not None)

    def evaluation_factors(self) -> list[EvaluationFactor]:
        """By what evaluation multiplies each branch, and the parameters that could take the factor."""
        factors = []
        for number, index in enumerate(self.drop_indices):
            factor = self.drop_plan.evaluation_scale(index)
            if factor == 1:
                continue
            try:
                parameters = last_parameters(self, number, self.block_name)
                factors.append(EvaluationFactor(module=self, factor=factor, parameters=parameters))
            except ValueError as error:
                factors.append(EvaluationFactor(module=self, factor=factor, obstacle=str(error)))
        return factors

    def compile_branches(self, **options: Any) -> None:
        """Compile the original forward and the residual branches; decisions stay outside the graphs."""
        cls = self.plain_class
        self._compiled = {"forward": torch.compile(_own_code(cls.forward), **options)}
        for number, branch in enumerate(self.block_type.branches_of(self)):
            self._compiled[f"residual{number}"] = torch.compile(_own_code(branch.residual), **options)

    def _run_training(self, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        plan = self.drop_plan
        self._look_at_first_input(x)
        if plan.method == "block":
            return self._run(x, [plan.block_scale(index) for index in self.drop_indices], args, kwargs)
        return self._run_rows(x, args, kwargs)

    def _run(self, x: Tensor, scales: Sequence[float], args: Any, kwargs: Any) -> Tensor:
        """Run the block, with each residual branch multiplied by its scale."""
        # Compiled with the sample method, all cases use the graphs of the branches.
        if all(scale == 1 for scale in scales) and not (self._is_compiled() and self.drop_plan.method == "sample"):
            return self._plain_forward(x, *args, **kwargs)
        for branch, scale in zip(self._branches(args, kwargs), scales, strict=True):
            x = branch.run(self, x, scale, *args, **kwargs) if scale != 0 else self._drop(branch, x)
        return x

    def _run_rows(self, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        """Compute the kept rows only; the others take the shortcut."""
        plan, indices = self.drop_plan, self.drop_indices
        scales, kept = [plan.row_scale(index) for index in indices], [self._kept_rows(index, x) for index in indices]
        if all(rows.all() for rows in kept):
            return self._run(x, scales, args, kwargs)
        for branch, rows, scale in zip(self._branches(args, kwargs), kept, scales, strict=True):
            x = self._branch_on_rows(branch, x, rows, scale, args, kwargs)
        return x

    def _kept_rows(self, index: int, x: Tensor) -> np.ndarray:
        kept, num_rows = self.drop_plan.kept_rows(index), x.shape[self.block_type.get_batch_dim(self)]
        if len(kept) != num_rows:
            raise ValueError(
                f'stochastic_method="sample" needs one row per sample: {len(kept)} samples were drawn for, '
                f"{self.block_name} ({self.plain_class.__qualname__}) got {num_rows} rows"
            )
        return kept

    def _branch_on_rows(
        self, branch: Branch, x: Tensor, kept: np.ndarray, scale: float, args: Any, kwargs: Any
    ) -> Tensor:
        """Run one branch on the kept rows, and its shortcut and what follows the sum on all rows."""
        if not kept.any():
            return self._drop(branch, x)
        if kept.all():
            return branch.run(self, x, scale, *args, **kwargs)
        dim = self.block_type.get_batch_dim(self)
        args, kwargs = self.block_type.select(self, lambda tensor: take_rows(tensor, kept), len(kept), args, kwargs)
        is_relu = branch.ends_in_relu(self) and self._input_is_final(branch, x)
        x = branch.prepare(self, x)

        def residual(rows: Tensor) -> Tensor:
            out = self._pad_single_row(rows, x, kept, lambda r: branch.residual(self, r, *args, **kwargs))
            if out.shape[dim] != rows.shape[dim]:  # it would be added to other rows
                raise ValueError(
                    f"a residual branch of {self.block_name} ({self.plain_class.__qualname__}) must return as many "
                    f"rows as it gets, {rows.shape[dim]}, got {out.shape[dim]}"
                )
            return out

        if branch.is_projection(self):
            shortcut = partial(branch.take_shortcut, self)
            return branch.finish(self, add_to_rows(x, kept, residual, shortcut=shortcut, alpha=scale, dim=dim))
        # The dropped rows have gone through the ReLU of the block before.
        summed = add_to_rows(x, kept, residual, alpha=scale, relu=is_relu, dim=dim)
        return summed if is_relu else branch.finish(self, summed)

    def _runs(self, index: int) -> bool:
        """Whether it is known that the next forward computes a branch."""
        plan = self.drop_plan
        if not self.training:
            return plan.evaluation_scale(index) != 0
        return plan.is_open and plan.method == "block" and plan.block_scale(index) != 0

    def _drop(self, branch: Branch, x: Tensor) -> Tensor:
        return branch.drop(self, x, input_is_final=self._input_is_final(branch, x))

    def _input_is_final(self, branch: Branch, x: Tensor) -> bool:
        """Whether what follows the sum leaves the block's input as it is: a ReLU after one of the block before."""
        if branch.after_sum is None:
            return True
        self._look_at_first_input(x)
        return branch.ends_in_relu(self) and self.__dict__.get("_input_is_relu", False)

    def _look_at_first_input(self, x: Tensor) -> None:
        """Look up once whether the input is never negative, for blocks that end in a ReLU.

        It reads the input from the device, so a training forward does it before the block is dropped for the first
        time: no later step waits for it.
        """
        if "_input_is_relu" in self.__dict__ or x.is_meta or x.numel() == 0:
            return
        ends_in_relu = any(branch.ends_in_relu(self) for branch in self.block_type.branches_of(self))
        self._input_is_relu = ends_in_relu and bool((x >= 0).all())

    def _check_at_first_use(self, x: Tensor, args: Any, kwargs: Any) -> None:
        """Compare the split with the block's own forward, unless the tests of this package did."""
        if self.block_type.is_verified or self.__dict__.get("_is_checked") or x.is_meta or is_in_backward():
            return
        if is_tracing() or self.block_type.has_state(self, args, kwargs):
            return  # the check would become a part of the graph, or change the state
        check_split(self, self.block_name, self.block_type, x, args, kwargs)
        # A single row cannot be compared with the rows of a batch.
        self._is_checked = self.drop_plan.method == "block" or x.shape[self.block_type.get_batch_dim(self)] > 1

    def _pad_single_row(
        self, rows: Tensor, x: Tensor, kept: np.ndarray, function: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Apply `function` to the kept rows; a single one may be padded with a neighbour.

        BatchNorm needs more than one value per channel, and a row of 1x1 maps has one. torch.compile makes a separate
        graph for a size of 1. The result of the neighbour is discarded, so the rate stays exact.
        """
        if len(rows) > 1 or not (self._is_compiled() or any(isinstance(one, BATCHNORM) for one in self.modules())):
            return function(rows)
        neighbour = (int(kept.argmax()) + 1) % len(kept)
        return function(torch.cat([rows, x[neighbour : neighbour + 1].detach()]))[:1]

    def _is_compiled(self) -> bool:
        return "_compiled" in self.__dict__

    def _plain_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._is_compiled():
            return self._compiled["forward"](self, x, *args, **kwargs)
        return super().forward(x, *args, **kwargs)

    def _branches(self, args: Any, kwargs: Any) -> Sequence[Branch]:
        branches = self.block_type.branches_of(self, args, kwargs)
        if not self._is_compiled():
            return branches
        return [
            replace(branch, residual=partial(_run_compiled, f"residual{number}"))
            for number, branch in enumerate(branches)
        ]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy by the plain class, since the stochastic class has no importable name."""
        reduced: Any = super().__reduce_ex__(protocol)
        build, arguments, state, *rest = reduced
        if build is copyreg.__newobj__:  # type: ignore[attr-defined]  # there, but not in the stubs
            build, arguments = _new_block, (self.plain_class,)
            state = {name: value for name, value in state.items() if name not in TRANSIENT}
        return (build, arguments, state, *rest)


def _with_parameters(groups: Iterable[Sequence[nn.Module]]) -> list[list[nn.Module]]:
    """The groups without the layers that have no parameters."""
    units = ([layer for layer in group if any(True for _ in layer.parameters())] for group in groups)
    return [unit for unit in units if unit]


def _run_compiled(name: str, block: StochasticBlock, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if block.drop_plan.method == "sample":  # or the first change in the number of rows would compile anew
        maybe_mark_dynamic(x, block.block_type.get_batch_dim(block))
    return block._compiled[name](block, x, *args, **kwargs)


@cache
def stochastic_class(plain_class: Any) -> type[StochasticBlock]:
    """The stochastic version of a block class, always the same one: by its known type, or else traced."""
    block_type = block_type_of(plain_class) or traced_type(plain_class)
    _, input_name, *_ = inspect.signature(plain_class.forward).parameters
    members = {"plain_class": plain_class, "block_type": block_type, "input_name": input_name, "__module__": __name__}
    return type(f"Stochastic{plain_class.__name__}", (StochasticBlock, plain_class), members)


def _new_block(plain_class: Any) -> StochasticBlock:
    cls = stochastic_class(plain_class)
    return cls.__new__(cls)


def _own_code(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A copy of a function with a separate code object.

    torch.compile caches graphs by code object, at most eight for each, which is too few for blocks of different
    shapes that share one ``forward``.
    """
    if not isinstance(function, FunctionType):
        return function
    code = function.__code__
    code = code.replace(co_name=f"{code.co_name}_{next(_numbers)}")
    copied = FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


_numbers = count()
