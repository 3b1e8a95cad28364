"""The processes that train together: their process group, their gradients, their BatchNorm."""

from .group import (
    RankLostError,
    all_or_none,
    copy_from_rank_zero,
    explained,
    from_rank_zero,
    gather,
    is_joined,
    join_process_group,
    rank,
    sum_over_ranks,
    world_size,
)

__all__ = [
    "RankLostError",
    "all_or_none",
    "copy_from_rank_zero",
    "explained",
    "from_rank_zero",
    "gather",
    "is_joined",
    "join_process_group",
    "rank",
    "sum_over_ranks",
    "world_size",
]
