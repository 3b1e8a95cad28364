"""A test on several ranks fails if one of them fails, dies or hangs."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from helpers.ranks import on_ranks, run_on_ranks

pytestmark = pytest.mark.xdist_group("ranks")


@on_ranks(3)
@pytest.mark.parametrize("exponent", [1, 2])
def test_ranks_share_arguments_and_a_process_group(exponent: int, tmp_path: Path) -> None:
    number = torch.tensor((dist.get_rank() + 1) ** exponent)
    dist.all_reduce(number)
    assert number == {1: 6, 2: 14}[exponent]
    (tmp_path / str(dist.get_rank())).touch()
    dist.barrier()
    assert len(list(tmp_path.iterdir())) == 3


def own_rank(offset: int) -> int:
    return dist.get_rank() + offset


def test_the_values_of_all_ranks_are_returned() -> None:
    assert run_on_ranks(2, own_rank, offset=5) == [5, 6]


def fail_on_rank_1() -> None:
    assert dist.get_rank() == 0, "rank 1 is wrong"


def kill_rank_1() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def hang_on_rank_1() -> None:
    if dist.get_rank() == 1:
        time.sleep(600)


def test_an_error_of_one_rank_fails_the_test() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"rank 1 failed\n(.*\n)*AssertionError: rank 1 is wrong"):
        run_on_ranks(2, fail_on_rank_1)


def test_a_rank_that_dies_fails_the_test() -> None:
    with pytest.raises(pytest.fail.Exception, match="rank 1 died"):
        run_on_ranks(2, kill_rank_1)


def test_a_rank_that_hangs_fails_the_test() -> None:
    with pytest.raises(pytest.fail.Exception, match="rank 1 was not done after 1 s; its stack is in the captured"):
        run_on_ranks(2, hang_on_rank_1, timeout=1)
