"""Training on several processes: process group, gradients, sharding, BatchNorm."""

from .group import (
    RankLostError,
    all_or_none,
    copy_from_rank_zero,
    from_rank_zero,
    gather,
    is_initialized,
    join_process_group,
    rank,
    sum_over_ranks,
    translate_errors,
    world_size,
)

__all__ = [
    "RankLostError",
    "all_or_none",
    "copy_from_rank_zero",
    "from_rank_zero",
    "gather",
    "is_initialized",
    "join_process_group",
    "rank",
    "sum_over_ranks",
    "translate_errors",
    "world_size",
]
