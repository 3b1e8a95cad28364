"""The functional form of every algorithm, for use without a Trainer: ``import etude.functional as cf``."""

from .algorithms.activation_checkpointing import (
    apply_activation_checkpointing,
    remove_activation_checkpointing,
)
from .algorithms.blurpool import apply_blurpool
from .algorithms.channels_last import apply_channels_last
from .algorithms.cutmix import cutmix_batch
from .algorithms.ema import compute_ema
from .algorithms.gradient_clipping import apply_gradient_clipping
from .algorithms.label_smoothing import smooth_labels
from .algorithms.mixup import mixup_batch
from .algorithms.progressive_resizing import resize_batch
from .algorithms.sam import sam_perturbation
from .algorithms.stochastic_depth import (
    BlockType,
    Branch,
    apply_stochastic_depth,
    compile_stochastic_blocks,
    copy_drop_rates,
    expected_savings,
    fold_stochastic_depth,
    register_block_type,
    register_residual_block,
    remove_stochastic_depth,
    stochastic_blocks,
)
from .models import export_network

__all__ = [
    "BlockType",
    "Branch",
    "apply_activation_checkpointing",
    "apply_blurpool",
    "apply_channels_last",
    "apply_gradient_clipping",
    "apply_stochastic_depth",
    "compile_stochastic_blocks",
    "compute_ema",
    "copy_drop_rates",
    "cutmix_batch",
    "expected_savings",
    "export_network",
    "fold_stochastic_depth",
    "mixup_batch",
    "register_block_type",
    "register_residual_block",
    "remove_activation_checkpointing",
    "remove_stochastic_depth",
    "resize_batch",
    "sam_perturbation",
    "smooth_labels",
    "stochastic_blocks",
]
