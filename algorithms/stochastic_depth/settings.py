"""The settings of stochastic depth, documented and checked once for the algorithm and the functional form."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

from ...engine.checks import check_int
from .draws import Draws
from .plan import Scaling, StochasticMethod
from .rates import DropDistribution, check_distribution, check_rate

DropUnit = Literal["block", "branch"]

_CHOICES = {"stochastic_method": StochasticMethod, "draws": Draws, "scaling": Scaling, "drop_unit": DropUnit}
_FLAGS = ("use_same_gpu_seed", "protect_projections")

DEFAULT_DROP_RATE = 0.2  # Composer's


@dataclass(frozen=True)
class Settings:
    """The settings that `StochasticDepth` and `apply_stochastic_depth` share.

    Args:
        target_layer_name: Which type of block to convert, such as ``"ResNetBottleneck"``; by default every
            known type and every class with a drop path of its own. A class, or its name, is traced even where
            it has none.
        stochastic_method: ``"block"`` drops a block for the whole batch, ``"sample"`` for each row by
            itself. Both compute only what is kept.
        drop_rate: Probability in [0, 1] that the last block is dropped. By default the rates of the model's own
            drop paths (timm, torchvision), if they are above 0, and otherwise 0.2. In any case drop paths inside
            converted blocks no longer mask.
        drop_distribution: ``"linear"`` from ``drop_rate / L`` at the first of L blocks to `drop_rate` at
            the last, ``"uniform"``, L multipliers of `drop_rate`, or a function of l (1..L) and L that
            returns one.
        use_same_gpu_seed: Whether all ranks of a distributed run drop the same blocks (``"block"`` method;
            with ``"sample"`` each rank draws for its own rows).
        draws: ``"independent"`` (Huang et al.), or ``"balanced"``: the same rates with little variation in
            how much is dropped from step to step.
        scaling: ``"evaluation"`` multiplies residual branches by 1 - rate in evaluation (Huang et al.),
            ``"training"`` by 1 / (1 - rate) in training (timm, torchvision). By default ``"training"`` with the
            model's own rates, and otherwise ``"evaluation"``.
        drop_unit: For blocks of several residual branches (transformers): drop the ``"block"``, or each
            ``"branch"`` separately.
        protect_projections: Never drop a block whose shortcut is not the identity.
        seed: Seed of the draws, the same on all ranks. By default that of the Trainer, and 0 in your own loop.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of its range.
    """

    target_layer_name: str | type[nn.Module] | None = None
    stochastic_method: StochasticMethod = "block"
    drop_rate: float | None = None
    drop_distribution: DropDistribution = "linear"
    use_same_gpu_seed: bool = True
    draws: Draws = "independent"
    scaling: Scaling | None = None
    drop_unit: DropUnit = "block"
    protect_projections: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        _check_target(self.target_layer_name)
        for name, choices in _CHOICES.items():
            if name == "scaling" and self.scaling is None:
                continue
            if (value := getattr(self, name)) not in get_args(choices):
                raise ValueError(f"{name} must be {' or '.join(map(repr, get_args(choices)))}, got {value!r}")
        for name in _FLAGS:
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {value!r}")
        if self.seed is not None:
            check_int("seed", self.seed)
        rate = None if self.drop_rate is None else check_rate(self.drop_rate)
        if rate == 1 and self.scaling == "training":
            raise ValueError(f'drop_rate must be below 1 with scaling="training", got {rate}')
        check_distribution(self.drop_distribution)

    def check_own_rates(self) -> None:
        """Refuse settings that have no effect where the model's own rates are taken over, with a ValueError."""
        if self.drop_distribution != "linear":
            raise ValueError(
                "drop_distribution needs a drop_rate, as the model has drop-path rates of its own for every block, got "
                f"{self.drop_distribution!r}"
            )

    @property
    def ranks_may_differ(self) -> bool:
        """Whether a rank may drop a block that another one keeps."""
        return self.stochastic_method == "sample" or not self.use_same_gpu_seed


def _check_target(target: Any) -> None:
    is_class = isinstance(target, type) and issubclass(target, nn.Module)
    if target is not None and not is_class and not (isinstance(target, str) and target):
        raise ValueError(f"target_layer_name must be the name of a block type or a module class, got {target!r}")
