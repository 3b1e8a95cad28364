"""Stochastic depth for a training loop without a Trainer: hooks on the model draw a plan for every training forward."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...engine import detach
from .draws import Draws
from .plan import DropPlan, Scaling, StochasticMethod
from .ranks import check_active_ddp, check_same_plan, current_rank
from .rates import DropDistribution
from .settings import DropUnit
from .stochastic_block import outside_of_graphs
from .stochastic_depth import StochasticDepth
from .surgery import restore, stochastic_blocks
from .torch_internals import is_in_backward, is_tracing, remove_forward_hooks


def apply_stochastic_depth(
    model: nn.Module,
    target_layer_name: str | type[nn.Module] | None = None,
    stochastic_method: StochasticMethod = "block",
    drop_rate: float | None = None,
    drop_distribution: DropDistribution = "linear",
    use_same_gpu_seed: bool = True,
    *,
    draws: Draws = "independent",
    scaling: Scaling | None = None,
    drop_unit: DropUnit = "block",
    protect_projections: bool = False,
    seed: int | None = None,
) -> nn.Module:
    """Give the residual blocks of a model stochastic depth (Huang et al. 2016, arXiv:1603.09382).

    The model is changed in place: same modules, same parameters, same ``state_dict``, so an
    optimizer made before stays valid. Each converted block has a ``.drop_rate``, which may be set.
    Every forward of `model` in training mode draws a new plan, from a separate generator.

    A Trainer of the model trains as with the algorithm `StochasticDepth` of the same settings: it draws one plan for
    each step, and settings and checkpoints hold the algorithm. Apply it before the Trainer is built, or at INIT.

    `model` may be any module that contains known residual blocks. The other arguments are the fields of `Settings`,
    which documents them.

    Returns:
        `model` itself.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of its range, no block matches, or the model has
            stochastic depth already. The model is then unchanged.
    """
    algorithm = StochasticDepth(
        target_layer_name,
        stochastic_method,
        drop_rate,
        drop_distribution,
        use_same_gpu_seed=use_same_gpu_seed,
        draws=draws,
        scaling=scaling,
        drop_unit=drop_unit,
        protect_projections=protect_projections,
        seed=seed,
    )
    plan = algorithm.attach(model)
    first = stochastic_blocks(model)[0]
    draw = _DrawBeforeForward(plan, batch_dim=first.block_type.get_batch_dim(first))
    plan.draw_for_part = draw.draw_for_part
    model.register_forward_pre_hook(draw, with_kwargs=True)
    model.register_forward_hook(_CloseAfterForward(plan), always_call=True)
    return model


def remove_stochastic_depth(model: nn.Module) -> nn.Module:
    """Undo `apply_stochastic_depth`: every block gets its original class back, weights are unchanged.

    Returns:
        `model` itself.

    Raises:
        ValueError: If the model has no stochastic depth.
    """
    restore(model)
    for module in model.modules():
        detach(module, StochasticDepth)
        remove_forward_hooks(module, _DrawBeforeForward, _CloseAfterForward)
    return model


class _DrawBeforeForward:
    """A forward pre-hook that draws the plan of a model that is trained without a Trainer."""

    def __init__(self, plan: DropPlan, batch_dim: int) -> None:
        self.plan = plan
        self.batch_dim = batch_dim
        self.seed = plan.seed
        self.step = 0
        self._called: set[int] = set()  # blocks that were called by the plan of a part

    @outside_of_graphs
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A forward that is recomputed in its backward pass keeps the plan it had.
        if module.training and not self.plan.follows_trainer and not is_in_backward():
            if is_tracing():
                raise RuntimeError(
                    "torch.jit.trace must be given the model in evaluation mode, as the graph would hold the plan of "
                    "one step, got it in training mode"
                )
            num_rows = _num_rows((args, kwargs), self.batch_dim)
            if num_rows is None and self.plan.method == "sample":
                raise ValueError('stochastic_method="sample" needs a tensor among the model\'s inputs, got none')
            check_active_ddp()
            self._draw(num_rows or 0)
            self.plan.open()

    def draw_for_part(self, block: int, num_rows: int) -> None:
        """Draw where only a part of the model is called, such as ``model.forward_features``.

        A new plan is drawn for the first block that is called, and then as soon as a block is called again.
        """
        if not self._called or block in self._called:
            self._draw(num_rows)
        self._called.add(block)

    def _draw(self, num_rows: int) -> None:
        self._called.clear()
        self.plan.seed = self.seed  # a Trainer may have had another one
        self.plan.draw(self.step, rank=current_rank(), num_rows=num_rows)
        check_same_plan(self.plan, self.step)
        self.step += 1
        if torch.is_grad_enabled():
            self.plan.count_forward()


class _CloseAfterForward:
    """A forward hook that ends the step."""

    def __init__(self, plan: DropPlan) -> None:
        self.plan = plan

    @outside_of_graphs
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.plan.follows_trainer:
            return
        self.plan.close()
        if module.training and not is_in_backward():
            for tensor in _tensors(output):
                if tensor.requires_grad:
                    tensor.register_hook(self._begin_backward)

    def _begin_backward(self, grad: Tensor) -> None:
        self.plan.begin_backward()


def _num_rows(values: Any, batch_dim: int) -> int | None:
    """The size in `batch_dim` of the first tensor in `values` that has this dimension."""
    return next((tensor.shape[batch_dim] for tensor in _tensors(values) if tensor.dim() > batch_dim), None)


def _tensors(values: Any) -> Iterator[Tensor]:
    """All tensors in nested containers."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list, dict)):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _tensors(value)
