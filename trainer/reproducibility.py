"""Seeds of the global generators, and what may draw from them."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_all(seed: int, deterministic_mode: bool) -> None:
    """Seed the generators of python, numpy and torch, and choose deterministic kernels if asked to."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  # the global generator is what user code draws from
    torch.manual_seed(seed)
    if deterministic_mode:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


@contextmanager
def generator_of_epoch(seed: int, epoch: int) -> Iterator[None]:
    """Give torch's global CPU generator a state of this epoch's own, and afterwards its old one back."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0]))
        yield
