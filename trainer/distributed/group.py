"""The processes that train together: how they find each other, and what they tell each other.

Every function also works in a process that is alone, where there is nobody to talk to.
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

_timeout = timedelta(minutes=5)  # of all that ranks tell each other; join_process_group sets it
_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets
_LOST = re.compile("connection|timed? ?out|gloo|nccl|remote process", re.IGNORECASE)


class RankLostError(RuntimeError):
    """Another process of this training has ended, or did not answer in time."""


def join_process_group(device: torch.device, timeout: float) -> torch.device:
    """Join the processes that torchrun started, if it started several and nobody has joined them yet.

    Args:
        device: The kind of device; NCCL connects GPUs, gloo CPUs.
        timeout: Seconds to wait for an answer of another rank.

    Returns:
        The device of this rank: of several GPUs its own one.

    Raises:
        ValueError: If there is no GPU for this rank.
        RuntimeError: If torch was built without the backend.
    """
    _check_launch()
    if not is_joined() and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    device = _own_gpu(device) if device.type == "cuda" else device
    global _timeout
    _timeout = timedelta(seconds=timeout)
    if is_joined():
        return device
    needed = ["gloo", "nccl"] if device.type == "cuda" else ["gloo"]
    for backend in needed:
        if not dist.is_available() or not dist.is_backend_available(backend):
            raise RuntimeError(f"training on several processes needs torch with the backend {backend}, got one without")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        timeout=_timeout,
        device_id=device if device.type == "cuda" else None,
        **_meeting_place(),
    )
    atexit.register(_leave)
    return device


def is_joined() -> bool:
    """Whether this process is one of a group, which may have no other."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Number of this process among `world_size`."""
    return dist.get_rank() if is_joined() else 0


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if is_joined() else 1


def gather(value: T) -> list[T]:
    """What every rank has, in the order of ranks; the same list on all of them."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    with explained():
        dist.all_gather_object(values, value, group=_talk())
    return values


def from_rank_zero(value: T) -> T:
    """What rank 0 has."""
    if world_size() == 1:
        return value
    values = [value]
    with explained():
        dist.broadcast_object_list(values, src=0, group=_talk())
    return values[0]


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """The sums over all ranks, the same numbers on all of them."""
    if world_size() == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64)
    with explained():
        dist.all_reduce(sums, group=_talk())
    return sums.tolist()


def copy_from_rank_zero(tensors: Iterable[Tensor]) -> None:
    """Give the tensors of all ranks the values of rank 0, in place."""
    if world_size() == 1:
        return
    devices: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        devices.setdefault(tensor.device, []).append(tensor.detach())
    with torch.no_grad(), explained():
        for group in devices.values():
            # As bytes, since not every number format can be sent.
            parts = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in group]
            flat = torch.cat(parts)
            dist.broadcast(flat, src=0)
            for tensor, part in zip(group, flat.split([part.numel() for part in parts]), strict=True):
                # A part may begin where its number format must not: the copy does not.
                tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))


@contextmanager
def all_or_none() -> Iterator[None]:
    """Let the body fail on every rank if it fails on one, so that no rank waits for another in vain.

    Raises:
        RuntimeError: Where another rank failed; it says which, and why.
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
def explained() -> Iterator[None]:
    """Turn the failure of a collective operation into a `RankLostError`."""
    try:
        yield
    except RuntimeError as error:
        if not _LOST.search(str(error)):
            raise
        raise RankLostError(
            f"rank {rank()} of {world_size()} got no answer: another process of this training has ended or hangs "
            f"({str(error).splitlines()[0]})"
        ) from error


def _meeting_place() -> dict[str, Any]:
    """Where the processes of this start meet, if torchrun may have started others before them.

    torchrun lends one store to all its starts, in which a process finds the addresses of those that died
    (pytorch#135712). The number of the start keeps them apart. On several machines, where each counts
    its own, it is left to torch.
    """
    is_one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or not is_one_machine:
        return {}
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    stores: Any = dist  # its stubs leave the stores out
    store = stores.TCPStore(host, port, is_master=False, timeout=_timeout)
    return {
        "store": stores.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store),
        "rank": int(os.environ["RANK"]),
        "world_size": int(os.environ["WORLD_SIZE"]),
    }


def _own_gpu(device: torch.device) -> torch.device:
    """The GPU of this rank on its machine, made the current one."""
    number, count = int(os.environ.get("LOCAL_RANK", device.index or 0)), torch.cuda.device_count()
    if count == 1:
        number = 0  # where each process is shown its own GPU only
    if device.index not in (None, number):
        raise ValueError(f'device must be "gpu" on several processes, each of which takes its own, got "{device}"')
    if number >= count:
        raise ValueError(f"torchrun must start at most one process per GPU, got local rank {number} and {count} GPUs")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


@cache
def _talk() -> Any:
    """The group in which ranks tell each other things, apart from that in which they send gradients."""
    return dist.new_group(backend="gloo", timeout=_timeout)


def _check_launch() -> None:
    """Refuse to train alone what was started as one of several processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or is_joined():
        return
    if missing := [name for name in _LAUNCHED if name not in os.environ]:
        raise ValueError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} must come with {', '.join(missing)} in the environment, as "
            "torchrun sets them, or the processes would not find each other"
        )


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
