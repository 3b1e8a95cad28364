"""Gradient communication and step time of two ranks, by the number of dropped blocks.

python benchmarks/communication.py

Both variants train a ResNet-50 with the same drop plans on two gloo processes of one thread each, interleaved:
gradients averaged block by block, as the Trainer does, and DistributedDataParallel with
find_unused_parameters=True on the same network.
"""

import argparse
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import resnet50

import etude.functional as cf
from etude.trainer.distributed.gradients import GradientSynchronizer
from interleaved import time_in_turns, trimmed_mean


class Traffic:
    """Counts all-reduces and their bytes."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def take(self) -> tuple[int, int]:
        """The number of all-reduces and their bytes since the last call."""
        taken, self.calls = (len(self.calls), sum(self.calls)), []
        return taken


def network(drop_rate: float) -> nn.Module:
    """A ResNet-50 for ten classes with stochastic depth."""
    torch.manual_seed(0)
    return cf.apply_stochastic_depth(resnet50(num_classes=10), drop_rate=drop_rate)


def step_in_units(model: nn.Module, x: Tensor, y: Tensor, traffic: Traffic) -> Callable[[], None]:
    """A step that averages gradients with one all-reduce per block."""
    units = [
        [p for layer in unit for p in layer.parameters()]
        for b in cf.stochastic_blocks(model)
        for unit in b.gradient_units()
    ]
    synchronizer = GradientSynchronizer(model, lambda: units)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    reduce = dist.all_reduce

    def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        traffic.calls.append(tensor.nbytes)
        return reduce(tensor, *args, **kwargs)

    dist.all_reduce = counting

    def step() -> None:
        optimizer.zero_grad()
        synchronizer.begin_step()
        synchronizer.begin_last_backward()
        F.cross_entropy(model(x), y).backward()
        synchronizer.finish()
        optimizer.step()

    return step


def step_in_buckets(model: nn.Module, x: Tensor, y: Tensor, traffic: Traffic) -> Callable[[], None]:
    """A step of DistributedDataParallel."""
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def counting(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        traffic.calls.append(bucket.buffer().nbytes)
        return allreduce_hook(dist.group.WORLD, bucket)

    parallel.register_comm_hook(None, counting)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(parallel(x), y).backward()
        optimizer.step()

    return step


def measure(rounds: int, drop_rate: float, batch_size: int, size: int) -> None:
    """Measure on one of the two ranks; rank 0 prints."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    x, y = torch.randn(batch_size // 2, 3, size, size), torch.randint(0, 10, (batch_size // 2,))
    models = {"units": network(drop_rate), "DDP find_unused": network(drop_rate)}
    traffic = {name: Traffic() for name in models}
    make = {"units": step_in_units, "DDP find_unused": step_in_buckets}
    steps = {name: make[name](model, x, y, traffic[name]) for name, model in models.items()}
    seen: dict[str, dict[int, list[tuple[int, int]]]] = {name: {} for name in models}

    def recorded(name: str) -> Callable[[], None]:
        def step() -> None:
            traffic[name].take()  # DistributedDataParallel calls the counted all_reduce, too
            steps[name]()
            plan = cf.stochastic_blocks(models[name])[0].drop_plan
            seen[name].setdefault(sum(plan.dropped_blocks or ()), []).append(traffic[name].take())

        return step

    random.seed(0)  # all ranks take the turns in the same order
    seconds = time_in_turns({name: recorded(name) for name in steps}, rounds)
    if dist.get_rank() == 0:
        print(f"{'dropped':>7}" + "".join(f"  {name + ': all-reduces':>30}  {'MB':>7}" for name in seen))
        for dropped in sorted(seen["units"]):
            cells = [(seen[name][dropped][-1]) for name in seen]
            print(f"{dropped:>7}" + "".join(f"  {calls:>30}  {sent / 1e6:>7.2f}" for calls, sent in cells))
        means = {name: trimmed_mean(times) for name, times in seconds.items()}
        for name, mean in means.items():
            print(f"{name}: {1e3 * mean:.0f} ms per step (median {1e3 * statistics.median(seconds[name]):.0f})")
        print(f"units / DDP: {means['units'] / means['DDP find_unused']:.3f}")
    dist.destroy_process_group()


def main() -> None:
    """Start two processes that run `measure`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--drop-rate", type=float, default=0.5, help="drop rate of the last block; linear over depth")
    parser.add_argument("--batch-size", type=int, default=32, help="global batch size, over both ranks")
    parser.add_argument("--size", type=int, default=64, help="height and width of the images in pixels")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        measure(arguments.rounds, arguments.drop_rate, arguments.batch_size, arguments.size)
        return
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*command, *sys.argv], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


if __name__ == "__main__":
    main()
