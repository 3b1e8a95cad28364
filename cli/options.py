"""Options that commands share, in groups; the names in each are those of the class that takes them.

Nothing heavy is imported here, as ``etude --help`` reads it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from ..algorithms import StochasticDepth

_OVER_TIME = ("start_late", "stop_early", "progressive_gamma")


@dataclass(frozen=True)
class DepthOptions:
    """Stochastic depth.

    Args:
        drop_rate: Probability in [0, 1] that the last block is dropped; 0 trains the plain network.
        stochastic_method: Drop a block for the whole batch, or for each sample by itself.
        drop_distribution: Rates that rise linearly with depth, or the same for every block.
        drop_warmup: How long the rates rise from 0, such as 0.2dur, 1ep or 50ba.
        start_late: No drops before this moment, such as 0.5dur or 10ep.
        stop_early: No drops from this moment on, such as 0.5dur or 10ep.
        progressive_gamma: Let the rates rise by 1 - exp(-gamma * batch), as progressive layer dropping does.
        draws: Decide for each block by itself, or balance how much is dropped from step to step.
        scaling: Multiply by 1 - rate in evaluation, or by 1 / (1 - rate) in training.
        use_same_gpu_seed: Drop the same blocks in all processes, so that none waits for another.
        protect_projections: Never drop a block whose shortcut is not the identity.
    """

    drop_rate: float = 0.2
    stochastic_method: Literal["block", "sample"] = "block"
    drop_distribution: Literal["linear", "uniform"] = "linear"
    drop_warmup: str = "0.0dur"
    start_late: str | None = None
    stop_early: str | None = None
    progressive_gamma: float | None = None
    draws: Literal["independent", "balanced"] = "independent"
    scaling: Literal["evaluation", "training"] = "evaluation"
    use_same_gpu_seed: bool = True
    protect_projections: bool = False

    def build(self) -> StochasticDepth:
        """The algorithm.

        Raises:
            ValueError: If an option is out of its range, or has no effect as nothing is dropped.
        """
        from ..algorithms import StochasticDepth
        from ..algorithms.stochastic_depth import ProgressiveLayerDrop, StartLate, StopEarly

        defaults = {option.name: option.default for option in fields(self)}
        for name in ("drop_warmup", *_OVER_TIME):
            if self.drop_rate == 0 and (value := getattr(self, name)) != defaults[name]:
                raise ValueError(f"{name} must come with a drop_rate above 0 to have an effect, got {value!r}")
        schedules: list[Any] = []
        if self.start_late is not None:
            schedules.append(StartLate(self.start_late))
        if self.stop_early is not None:
            schedules.append(StopEarly(self.stop_early))
        if self.progressive_gamma is not None:
            schedules.append(ProgressiveLayerDrop(self.progressive_gamma))
        settings = {name: value for name, value in asdict(self).items() if name not in _OVER_TIME}
        return StochasticDepth(**settings, drop_schedule=schedules or None)


@dataclass(frozen=True)
class TrainerOptions:
    """How the training runs.

    Args:
        device: cpu, gpu or a torch device; by default the GPU where there is one.
        precision: Full precision, or automatic mixed precision.
        device_train_microbatch_size: Images per forward and backward pass; by default the whole batch; auto
            halves it when memory runs out.
        eval_interval: How often to evaluate, in epochs or batches.
        seed: Of initialisation, data order and drop plans.
        deterministic_mode: Use only deterministic kernels.
        save_interval: How often to save a checkpoint: 1ep, 500ba, 0.1dur, 10min.
        save_num_checkpoints_to_keep: How many of the newest checkpoints to keep; -1 keeps all.
        max_nonfinite_steps: Steps in a row that may be skipped because their loss or gradients are not finite.
        dist_timeout: Seconds after which a process that does not answer is given up; more than a save takes.
        progress_bar: Show progress on standard error.
    """

    device: str | None = None
    precision: Literal["fp32", "amp_bf16", "amp_fp16"] = "fp32"
    device_train_microbatch_size: int | Literal["auto"] | None = None
    eval_interval: str = "1ep"
    seed: int = 0
    deterministic_mode: bool = False
    save_interval: str = "1ep"
    save_num_checkpoints_to_keep: int = 2
    max_nonfinite_steps: int = 0
    dist_timeout: float = 300.0
    progress_bar: bool = True
