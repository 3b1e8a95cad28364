"""The process group of a training, and collectives of plain values.

Every function also works in a single process, without communication.
"""

import atexit
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

_timeout = timedelta(minutes=5)  # of every collective; set by join_process_group
_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets
_LOST = re.compile("connection|timed? ?out|gloo|nccl|remote process", re.IGNORECASE)


class RankLostError(RuntimeError):
    """Another process of this training has ended, or did not answer in time."""


def join_process_group(device: torch.device, timeout: float) -> torch.device:
    """Initialize the process group that torchrun asked for, unless there is one or it started a single process.

    Args:
        device: The kind of device; NCCL connects GPUs, gloo CPUs.
        timeout: Seconds after which a collective fails.

    Returns:
        The device of this rank; of several GPUs the one with its local rank.

    Raises:
        ValueError: If there is no GPU for this rank.
        RuntimeError: If torch was built without the backend that is needed.
    """
    _check_launch()
    if not is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    device = _own_gpu(device) if device.type == "cuda" else device
    global _timeout
    _timeout = timedelta(seconds=timeout)
    if is_initialized():
        return device
    needed = ["gloo", "nccl"] if device.type == "cuda" else ["gloo"]
    for backend in needed:
        if not dist.is_available() or not dist.is_backend_available(backend):
            raise RuntimeError(f"training on several processes needs torch with the backend {backend}, got one without")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        timeout=_timeout,
        device_id=device if device.type == "cuda" else None,
        **_rendezvous(),
    )
    atexit.register(_destroy_process_group)
    return device


def is_initialized() -> bool:
    """Whether there is a process group, possibly of a single process."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """The rank of this process, from 0 to `world_size` - 1."""
    return dist.get_rank() if is_initialized() else 0


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if is_initialized() else 1


def gather(value: T) -> list[T]:
    """The values of all ranks, in the order of ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    with translate_errors():
        dist.all_gather_object(values, value, group=_control_group())
    return values


def from_rank_zero(value: T) -> T:
    """The value of rank 0."""
    if world_size() == 1:
        return value
    values = [value]
    with translate_errors():
        dist.broadcast_object_list(values, src=0, group=_control_group())
    return values[0]


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """The sums over all ranks, the same numbers on all of them."""
    if world_size() == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64)
    with translate_errors():
        dist.all_reduce(sums, group=_control_group())
    return sums.tolist()


def copy_from_rank_zero(tensors: Iterable[Tensor]) -> None:
    """Copy the values of rank 0 into the tensors of all ranks, in place."""
    if world_size() == 1:
        return
    devices: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        devices.setdefault(tensor.device, []).append(tensor.detach())
    with torch.no_grad(), translate_errors():
        for group in devices.values():
            # As bytes, since not every backend can send every dtype.
            parts = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in group]
            flat = torch.cat(parts)
            dist.broadcast(flat, src=0)
            for tensor, part in zip(group, flat.split([part.numel() for part in parts]), strict=True):
                # Cloned, as a part may not be aligned for its dtype.
                tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))


@contextmanager
def all_or_none() -> Iterator[None]:
    """Make the body fail on every rank if it fails on one, so that no rank waits forever for another.

    Raises:
        RuntimeError: On the ranks where the body succeeded, naming the rank that failed and its error.
    """
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    messages = gather(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for number, message in enumerate(messages):
        if message is not None:
            raise RuntimeError(f"rank {number} failed with {message}")


@contextmanager
def translate_errors() -> Iterator[None]:
    """Turn the failure of a collective into a `RankLostError`."""
    try:
        yield
    except RuntimeError as error:
        if not _LOST.search(str(error)):
            raise
        raise RankLostError(
            f"rank {rank()} of {world_size()} got no answer: another process of this training has ended or hangs "
            f"({str(error).splitlines()[0]})"
        ) from error


def _rendezvous() -> dict[str, Any]:
    """Arguments of ``init_process_group`` that keep the restarts of torchrun apart; empty to use its defaults.

    torchrun uses one store for all its restarts, in which a process would find the addresses of processes that died
    (pytorch#135712), so the keys get the number of the restart as a prefix. With several machines, each of
    which counts its own restarts, torch's defaults are used.
    """
    is_one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or not is_one_machine:
        return {}
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    stores: Any = dist  # not in its type stubs
    store = stores.TCPStore(host, port, is_master=False, timeout=_timeout)
    return {
        "store": stores.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store),
        "rank": int(os.environ["RANK"]),
        "world_size": int(os.environ["WORLD_SIZE"]),
    }


def _own_gpu(device: torch.device) -> torch.device:
    """Select the GPU of this rank and make it the current device."""
    number, count = int(os.environ.get("LOCAL_RANK", device.index or 0)), torch.cuda.device_count()
    if count == 1:
        number = 0  # each process sees only its own GPU
    if device.index not in (None, number):
        raise ValueError(f'device must be "gpu" on several processes, each of which takes its own, got "{device}"')
    if number >= count:
        raise ValueError(f"torchrun must start at most one process per GPU, got local rank {number} and {count} GPUs")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


@cache
def _control_group() -> Any:
    """The gloo group for plain values, apart from the group that reduces gradients."""
    return dist.new_group(backend="gloo", timeout=_timeout)


def _check_launch() -> None:
    """Refuse a WORLD_SIZE without the other variables that torchrun sets."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or is_initialized():
        return
    if missing := [name for name in _LAUNCHED if name not in os.environ]:
        raise ValueError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} must come with {', '.join(missing)} in the environment, as "
            "torchrun sets them, or the processes could not connect"
        )


def _destroy_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
