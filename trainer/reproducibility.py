"""Seeds and states of the global random number generators."""

import random
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import numpy as np
import torch

from ..engine.checks import check_int


def seed_all(seed: int, deterministic_mode: bool = False, rank: int = 0) -> None:
    """Seed the global generators of python, numpy and torch.

    The Trainer does so when it is built. Called before the model is built, it covers the initial weights too, which
    must be the same on all ranks.

    Args:
        seed: In [0, 2**32).
        deterministic_mode: Whether to use deterministic kernels only.
        rank: Ranks draw different numbers, for example for dropout; rank 0 uses the seed itself.

    Raises:
        ValueError: If `seed` is out of range.
    """
    check_int("seed", seed, ge=0, lt=2**32)
    seed = (seed + rank * 0x9E3779B1) % 2**32
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  # the global generator is what user code draws from
    torch.manual_seed(seed)
    if deterministic_mode:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def hashed_seeds(*key: int) -> tuple[int, int, int]:
    """Seeds for the generators of python, torch and numpy (64, 64 and 32 bits), a pure function of the key.

    The three differ: torch and numpy both use the Mersenne Twister, and would draw the same numbers from one seed.

    Args:
        key: Ints in [0, 2**64).
    """
    return _SEEDS.unpack(blake2b(struct.pack(f"<{len(key)}Q", *key), digest_size=_SEEDS.size).digest())


def seed_generators(*key: int, own: Iterable[torch.Generator] = ()) -> None:
    """Seed the global generators of python, numpy and torch's CPU with a hash of the key.

    Args:
        key: Ints in [0, 2**64).
        own: More generators to seed, each with a hash of the key and its own initial seed.
    """
    for_python, for_torch, for_numpy = hashed_seeds(*key)
    random.seed(for_python)
    torch.default_generator.manual_seed(for_torch)
    np.random.seed(for_numpy)  # noqa: NPY002  # the global generator is what user code draws from
    for generator in own:
        generator.manual_seed(hashed_seeds(*key, generator.initial_seed())[1])


def generator_states(device: torch.device) -> dict[str, Any]:
    """The states of the global generators (python, numpy, torch), as plain values and tensors.

    Args:
        device: Its generator is included, besides that of the CPU.
    """
    numpy_state: Any = np.random.get_state(legacy=False)  # noqa: NPY002  # what user code draws from
    numpy_state["state"] = {**numpy_state["state"], "key": numpy_state["state"]["key"].tolist()}
    states: dict[str, Any] = {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_generator_states(states: Mapping[str, Any], device: torch.device) -> None:
    """Restore the states that `generator_states` returned."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    numpy_state = {**states["numpy"], "state": {**states["numpy"]["state"]}}
    numpy_state["state"]["key"] = np.array(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state(numpy_state)  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


@contextmanager
def generators_kept(own: Sequence[torch.Generator] = ()) -> Iterator[None]:
    """A context after which the global generators and those in `own` have the states that they had before it."""
    of_python, of_torch = random.getstate(), torch.default_generator.get_state()
    of_own = [generator.get_state() for generator in own]
    # numpy's bit generator is exchanged for another one, as restoring the state takes 25 us. This loses only a normal
    # number that numpy has drawn in advance; if there is one, the state is restored instead.
    of_numpy, bits = np.random.get_state(legacy=False), np.random.mtrand.get_bit_generator()  # noqa: NPY002
    stand_in = _stand_ins.pop() if _stand_ins else np.random.MT19937(0)
    np.random.mtrand.set_bit_generator(stand_in)
    try:
        yield
    finally:
        np.random.mtrand.set_bit_generator(bits)
        _stand_ins.append(stand_in)
        if of_numpy["has_gauss"]:
            np.random.set_state(of_numpy)  # noqa: NPY002
        for generator, state in zip(own, of_own, strict=True):
            generator.set_state(state)
        torch.default_generator.set_state(of_torch)
        random.setstate(of_python)


_SEEDS = struct.Struct("<QQI")
_stand_ins: list[np.random.MT19937] = []  # unused ones: creating one takes 60 us
