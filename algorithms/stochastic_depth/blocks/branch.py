"""The model of a residual block: its branches, and what conversion has to know of the block as a whole."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from inspect import signature
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from ..torch_internals import is_tracing


def _never(block: Any) -> bool:
    return False


def _always(block: Any) -> bool:
    return True


@dataclass(frozen=True)
class Branch:
    """One residual step ``after_sum(shortcut(h) + residual(h))`` of a block, with ``h = before(x)``.

    Every function takes the block first. Names are attributes of the block, with dots for attributes of
    attributes (``"mlp.fc2"``).

    Args:
        residual: ``(block, h, ...) -> f(h)``, what can be dropped. It gets the further arguments of the
            block's ``forward``, if there are any, and must not change ``h`` in place.
        shortcut: ``(block, h) -> s(h)``, always computed; None for the identity.
        after_sum: ``(block, y) -> z``, what follows the sum; None for nothing.
        before: ``(block, x) -> h``, what shortcut and residual have in common; None for nothing.
        projects: Whether the shortcut of a block is more than the identity; by default where `shortcut`
            is given.
        ends_in_relu: Whether `after_sum` is exactly a ReLU. A dropped block then returns its input as it is,
            if that is never negative.
        last_layer: Name of the normalisation, linear, convolution or layer-scale layer or parameter that ends
            the residual branch, or ``(block) -> layer``; `fold_stochastic_depth` scales it. None where there
            is none.
        drop_path: Name of the block's own drop-path module in this branch, if it has one.
        layers: ``(block) -> layers`` that only `residual` computes with; None where that is not known.
        gives_new_tensor: Whether `residual` returns a tensor that nobody else holds, so that evaluation can
            add in place.
    """

    residual: Callable[..., Tensor]
    shortcut: Callable[[Any, Tensor], Tensor] | None = None
    after_sum: Callable[[Any, Tensor], Tensor] | None = None
    before: Callable[[Any, Tensor], Tensor] | None = None
    projects: Callable[[Any], bool] | None = None
    ends_in_relu: Callable[[Any], bool] = _never
    last_layer: str | Callable[[Any], nn.Module | nn.Parameter | None] | None = None
    drop_path: str | None = None
    layers: Callable[[Any], Sequence[nn.Module]] | None = None
    gives_new_tensor: bool = False

    def run(self, block: nn.Module, x: Tensor, scale: float, *args: Any, **kwargs: Any) -> Tensor:
        """The step with the residual branch times `scale`."""
        x = self.prepare(block, x)
        residual = self.residual(block, x, *args, **kwargs)
        shortcut = self.take_shortcut(block, x)
        # torch.jit.trace runs the model with gradients and without, and compares the graphs.
        if self.gives_new_tensor and not torch.is_grad_enabled() and not is_tracing():
            return self.finish(block, torch.add(shortcut, residual, alpha=scale, out=residual))
        return self.finish(block, torch.add(shortcut, residual, alpha=scale))

    def drop(self, block: nn.Module, x: Tensor, *, input_is_final: bool = False) -> Tensor:
        """The step without its residual branch; with `input_is_final`, nothing follows an identity shortcut."""
        x = self.prepare(block, x)
        if input_is_final and not self.is_projection(block):
            return x
        y = self.take_shortcut(block, x)
        if y is x and self.after_sum is not None:
            y = x.clone()  # an activation may work in place, on what the layers before still need
        return self.finish(block, y)

    def prepare(self, block: nn.Module, x: Tensor) -> Tensor:
        """Apply `before`."""
        return x if self.before is None else self.before(block, x)

    def take_shortcut(self, block: nn.Module, x: Tensor) -> Tensor:
        """Apply `shortcut`."""
        return x if self.shortcut is None else self.shortcut(block, x)

    def finish(self, block: nn.Module, y: Tensor) -> Tensor:
        """Apply `after_sum`."""
        return y if self.after_sum is None else self.after_sum(block, y)

    def is_projection(self, block: nn.Module) -> bool:
        """Whether the shortcut of this block is more than the identity."""
        return self.shortcut is not None and (self.projects is None or self.projects(block))

    def get_last_layer(self, block: nn.Module) -> nn.Module | nn.Parameter | None:
        """The layer or parameter that ends the residual branch of this block, or None."""
        return self.last_layer(block) if callable(self.last_layer) else get_attribute(block, self.last_layer)


@dataclass(frozen=True)
class BlockType:
    """How the blocks of one class are made of branches, which must be all that ``forward(x, ...)`` does.

    Args:
        name: What `target_layer_name` calls it.
        branches: The residual steps in the order in which they run, or ``(block) -> branches``.
        is_residual: Whether a block has residual branches at all, where that depends on the instance.
        batch_dim: The dimension of a block's input that counts the samples, or ``(block) -> dim``.
        row_arguments: Names of the further arguments of ``forward`` that have one row per sample in their
            first dimension: tensors, or tuples of tensors; a single row belongs to all samples. Or
            ``(block, take, ...) -> (args, kwargs)``, the further arguments for some samples only, where
            ``take(tensor)`` selects those from a tensor's first dimension.
        state_arguments: Names of the further arguments that ``forward`` changes, such as a cache of keys. In
            training they are None, since a dropped branch would leave them incomplete.
        cls: The class, if a user registered it.
    """

    name: str
    branches: Sequence[Branch] | Callable[[Any], Sequence[Branch]]
    is_residual: Callable[[Any], bool] = _always
    batch_dim: int | Callable[[Any], int] = 0
    row_arguments: Sequence[str] | Callable[..., tuple[tuple[Any, ...], dict[str, Any]]] = ()
    state_arguments: Sequence[str] = ()
    cls: type[nn.Module] | None = None

    @property
    def is_verified(self) -> bool:
        """Whether the split needs no check at the first forward, since the tests of this package made it."""
        return self.cls is None

    def branches_of(self, block: nn.Module, args: Sequence[Any] = (), kwargs: Any = None) -> Sequence[Branch]:
        """The branches of one block, for these further arguments of its ``forward``."""
        return self.branches(block) if callable(self.branches) else self.branches

    def is_projection(self, block: nn.Module) -> bool:
        """Whether a shortcut of this block is more than the identity."""
        return any(branch.is_projection(block) for branch in self.branches_of(block))

    def get_batch_dim(self, block: nn.Module) -> int:
        """The dimension of this block's input that counts the samples."""
        return self.batch_dim(block) if callable(self.batch_dim) else self.batch_dim

    def select(
        self,
        block: Any,
        take: Callable[[Tensor], Tensor],
        num_rows: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The further arguments of ``forward`` for those of `num_rows` rows that `take` selects."""
        if callable(self.row_arguments):
            return self.row_arguments(block, take, *args, **kwargs)
        row_arguments = self.row_arguments

        def selected(name: str, value: Any) -> Any:
            return _rows_of(name, value, take, num_rows) if name in row_arguments else value

        return self._map_arguments(block, selected, args, kwargs) if row_arguments else (args, kwargs)

    def without_state(
        self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The further arguments of ``forward`` with None in place of those that it would change."""
        if not self.state_arguments:
            return args, kwargs
        states = self.state_arguments
        return self._map_arguments(block, lambda name, value: None if name in states else value, args, kwargs)

    def has_state(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether ``forward`` gets something that it would change."""
        given: dict[str, Any] = dict(kwargs)
        if self.state_arguments and args:
            given.update(zip(further_arguments(plain_class_of(block)), args, strict=False))
        return any(given.get(name) is not None for name in self.state_arguments)

    def _map_arguments(
        self, block: Any, function: Callable[[str, Any], Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        names = further_arguments(plain_class_of(block)) if args else ()
        return (
            tuple(function(name, value) for name, value in zip(names, args, strict=False)),
            {name: function(name, value) for name, value in kwargs.items()},
        )


def _rows_of(name: str, value: Any, take: Callable[[Tensor], Tensor], num_rows: int) -> Any:
    """An argument, or the tensors in it, for some of the samples."""
    if isinstance(value, tuple):
        return tuple(_rows_of(name, one, take, num_rows) for one in value)
    if not isinstance(value, Tensor) or value.dim() == 0 or len(value) == 1:
        return value
    if len(value) != num_rows:
        raise ValueError(
            f"the argument {name} must have one row for each of the {num_rows} samples, or a single one for all, got "
            f"shape {tuple(value.shape)}"
        )
    return take(value)


def get_attribute(block: nn.Module, name: str | None) -> Any:
    """The attribute of this dotted name, or None where there is none."""
    if name is None:
        return None
    try:
        return attrgetter(name)(block)
    except AttributeError:
        return None


@cache
def further_arguments(cls: Any) -> tuple[str, ...]:
    """What the ``forward`` of a class calls its arguments after the input."""
    return tuple(signature(cls.forward).parameters)[2:]


def plain_class_of(block: Any) -> Any:
    """The class of a block as it was before it was converted."""
    return getattr(block, "plain_class", type(block))
