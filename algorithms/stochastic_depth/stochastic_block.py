"""A residual block with stochastic depth: what `forward` does once a block is converted."""

import copyreg
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .block_types import BlockType, block_type_of
from .plan import DropPlan
from .rows import replace_rows, take_rows


class StochasticBlock(nn.Module):
    """Stands in front of a block's own class, which goes on doing the computing.

    A block is converted by giving it the class that `stochastic_class` makes: the object, its
    parameters and their names stay what they were.
    """

    plain_class: ClassVar[type[nn.Module]]
    block_type: ClassVar[BlockType]
    drop_plan: DropPlan
    drop_index: int

    @property
    def drop_rate(self) -> float:
        """The rate in force, in [0, 1]."""
        return self.drop_plan.rates[self.drop_index]

    def forward(self, x: Tensor) -> Tensor:
        """Run or sit out as the drop plan says; in evaluation run with the branch times 1 - rate.

        Huang et al. 2016, equations 2 and 5, arXiv:1603.09382.
        """
        if not self.training:
            return self._scaled(x, 1 - self.drop_rate)
        plan = self.drop_plan
        if not plan.is_drawn:
            raise RuntimeError(
                "no drop plan was drawn for this forward: call the model that stochastic depth was applied to, "
                "not a part of it"
            )
        if plan.method == "sample":
            return self._forward_rows(x, plan.kept_rows(self.drop_index))
        if plan.drops_block(self.drop_index):
            return self.block_type.dropped(self, x)
        return super().forward(x)

    def _scaled(self, x: Tensor, scale: float) -> Tensor:
        if scale == 1:
            return super().forward(x)
        if scale == 0:
            return self.block_type.dropped(self, x)
        residual = self.block_type.residual(self, x)
        summed = torch.add(self.block_type.shortcut(self, x), residual, alpha=scale)
        return self.block_type.after_sum(self, summed)

    def _forward_rows(self, x: Tensor, kept: np.ndarray) -> Tensor:
        """Compute the kept rows only; the others take the shortcut."""
        if len(kept) != len(x):
            raise ValueError(
                f'stochastic_method="sample" needs one row per sample: {len(kept)} samples were drawn for, '
                f"{type(self).__name__} got {len(x)} rows"
            )
        if kept.all():
            return super().forward(x)
        if not kept.any():
            return self.block_type.dropped(self, x)
        plain_forward = super().forward
        shortcut = self.block_type.shortcut(self, x)
        if shortcut is x and self.block_type.input_is_final:
            return replace_rows(x, kept, lambda rows: self._compute(plain_forward, rows, x, kept))
        residual = self._compute(lambda rows: self.block_type.residual(self, rows), take_rows(x, kept), x, kept)
        return self.block_type.after_sum(self, replace_rows(shortcut, kept, lambda rows: rows + residual))

    def _compute(self, function: Callable[[Tensor], Tensor], rows: Tensor, x: Tensor, kept: np.ndarray) -> Tensor:
        """Apply `function` to the kept rows, with company for a single row where BatchNorm needs it.

        The statistics of one row of 1x1 maps do not exist. A neighbour is then computed along with
        the row and its result thrown away, so that the rate stays exact.
        """
        if len(rows) > 1 or not any(isinstance(module, _BatchNorm) for module in self.modules()):
            return function(rows)
        neighbour = (int(kept.argmax()) + 1) % len(kept)
        return function(torch.cat([rows, x[neighbour : neighbour + 1].detach()]))[:1]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy by the plain class, since the class in front of it has no importable name."""
        reduced: Any = super().__reduce_ex__(protocol)
        build, arguments, *rest = reduced
        if build is copyreg.__newobj__:  # type: ignore[attr-defined]  # there, but not in the stubs
            build, arguments = _new_block, (self.plain_class,)
        return (build, arguments, *rest)


@cache
def stochastic_class(plain_class: Any) -> type[StochasticBlock]:
    """The stochastic version of a registered block class, always the same one.

    Raises:
        ValueError: If exactly this class is not registered.
    """
    block_type = block_type_of(plain_class)
    if block_type is None:
        raise ValueError(f"{plain_class.__module__}.{plain_class.__qualname__} is not a registered residual block")
    members = {"plain_class": plain_class, "block_type": block_type, "__module__": __name__}
    return type(f"Stochastic{plain_class.__name__}", (StochasticBlock, plain_class), members)


def _new_block(plain_class: Any) -> StochasticBlock:
    cls = stochastic_class(plain_class)
    return cls.__new__(cls)
