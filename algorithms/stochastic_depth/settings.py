"""The settings of stochastic depth, documented and checked once for the algorithm and the functional form."""

from dataclasses import dataclass
from typing import Literal, get_args

from .blocks import known_names
from .draws import Draws
from .plan import Scaling, StochasticMethod
from .rates import DropDistribution, check_distribution, check_rate

DropUnit = Literal["block", "branch"]

_CHOICES = {"stochastic_method": StochasticMethod, "draws": Draws, "scaling": Scaling, "drop_unit": DropUnit}
_FLAGS = ("use_same_gpu_seed", "protect_projections")


@dataclass(frozen=True)
class Settings:
    """The settings that `StochasticDepth` and `apply_stochastic_depth` share.

    Args:
        target_layer_name: Which type of block to convert, such as ``"ResNetBottleneck"``; by default every
            known type.
        stochastic_method: ``"block"`` drops a block for the whole batch, ``"sample"`` for each row
            independently. Both compute only what is kept.
        drop_rate: Probability in [0, 1] that the last block is dropped.
        drop_distribution: ``"linear"`` from ``drop_rate / L`` at the first of L blocks to `drop_rate` at
            the last, ``"uniform"``, L multipliers of `drop_rate`, or a function of l (1..L) and L that
            returns one.
        use_same_gpu_seed: Whether all ranks of a distributed run drop the same blocks (``"block"`` method;
            with ``"sample"`` each rank draws for its own rows).
        draws: ``"independent"`` (Huang et al.), or ``"balanced"``: the same rates with little variation in
            how much is dropped from step to step.
        scaling: ``"evaluation"`` multiplies residual branches by 1 - rate in evaluation (Huang et al.),
            ``"training"`` by 1 / (1 - rate) in training (timm, torchvision).
        drop_unit: For blocks of several residual branches (transformers): drop the ``"block"``, or each
            ``"branch"`` separately.
        protect_projections: Never drop a block whose shortcut is not the identity.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of its range.
    """

    target_layer_name: str | None = None
    stochastic_method: StochasticMethod = "block"
    drop_rate: float = 0.2
    drop_distribution: DropDistribution = "linear"
    use_same_gpu_seed: bool = True
    draws: Draws = "independent"
    scaling: Scaling = "evaluation"
    drop_unit: DropUnit = "block"
    protect_projections: bool = False

    def __post_init__(self) -> None:
        if self.target_layer_name is not None and self.target_layer_name not in known_names():
            known = ", ".join(known_names())
            raise ValueError(f"target_layer_name must be one of {known}, got {self.target_layer_name!r}")
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in get_args(choices):
                raise ValueError(f"{name} must be {' or '.join(map(repr, get_args(choices)))}, got {value!r}")
        for name in _FLAGS:
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {value!r}")
        rate = check_rate(self.drop_rate)
        if rate == 1 and self.scaling == "training":
            raise ValueError(f'drop_rate must be below 1 with scaling="training", got {rate}')
        check_distribution(self.drop_distribution)

    @property
    def ranks_may_differ(self) -> bool:
        """Whether a rank may drop a block that another one keeps."""
        return self.stochastic_method == "sample" or not self.use_same_gpu_seed
